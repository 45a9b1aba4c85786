"""`fisher`: a mean weighted entry by entry."""

import jax
import jax.numpy as jnp

from imm_jax.merging import kernels
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option
from imm_jax.merging.registry import method


@method("models", "fishers", reference="https://arxiv.org/abs/2111.09832", options=(
    Option("weights", "w", 1.0, per_model=True, key="weight", low=0),
    Option("floor", "added to each Fisher entry; where all are this small the mean is unweighted", 1e-10, low=0)))
def fisher(tensors: Tensors, numbers: Numbers, shared: Shared) -> jax.Array:
  """Averages models weighted entry by entry with the diagonal of each one's Fisher matrix (Fisher merging).

  sum_i w_i F_i t_i / sum_i w_i F_i. An estimate of F is the sum of squared per-example gradients, the second result of
  `imm_jax.training.gradients.gradient_and_squares`.

  >>> import jax.numpy as jnp
  >>> a, b = {"w": jnp.array([0., 0.])}, {"w": jnp.array([4., 4.])}
  >>> fisher([a, b], [{"w": jnp.array([1., 3.])}, {"w": jnp.array([1., 1.])}])["w"].tolist()
  [2.0, 1.0]
  """
  count = len(tensors) // 2
  weights = [kernels.pin(w * (f + numbers["floor"]), shared)
             for w, f in zip(numbers["weights"], tensors[count:], strict=True)]
  mixed = kernels.add([kernels.pin(w * t, shared) for w, t in zip(weights, tensors[:count], strict=True)])
  total = kernels.add(weights)
  return jnp.where(total > 0, mixed / jnp.where(total > 0, total, 1.0), kernels.add(tensors[:count]) / count)
