"""`nuslerp`: interpolates along the arc between two models or between their task vectors."""

from typing import Any

import jax

from imm_jax.merging import arcs, kernels, statistics
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option, Settings, stack
from imm_jax.merging.registry import method
from imm_jax.merging.statistics import Source

# Only vectors of the same direction are treated as collinear.
_COLLINEAR = 1.0


def _arc_position(settings: Settings, name: str) -> Any:
  """Returns the second model's share of the sum of the weights."""
  first, second = settings.value("weights", name)
  total = first + second
  xp = statistics.namespace(total)
  safe = abs(total) >= 1e-6
  return xp.where(safe, second / xp.where(safe, total, 1.0), 0.5)


def _prepare(source: Source, settings: Settings) -> tuple[Any, dict[str, Any]]:
  static = {"has_base": source.has_base, "axis": _axis(settings)}
  if static["axis"] is not None:
    return (lambda name: {"share": stack([_arc_position(settings, name)])[0]}), static
  coefficients = {name: stack(arcs.slerp_coefficients(_arc_position(settings, name), cosine[0, 1], _COLLINEAR))
                  for name, (_, cosine) in statistics.cosines(
               source, statistics.task_vectors if source.has_base else statistics.models).items()}
  return (lambda name: {"coefficients": coefficients[name]}), static


def _axis(settings: Settings) -> int | None:
  return None if settings["flatten"] else -2 if settings["row_wise"] else -1


@method("base?", "models", min_models=2, max_models=2, prepare=_prepare, measures=True,
        whole=lambda settings: {None: None, -1: "row", -2: "tensor"}[_axis(settings)], options=(
            Option("weights", "w; the point lies at w_2 / (w_1 + w_2) of the arc", per_model=True, key="weight"),
            Option("flatten", "treat each tensor as one vector", True, "flag", key="nuslerp_flatten"),
            Option("row_wise", "without flatten: a vector has one index on the last axis; else it is a row", False,
                   "flag", key="nuslerp_row_wise")))
def nuslerp(tensors: Tensors, numbers: Numbers, shared: Shared, *, has_base: bool, axis: int | None) -> jax.Array:
  """Interpolates along the arc between two models, or with a base between their task vectors (NuSLERP).

  Like `slerp`, with weights in place of t, and linearly only if the vectors have the same direction.

  >>> import jax.numpy as jnp
  >>> nuslerp([{"w": jnp.array([1., 0.])}, {"w": jnp.array([0., 1.])}], weights=[1, 1])["w"].round(4).tolist()
  [0.707099974155426, 0.707099974155426]
  """
  if axis is None:
    return arcs.combine(tensors, numbers, shared, has_base=has_base)
  vectors = statistics.task_vectors(tensors) if has_base else list(tensors)
  shape = vectors[0].shape
  flat = [kernels.flatten_rows(v) for v in vectors]
  _, cosine = arcs.lengths_and_cosines(flat, axis if flat[0].ndim > 2 else -1)
  position = numbers["share"].reshape(-1, *(1,) * (flat[0].ndim - 1))
  terms = zip(flat, arcs.slerp_coefficients(position, cosine[0, 1], _COLLINEAR), strict=True)
  mixed = kernels.add([kernels.pin(v * c, shared) for v, c in terms]).reshape(shape)
  return tensors[0] + mixed if has_base else mixed
