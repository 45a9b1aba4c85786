"""Sums measures of one or several models' predictions over the tokens of packed texts, without a backward pass."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params
from imm_jax.runtime import progress
from imm_jax.training.computation import Computation
from imm_jax.training.input import Input
from imm_jax.training.loss import choose_chunk
from imm_jax.training.packing import PackedBatches
from imm_jax.training.step import count_device_rows, forward_options, head_inputs

# A model's hidden states, head, targets and loss mask, as returned by `step.head_inputs`.
Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
# (inputs of each model, number of positions whose logits are held at once) -> sums over a batch, float32 [N].
Measure = Callable[[Sequence[Inputs], int], jax.Array]


def sum_over_batches(measure: Measure, config: ModelConfig, models: Sequence[Params], batches: PackedBatches,
                     computation: Computation, *, label: str) -> np.ndarray:
  """Computes the sums of a measure over all batches, float64 [N].

  Args:
    measure: a module-level function, so that its program is cached across calls.
    config: config of all models.
    models: parameters with stacked layers, sharded by `sharding.RULES`.
    batches: prompts and responses, packed with `epochs=1`.
    computation: how the passes are computed.
    label: label of the progress bar.
  """
  program = _program(measure, config, computation)
  total, previous = 0.0, None
  with progress.make_bar(len(batches), label, "batch") as bar:
    for batch in Input(batches, computation.mesh):
      current = program(tuple(models), batch)
      if previous is not None:
        total = total + np.asarray(previous, np.float64)
      previous = current  # the host is one batch ahead
      bar.update()
  return total + np.asarray(previous, np.float64)


@functools.lru_cache(maxsize=8)  # reused in every round of a run
def _program(measure: Measure, config: ModelConfig, computation: Computation,
             ) -> Callable[[tuple[Params, ...], dict[str, jax.Array]], jax.Array]:
  """Compiles a function (models, batch) -> sums."""
  options = forward_options(computation)

  def sums(models: tuple[Params, ...], batch: dict[str, jax.Array]) -> jax.Array:

    def sum_part(part: dict[str, jax.Array]) -> jax.Array:
      inputs = [head_inputs(config, params, part, **options) for params in models]
      return measure(inputs, choose_chunk(count_device_rows(inputs[0][0].shape[0], options.get("mesh"))))

    parts = jax.tree.map(lambda x: x.reshape(computation.accumulation, -1, *x.shape[1:]), batch)
    return jnp.sum(jax.lax.map(sum_part, parts), axis=0)

  # Replicated, because every process reads them.
  return jax.jit(sums, out_shardings=NamedSharding(computation.mesh, P()))
