"""`multislerp`, a weighted mean of several models on a sphere."""

from typing import Any

import jax

from imm_jax.merging import arcs, statistics
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option, Settings, stack
from imm_jax.merging.registry import method


def _coefficients(lengths: Any, cosine: Any, settings: Settings, name: str) -> Any:
  weights = settings.of("weights", name)
  if len(lengths) == 1:
    return stack([1.0])
  xp = statistics.namespace(weights, lengths)
  if settings["normalize_weights"]:
    total = weights.sum()
    if not isinstance(total, jax.Array) and abs(total) < 1e-8:
      raise ValueError(f"weights: they add up to 0 at {name!r}, which cannot be normalised; give others, or "
                       "normalize_weights=False")
    weights = weights / total
  # The unit vectors u_i have the inner products `cosine`; a zero one has none. Everything below is a sum of them.
  known = xp.where(lengths > 0, 1.0, 0.0)
  inner = cosine * known[:, None] * known[None] + xp.diag(known - xp.diag(cosine * known))
  length = _root(xp, weights @ inner @ weights)
  if isinstance(length, jax.Array) or length >= 1e-8:
    mean = weights / xp.maximum(length, 1e-12)
  elif len(lengths) == 2 or not lengths.any():
    return weights  # opposite vectors, or none: the straight line
  else:
    raise ValueError(f"weights: the weighted directions at {name!r} cancel, so that they have no mean on the sphere; "
                     "give others")
  dots = inner @ mean
  tangent = weights - (weights * dots).sum() * mean
  angle = _root(xp, tangent @ inner @ tangent) + settings["eps"]
  units = mean * xp.cos(angle) + tangent * (xp.sin(angle) / angle)
  return units * (lengths * weights).sum() / xp.where(lengths > 0, lengths, 1.0)


def _root(xp: Any, square: Any) -> Any:
  """Of what is not negative but for rounding; the root of 0 has no derivative, and counts as constant."""
  return xp.where(square > 0, xp.sqrt(xp.where(square > 0, square, 1.0)), 0.0)


@method("base?", "models", reference="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea", measures=True,
        prepare=arcs.prepare(_coefficients, of_deltas=True), options=(
            Option("weights", "w", per_model=True, key="weight"),
            Option("normalize_weights", "divide the weights by their sum", True, "flag"),
            Option("eps", "what keeps angles from being 0", 1e-8, "constant")))
def multislerp(tensors: Tensors, numbers: Numbers, shared: Shared, *, has_base: bool) -> jax.Array:
  """Averages models, or with a base their task vectors, on a sphere (Multi-SLERP).

  u_i = t_i / |t_i| and m their weighted mean brought to length 1; the weighted mean of u_i - (u_i m) m goes back to the
  sphere as an arc from m, and gets the weighted mean length. One model comes out as it is.

  >>> import jax.numpy as jnp
  >>> multislerp([{"w": jnp.array([2., 0.])}, {"w": jnp.array([0., 2.])}], weights=1)["w"].round(4).tolist()
  [1.414199948310852, 1.414199948310852]
  """
  return arcs.combine(tensors, numbers, shared, has_base=has_base)
