"""`nearswap`: takes from another model the entries that are close to the base."""

import jax
import jax.numpy as jnp

from imm_jax.merging import kernels
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option
from imm_jax.merging.registry import method


@method("base", "other", reference="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001", options=(
    Option("t", "the largest difference that is taken in full", low=0),))
def nearswap(tensors: Tensors, numbers: Numbers, shared: Shared) -> jax.Array:
  """Takes entries of another model that are close to the base, and a smaller share of those far from it.

  s other + (1 - s) base with s = min(1, t / max(|base - other|, 1e-6)), entry by entry.

  >>> import jax.numpy as jnp
  >>> nearswap({"w": jnp.zeros(3)}, {"w": jnp.array([0.5, 1., 4.])}, t=1)["w"].tolist()
  [0.5, 1.0, 1.0]
  """
  base, other = tensors
  t = jnp.minimum(numbers["t"] / jnp.maximum(jnp.abs(base - other), 1e-6), 1.0)
  return kernels.pin(t * other, shared) + kernels.pin((1 - t) * base, shared)
