"""`passthrough`: copies a model."""

import jax

from imm_jax.merging import kernels
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option
from imm_jax.merging.registry import method


@method("models", max_models=1, options=(Option("scales", "a factor", 1.0, per_model=True, key="scale"),))
def passthrough(tensors: Tensors, numbers: Numbers, shared: Shared) -> jax.Array:
  """Copies one model times a factor: s t. With slices in a recipe it restacks layers of several models.

  >>> import jax.numpy as jnp
  >>> passthrough([{"a": jnp.ones(1), "b": jnp.ones(1)}], scales={"a": 0.5, "b": 1.0})
  {'a': Array([0.5], dtype=float32), 'b': Array([1.], dtype=float32)}
  """
  return kernels.pin(tensors[0] * numbers["scales"][0], shared)
