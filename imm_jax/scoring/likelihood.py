"""Log-probabilities of given tokens, over packed rows: sharded as training is, without its gradients.

Axes: B rows of a forward pass, T positions, S positions that are scored, E tokens that are scored, D model,
V vocabulary, C scored positions whose logits exist at once.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from imm_jax import progress
from imm_jax.errors import UserError
from imm_jax.model import attention, hf, sharding
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params
from imm_jax.scoring.packing import Rows, pack
from imm_jax.scoring.requests import Request
from imm_jax.training import fsdp
from imm_jax.training.loss import token_scores
from imm_jax.training.step import hidden_states, rows_of_device

# Tokens of a row, unless a text is longer, and of a device's forward pass: enough for products to be fast.
ROW, TOKENS = 512, 4096
# Positions of a device whose logits exist at once.
LOGITS = 512
# Shapes come in steps, so that few are compiled.
_STEP = 64


class Score(NamedTuple):
  """What a model says of the scored tokens of a request.

  Attributes:
    logprob: the sum of their log-probabilities, in nats.
    greedy: whether each is the likeliest in its place.
    tokens: how many there are.
  """

  logprob: float
  greedy: bool
  tokens: int


class Scorer:
  """Scores requests with a model's parameters."""

  def __init__(self, config: ModelConfig, params: Params, *, mesh: Mesh, compute_dtype: jnp.dtype | str,
               tokens: int = TOKENS):
    """Keeps the parameters, [stacked layers], which are placed on `mesh` by `sharding.param_sharding`.

    Args:
      config: of the model.
      params: as `hf.load` gives them, in any dtype.
      mesh: rows are split over its `data` and `fsdp`, products over its `tensor`.
      compute_dtype: of activations.
      tokens: of a device's forward pass, or one row where that has more.
    """
    self.config, self._params, self._mesh = config, params, mesh
    self._dtype, self._tokens = jnp.dtype(compute_dtype), tokens

  @classmethod
  def load(cls, folder: str | Path, *, mesh: Mesh, compute_dtype: jnp.dtype | str, tokens: int = TOKENS) -> "Scorer":
    """A scorer of a checkpoint folder, with its weights in the compute dtype."""
    config, params = hf.load(folder, dtype=jnp.dtype(compute_dtype),
                             place=functools.partial(sharding.param_sharding, mesh))
    return cls(config, params, mesh=mesh, compute_dtype=compute_dtype, tokens=tokens)

  def score(self, requests: Sequence[Request], *, label: str = "score", quiet: bool = False) -> list[Score]:
    """Scores requests; each process gets all scores.

    Args:
      requests: see `requests`; the same in every process.
      label: what the progress bar says.
      quiet: shows none.

    Raises:
      UserError: for a request that is longer than the model's context.
      ValueError: for one that scores its first token, or none.
    """
    if not requests:
      return []
    if not all(0 < r.start < len(r.tokens) for r in requests):
      raise ValueError("a request scores some of its tokens, and not the first")
    longest, limit = max(len(r.tokens) - 1 for r in requests), self.config.max_positions
    if limit and longest > limit:
      raise UserError(f"a text of {longest + 1} tokens is longer than the {limit} positions of the model")
    length = ROW if longest <= ROW else 128 * math.ceil(longest / 128)
    packed = pack(requests, length=length)
    parts = sharding.num_batch_shards(self._mesh)
    most = parts * max(1, self._tokens // length)
    steps = math.ceil(len(packed.owners) / most)
    batch = parts * math.ceil(len(packed.owners) / (parts * steps))  # as even as can be: empty rows cost as much
    backend = attention.choose_backend("auto", self.config, dtype=self._dtype, length=length, rows=batch,
                                       mesh=self._mesh)
    program = _program(self.config, self._mesh, self._dtype, "xla" if backend == "splash" else backend)
    logprobs, counts = np.zeros(len(requests)), np.zeros(len(requests), int)
    greedy = np.ones(len(requests), bool)

    def take(begin: int, found: tuple[jax.Array, jax.Array]) -> None:
      for owners, row, best in zip(packed.owners[begin:begin + batch], *map(np.asarray, found), strict=False):
        np.add.at(logprobs, owners, row[:len(owners)].astype(np.float64))
        np.logical_and.at(greedy, owners, best[:len(owners)])
        np.add.at(counts, owners, 1)
        bar.update(len(set(owners)))

    with progress.bar(len(requests), label, "text", quiet=quiet) as bar:
      before = None
      for begin in range(0, len(packed.owners), batch):
        found = begin, program(self._params, _placed(packed, begin, batch, self._mesh))
        if before:  # the host is one batch ahead
          take(*before)
        before = found
      take(*before)
    return [Score(float(p), bool(g), int(n)) for p, g, n in zip(logprobs, greedy, counts, strict=True)]


def _placed(rows: Rows, begin: int, count: int, mesh: Mesh) -> dict[str, jax.Array]:
  """So many rows from one on, on the devices: empty ones where there are fewer, and room for more scored tokens."""
  where = NamedSharding(mesh, sharding.BATCH)
  placed = {}
  for name in ("tokens", "positions", "until", "places", "indices", "targets"):
    part = getattr(rows, name)[begin:begin + count]
    width = part.shape[1]
    if name == "places":
      width = _STEP * math.ceil(width / _STEP)  # each costs a row of logits
    elif name in ("indices", "targets"):
      width = _STEP << max(0, math.ceil(math.log2(width / _STEP)))
    whole = np.zeros((count, width), np.int32)
    whole[:len(part), :part.shape[1]] = part
    if name == "until":
      whole[len(part):] = np.arange(width)  # padding sees itself
    placed[name] = jax.make_array_from_callback(whole.shape, where, lambda index, whole=whole: whole[index])
  return placed


@functools.lru_cache(maxsize=8)  # a run comes here for every model and task
def _program(config: ModelConfig, mesh: Mesh, dtype: jnp.dtype, backend: str,
             ) -> Callable[[Params, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]:
  """Compiled: (params, rows) -> (log-probabilities [B, E], whether each is the likeliest [B, E])."""
  options = {"mesh": mesh, "gather": fsdp.constrained(mesh, dtype)} if mesh.size > 1 else {}

  def run(params: Params, rows: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    attend = attention.branching(rows["until"], backend=backend, mesh=mesh)
    x, head = hidden_states(config, params, rows["tokens"], rows["positions"], attend=attend, compute_dtype=dtype,
                            **options)
    x = jnp.take_along_axis(x, rows["places"][..., None], axis=1)
    chunk = max(1, LOGITS // rows_of_device(x.shape[0], options.get("mesh")))
    return token_scores(x, head, rows["indices"], rows["targets"], chunk)

  return jax.jit(run, out_shardings=NamedSharding(mesh, P()))
