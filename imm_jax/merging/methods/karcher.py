"""`karcher`: the Karcher mean of several models on a sphere."""

from typing import Any

import jax

from imm_jax.merging import arcs, statistics
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option, Settings, stack
from imm_jax.merging.registry import method


def _coefficients(lengths: Any, cosine: Any, settings: Settings, name: str) -> Any:
  del name
  xp, count, tol = statistics.namespace(lengths), len(lengths), settings["tol"]
  if count == 1:
    return stack([1.0])
  valid = lengths > tol
  weights = xp.where(valid, 1.0, 0.0) / xp.maximum(valid.sum(), 1)
  square = lambda v: v @ cosine @ v  # |sum_i v_i u_i|^2, of unit vectors u
  norm = lambda v: xp.sqrt(xp.where(square(v) > 0, square(v), 1.0)) * (square(v) > 0)
  safe = lambda x: xp.where(x > tol, x, 1.0)
  # All iterates are linear combinations of the unit vectors, so only their coefficients are iterated.
  first = xp.where(xp.arange(count) == xp.argmax(valid), 1.0, 0.0)
  mean = xp.where(norm(weights) < tol, first, weights / safe(norm(weights)))
  done = xp.zeros((), bool)
  for _ in range(settings["max_iter"]):
    dots = xp.clip(cosine @ mean, -1.0, 1.0)
    # The derivative of arccos is infinite at angles of 0 and pi, which do not contribute.
    inside = abs(dots) < 1 - 1e-12
    theta = xp.arccos(xp.where(inside, dots, 0.0))
    stretch = xp.where(inside & (theta >= tol), weights * theta / xp.sin(theta), 0.0)
    tangent = stretch - (stretch * dots).sum() * mean
    length = norm(tangent)
    done = done | (length < tol)
    next_mean = xp.cos(length) * mean + xp.sin(length) * tangent / safe(length)
    mean = xp.where(done, mean, next_mean / safe(norm(next_mean)))
  return lengths.mean() * mean / xp.where(lengths > 0, lengths, 1.0)


@method("models", reference="https://arxiv.org/abs/2603.04972", prepare=arcs.prepare(_coefficients), measures=True,
        options=(Option("max_iter", "maximum number of steps", 10, "integer", low=0),
                 Option("tol", "angles and lengths below this count as 0", 1e-5, "constant", low=0)))
def karcher(tensors: Tensors, numbers: Numbers, shared: Shared, *, has_base: bool) -> jax.Array:
  """Averages models along arcs: the Karcher mean of their directions on the sphere, times their mean length.

  Starting at the mean direction, m moves repeatedly along the mean of the tangents from m to each u_i = t_i / |t_i|,
  theta_i / sin(theta_i) (u_i - cos(theta_i) m). Zero tensors contribute to the length only.

  >>> import jax.numpy as jnp
  >>> karcher([{"w": jnp.array([1., 0.])}, {"w": jnp.array([0., 3.])}])["w"].round(4).tolist()
  [1.414199948310852, 1.414199948310852]
  """
  return arcs.combine(tensors, numbers, shared, has_base=has_base)
