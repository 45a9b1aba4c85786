"""`karcher`, the mean of several models along arcs."""

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
  share = xp.where(valid, 1.0, 0.0) / xp.maximum(valid.sum(), 1)
  square = lambda v: v @ cosine @ v  # |sum_i v_i u_i|^2, of unit vectors u
  norm = lambda v: xp.sqrt(xp.where(square(v) > 0, square(v), 1.0)) * (square(v) > 0)
  safe = lambda x: xp.where(x > tol, x, 1.0)
  # Everything is a sum of the unit vectors, so their coefficients are all that is iterated.
  first = xp.where(xp.arange(count) == xp.argmax(valid), 1.0, 0.0)
  mean = xp.where(norm(share) < tol, first, share / safe(norm(share)))
  done = xp.zeros((), bool)
  for _ in range(settings["max_iter"]):
    dot = xp.clip(cosine @ mean, -1.0, 1.0)
    # At an angle of 0 or pi the derivative of arccos is infinite; neither counts.
    inside = abs(dot) < 1 - 1e-12
    theta = xp.arccos(xp.where(inside, dot, 0.0))
    stretch = xp.where(inside & (theta >= tol), share * theta / xp.sin(theta), 0.0)
    tangent = stretch - (stretch * dot).sum() * mean
    length = norm(tangent)
    done = done | (length < tol)
    moved = xp.cos(length) * mean + xp.sin(length) * tangent / safe(length)
    mean = xp.where(done, mean, moved / safe(norm(moved)))
  return lengths.mean() * mean / xp.where(lengths > 0, lengths, 1.0)


@method("models", reference="https://arxiv.org/abs/2603.04972", prepare=arcs.prepare(_coefficients), measures=True,
        options=(Option("max_iter", "steps at most", 10, "integer", low=0),
                 Option("tol", "what counts as no angle and no length", 1e-5, "constant", low=0)))
def karcher(tensors: Tensors, numbers: Numbers, shared: Shared, *, has_base: bool) -> jax.Array:
  """Averages models along arcs: the Karcher mean of their directions on the sphere, times their mean length.

  From the mean direction m, again and again: m goes along the mean of what points from m to each u_i = t_i / |t_i|,
  theta_i / sin(theta_i) (u_i - cos(theta_i) m). Zero tensors count for the length alone.

  >>> import jax.numpy as jnp
  >>> karcher([{"w": jnp.array([1., 0.])}, {"w": jnp.array([0., 3.])}])["w"].round(4).tolist()
  [1.414199948310852, 1.414199948310852]
  """
  return arcs.combine(tensors, numbers, shared, has_base=has_base)
