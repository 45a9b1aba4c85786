"""Sums over the tokens of packed texts, of what one model or several predict; there is no backward pass."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from imm_jax import progress
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params
from imm_jax.training import fsdp
from imm_jax.training.input import Input
from imm_jax.training.loss import chunk_of
from imm_jax.training.packing import PackedBatches
from imm_jax.training.step import head_inputs, rows_of_device

# Of a model: what its head reads, the head, targets and weights, as `step.head_inputs` gives them.
Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
# (inputs of each model, positions whose logits exist at once) -> sums over a batch, float32 [N].
Measure = Callable[[Sequence[Inputs], int], jax.Array]


def over(measure: Measure, config: ModelConfig, models: Sequence[Params], batches: PackedBatches, *, mesh: Mesh,
         compute_dtype: jnp.dtype, attention: str = "xla", accumulation: int = 1, label: str) -> np.ndarray:
  """The sums of a measure over all batches, float64 [N].

  Args:
    measure: a function of a module, so that it is compiled once for all calls.
    config: of the models, which are of one shape.
    models: parameters with stacked layers, placed by `sharding.RULES`.
    batches: prompts and responses, once: packed with `epochs=1`.
    mesh: devices.
    compute_dtype: dtype of activations.
    attention: what `attention.choose_backend` gave.
    accumulation: parts that a batch is run in.
    label: what the progress bar says.
  """
  program = _program(measure, config, mesh, compute_dtype, attention, accumulation)
  total, before = 0.0, None
  with progress.bar(len(batches), label, "batch") as bar:
    for batch in Input(batches, mesh):
      found = program(tuple(models), batch)
      if before is not None:
        total = total + np.asarray(before, np.float64)
      before = found  # the host is one batch ahead
      bar.update()
  return total + np.asarray(before, np.float64)


@functools.lru_cache(maxsize=8)  # a run comes here in every round
def _program(measure: Measure, config: ModelConfig, mesh: Mesh, compute_dtype: jnp.dtype, attention: str,
             accumulation: int) -> Callable[[tuple[Params, ...], dict[str, jax.Array]], jax.Array]:
  """Compiled: (models, batch) -> sums."""
  options = {"compute_dtype": compute_dtype, "attention": attention}
  if mesh.size > 1:
    options |= {"mesh": mesh, "gather": fsdp.constrained(mesh, compute_dtype)}

  def sums(models: tuple[Params, ...], batch: dict[str, jax.Array]) -> jax.Array:

    def of_part(part: dict[str, jax.Array]) -> jax.Array:
      inputs = [head_inputs(config, params, part, **options) for params in models]
      return measure(inputs, chunk_of(rows_of_device(inputs[0][0].shape[0], options.get("mesh"))))

    parts = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)
    return jnp.sum(jax.lax.map(of_part, parts), axis=0)

  return jax.jit(sums, out_shardings=NamedSharding(mesh, P()))  # every process reads them
