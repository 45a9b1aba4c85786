"""What the methods share that go along arcs: sums of tensors with coefficients that follow from their angles.

Every point of an arc between vectors is a sum of them, so their lengths and cosines are all that must be known.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from imm_jax.merging import kernels, statistics
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Settings
from imm_jax.merging.registry import Prepare
from imm_jax.merging.statistics import Source

# (lengths [n], cosines [n, n], settings, tensor) -> coefficients [n]
Coefficients = Callable[[Any, Any, Settings, str], Any]
# Vectors whose cosine is larger are taken to lie on one line: the arc is a chord, and its sine no divisor.
ONE_LINE = 0.9995


def prepare(coefficients: Coefficients, *, of_deltas: bool = False) -> Prepare:
  """Measures angles, with `of_deltas` of task vectors where there is a base, and finds each tensor's coefficients."""

  def of(source: Source, settings: Settings) -> tuple[Any, dict[str, Any]]:
    has_base = of_deltas and source.has_base
    found = {name: coefficients(lengths, cosine, settings, name) for name, (lengths, cosine) in statistics.cosines(
        source, statistics.task_vectors if has_base else statistics.models).items()}
    return (lambda name: {"coefficients": found[name]}), {"has_base": has_base}

  return of


def between(share: Any, cosine: Any, limit: float = ONE_LINE) -> tuple[Any, Any]:
  """Coefficients of two vectors for the point at `share` of the arc from the first to the second.

  (sin((1 - s) theta), sin(s theta)) / sin(theta), theta the angle; (1 - s, s) where |cosine| >= limit.
  """
  xp = statistics.namespace(share, cosine)
  straight = abs(cosine) >= limit
  theta = xp.arccos(xp.where(straight, 0.0, cosine))
  arc = lambda part: xp.sin(part * theta) / xp.sin(theta)
  return xp.where(straight, 1 - share, arc(1 - share)), xp.where(straight, share, arc(share))


def combine(tensors: Tensors, numbers: Numbers, shared: Shared, *, has_base: bool) -> jax.Array:
  """sum_i c_i t_i, or base + sum_i c_i (t_i - base)."""
  vectors = statistics.task_vectors(tensors) if has_base else list(tensors)
  mixed = kernels.add([kernels.pin(v * c, shared) for v, c in zip(vectors, numbers["coefficients"], strict=True)])
  return tensors[0] + mixed if has_base else mixed


def along(vectors: Tensors, axis: int) -> tuple[jax.Array, jax.Array]:
  """Lengths [n, L, ...] and cosines [n, n, L, ...] of what lies along an axis of [L, rows, columns].

  The axis keeps one entry, so that coefficients made of these broadcast against the tensors.
  """
  with jax.enable_x64(True):
    wide = jnp.stack([vector.astype(jnp.float64) for vector in vectors])
    grid = jnp.stack([jnp.sum(wide * one, axis=axis, keepdims=True) for one in wide])
    squares = jnp.stack([grid[i, i] for i in range(len(vectors))])
    lengths = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    norms = lengths[:, None] * lengths[None]
    cosine = jnp.where(norms > 0, grid / jnp.where(norms > 0, norms, 1.0), 0.0)
    return lengths.astype(jnp.float32), jnp.clip(cosine, -1, 1).astype(jnp.float32)
