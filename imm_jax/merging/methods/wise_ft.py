"""`wise_ft`: linear interpolation between a base and a tuned model."""

import jax

from imm_jax.merging import kernels
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option
from imm_jax.merging.registry import method


@method("base", "other", reference="https://arxiv.org/abs/2109.01903", strength="alpha", options=(
    Option("alpha", "the weight of the tuned model; 0 is the base", low=0, high=1),))
def wise_ft(tensors: Tensors, numbers: Numbers, shared: Shared) -> jax.Array:
  """Interpolates linearly between a base and a model tuned from it (WiSE-FT): (1 - alpha) base + alpha other.

  >>> import jax.numpy as jnp
  >>> wise_ft({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, alpha=0.25)["w"].tolist()
  [0.25, 0.25]
  """
  base, other = tensors
  alpha = numbers["alpha"]
  return kernels.pin((1 - alpha) * base, shared) + kernels.pin(alpha * other, shared)
