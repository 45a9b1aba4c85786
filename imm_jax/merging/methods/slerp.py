"""`slerp`: interpolates between two models along an arc."""

from typing import Any

import jax

from imm_jax.merging import arcs
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option, Settings, stack
from imm_jax.merging.registry import method

T = Option("t", "position on the arc: 0 is the base, 1 the other model")


def _coefficients(_: Any, cosine: Any, settings: Settings, tensor: str) -> Any:
  return stack(arcs.slerp_coefficients(settings.value("t", tensor), cosine[0, 1]))


@method("base", "other", reference="https://doi.org/10.1145/325334.325242", options=(T,),
        prepare=arcs.prepare(_coefficients), measures=True, strength="t")
def slerp(tensors: Tensors, numbers: Numbers, shared: Shared, *, has_base: bool) -> jax.Array:
  """Interpolates between two models along an arc, tensor by tensor (Shoemake 1985).

  (sin((1 - t) theta) base + sin(t theta) other) / sin(theta), where theta is the angle between the two tensors as
  vectors; linearly if |cos(theta)| >= 0.9995. A zero tensor counts as orthogonal to any other.

  >>> import jax.numpy as jnp
  >>> merged = slerp({"w": jnp.array([1., 0.])}, {"w": jnp.array([0., 1.])}, t=0.5)
  >>> merged["w"].round(4).tolist()
  [0.707099974155426, 0.707099974155426]
  """
  return arcs.combine(tensors, numbers, shared, has_base=has_base)
