"""`task_arithmetic`: a weighted sum of task vectors."""

import jax

from imm_jax.merging import deltas
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.registry import method


@method("base", "models", reference="https://arxiv.org/abs/2212.04089", prepare=deltas.prepare, options=(
    deltas.WEIGHTS, deltas.SCALE, deltas.NORMALIZE))
def task_arithmetic(tensors: Tensors, numbers: Numbers, shared: Shared, *, normalize: bool) -> jax.Array:
  """Adds weighted task vectors to a base: base + scale * sum_i w_i (t_i - base).

  >>> import jax.numpy as jnp
  >>> task_arithmetic({"w": jnp.ones(1)}, [{"w": jnp.zeros(1)}, {"w": jnp.full(1, 3.)}], weights=[1, 2])["w"].tolist()
  [4.0]
  """
  return deltas.combine(tensors, numbers, shared, sparsify=None, normalize=normalize)
