"""`multislerp`: a weighted mean of several models on a sphere."""

from typing import Any

import jax

from imm_jax.merging import arcs, statistics
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option, Settings, stack
from imm_jax.merging.registry import method


def _coefficients(lengths: Any, cosine: Any, settings: Settings, name: str) -> Any:
  weights = settings.value("weights", name)
  if len(lengths) == 1:
    return stack([1.0])
  xp = statistics.namespace(weights, lengths)
  if settings["normalize_weights"]:
    total = weights.sum()
    if not isinstance(total, jax.Array) and abs(total) < 1e-8:
      raise ValueError(f"weights: they add up to 0 at {name!r}, which cannot be normalized; give others, or "
                       "normalize_weights=False")
    weights = weights / total
  # Inner products of the unit vectors, with 0 for zero vectors. All vectors below are linear combinations of them.
  nonzero = xp.where(lengths > 0, 1.0, 0.0)
  inner = cosine * nonzero[:, None] * nonzero[None] + xp.diag(nonzero - xp.diag(cosine * nonzero))
  length = _safe_sqrt(xp, weights @ inner @ weights)
  if isinstance(length, jax.Array) or length >= 1e-8:
    mean = weights / xp.maximum(length, 1e-12)
  elif len(lengths) == 2 or not lengths.any():
    return weights  # two opposite vectors, or only zeros: interpolate linearly
  else:
    raise ValueError(f"weights: the weighted directions at {name!r} cancel, so that they have no mean on the sphere; "
                     "give others")
  dots = inner @ mean
  tangent = weights - (weights * dots).sum() * mean
  angle = _safe_sqrt(xp, tangent @ inner @ tangent) + settings["eps"]
  units = mean * xp.cos(angle) + tangent * (xp.sin(angle) / angle)
  return units * (lengths * weights).sum() / xp.where(lengths > 0, lengths, 1.0)


def _safe_sqrt(xp: Any, square: Any) -> Any:
  """Takes the square root of a number that only rounding makes negative; at 0 it has derivative 0."""
  return xp.where(square > 0, xp.sqrt(xp.where(square > 0, square, 1.0)), 0.0)


@method("base?", "models", reference="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea", measures=True,
        prepare=arcs.prepare(_coefficients, use_task_vectors=True), options=(
            Option("weights", "w", per_model=True, key="weight"),
            Option("normalize_weights", "divide the weights by their sum", True, "flag"),
            Option("eps", "added to angles to keep them from being 0", 1e-8, "constant")))
def multislerp(tensors: Tensors, numbers: Numbers, shared: Shared, *, has_base: bool) -> jax.Array:
  """Averages models, or with a base their task vectors, on a sphere (Multi-SLERP).

  With u_i = t_i / |t_i| and m their weighted mean scaled to length 1, the weighted mean of the tangents u_i - (u_i m) m
  is mapped back to the sphere as an arc from m, and scaled to the weighted mean length. A single model is returned as
  it is.

  >>> import jax.numpy as jnp
  >>> multislerp([{"w": jnp.array([2., 0.])}, {"w": jnp.array([0., 2.])}], weights=1)["w"].round(4).tolist()
  [1.414199948310852, 1.414199948310852]
  """
  return arcs.combine(tensors, numbers, shared, has_base=has_base)
