"""Early stopping: training ends after the first epoch with a higher loss on held-out answers than the best before."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params
from imm_jax.training.additions import PLAIN, Additions
from imm_jax.training.computation import Computation
from imm_jax.training.input import Input
from imm_jax.training.packing import PackedBatches
from imm_jax.training.step import Frozen, TrainState, forward_options, token_losses

# The entries of a state that are kept from the best epoch.
BEST_KEYS = ("params", "average")


class EarlyStopping:
  """Measures the loss on held-out answers after each epoch, and keeps the weights of the best epoch.

  Follows Prechelt 1998 (Early stopping - but when?) with a patience of one epoch. The loss is the mean of -log p over
  the answers' tokens, without the additions to the training loss.

  Attributes:
    losses: held-out losses of the epochs so far.
    best: weights of the best epoch (the `BEST_KEYS` of its state), or None before the first.
    should_stop: whether the last epoch was worse than the best.
  """

  def __init__(self, config: ModelConfig, held_out: PackedBatches, ends: Sequence[int],
               computation: Computation, *, additions: Additions = PLAIN):
    """Prepares the measurement.

    Args:
      config: model config.
      held_out: the held-out answers, packed with `epochs=1`.
      ends: number of steps after which each epoch ends, see `PackedBatches.epoch_ends`.
      computation: that of the training.
      additions: additions of the training.
    """
    self._batches, self._ends, self._mesh = held_out, frozenset(ends), computation.mesh
    self._program = _program(config, computation, additions)
    self.losses: list[float] = []
    self.best: dict[str, Params] | None = None

  @property
  def should_stop(self) -> bool:
    """Returns whether the last epoch was worse than the best."""
    return bool(self.losses) and self.losses[-1] > min(self.losses)

  @property
  def best_epoch(self) -> int:
    """Returns the number of the best epoch, from 1."""
    return 1 + self.losses.index(min(self.losses))

  def due(self, done: int) -> bool:
    """Returns whether an epoch ends after `done` steps."""
    return done in self._ends

  def measure(self, state: TrainState) -> float:
    """Measures the held-out loss at the end of an epoch, and keeps the weights if they are the best so far."""
    loss = self._loss(state["params"], state.get("frozen", {}))
    if not self.losses or loss < min(self.losses):
      self.best = None  # frees its memory before the copy
      self.best = jax.tree.map(jnp.copy, {name: state[name] for name in BEST_KEYS if name in state})
    self.losses.append(loss)
    return loss

  def _loss(self, params: Params, frozen: Frozen) -> float:
    total, count, pending = 0.0, 0.0, None
    for batch in Input(self._batches, self._mesh):
      sums = self._program(params, frozen, batch)
      if pending is not None:
        total, count = total + float(pending[0]), count + float(pending[1])
      pending = sums  # the host dispatches one batch ahead
    return (total + float(pending[0])) / (count + float(pending[1]))


@functools.lru_cache(maxsize=8)  # reused in every round of a run
def _program(config: ModelConfig, computation: Computation, additions: Additions,
             ) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Compiles a function (params, frozen, batch) -> (sum of -log p of the learned tokens, their number)."""
  options = {**forward_options(computation), "additions": additions._replace(kl=0.0)}

  def losses(params: Params, frozen: Frozen, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:

    def of_part(part: dict[str, jax.Array]) -> jax.Array:
      loss, numbers = token_losses(config, params, part, frozen=frozen, **options)
      return jnp.stack([loss, numbers["tokens"]])

    parts = jax.tree.map(lambda x: x.reshape(computation.accumulation, -1, *x.shape[1:]), batch)
    return tuple(jnp.sum(jax.lax.map(of_part, parts), axis=0))

  return jax.jit(losses)
