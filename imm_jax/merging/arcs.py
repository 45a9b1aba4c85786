"""Shared code of the spherical methods: linear combinations of tensors whose coefficients follow from their angles.

Every point on an arc between vectors is a linear combination of them, so only their lengths and cosines are needed.
"""

from collections.abc import Callable, Sequence
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
# Above this cosine two vectors count as collinear: sin(theta) is too small to divide by, so the arc becomes a chord.
COLLINEAR = 0.9995


def prepare(coefficients: Coefficients, *, use_task_vectors: bool = False) -> Prepare:
  """Returns a `prepare` that measures angles and computes each tensor's coefficients from them.

  With `use_task_vectors` the angles are those between task vectors, where the source has a base.
  """

  def prepare_merge(source: Source, settings: Settings) -> tuple[Any, dict[str, Any]]:
    has_base = use_task_vectors and source.has_base
    measured = statistics.cosines(source, statistics.task_vectors if has_base else statistics.models)
    by_name = {name: coefficients(*angles, settings, name) for name, angles in measured.items()}
    return (lambda name: {"coefficients": by_name[name]}), {"has_base": has_base}

  return prepare_merge


def slerp_coefficients(t: Any, cosine: Any, limit: float = COLLINEAR) -> tuple[Any, Any]:
  """Returns the coefficients of two vectors for the point at `t` on the arc from the first to the second.

  (sin((1 - t) theta), sin(t theta)) / sin(theta), where theta is the angle; (1 - t, t) where |cosine| >= limit.
  """
  xp = statistics.namespace(t, cosine)
  straight = abs(cosine) >= limit
  theta = xp.arccos(xp.where(straight, 0.0, cosine))
  arc = lambda part: xp.sin(part * theta) / xp.sin(theta)
  return xp.where(straight, 1 - t, arc(1 - t)), xp.where(straight, t, arc(t))


def combine(tensors: Tensors, numbers: Numbers, shared: Shared, *, has_base: bool) -> jax.Array:
  """Computes sum_i c_i t_i, or base + sum_i c_i (t_i - base) with a base."""
  vectors = statistics.task_vectors(tensors) if has_base else list(tensors)
  mixed = kernels.add([kernels.pin(v * c, shared) for v, c in zip(vectors, numbers["coefficients"], strict=True)])
  return tensors[0] + mixed if has_base else mixed


def lengths_and_cosines(vectors: Sequence[jax.Array], axis: int) -> tuple[jax.Array, jax.Array]:
  """Computes lengths [n, L, ...] and cosines [n, n, L, ...] of vectors that lie along an axis of [L, rows, columns].

  That axis is kept with size 1, so that coefficients computed from these broadcast against the tensors.
  """
  with jax.enable_x64(True):
    vectors64 = jnp.stack([vector.astype(jnp.float64) for vector in vectors])
    grid = jnp.stack([jnp.sum(vectors64 * one, axis=axis, keepdims=True) for one in vectors64])
    squares = jnp.stack([grid[i, i] for i in range(len(vectors))])
    lengths = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    norms = lengths[:, None] * lengths[None]
    cosine = jnp.where(norms > 0, grid / jnp.where(norms > 0, norms, 1.0), 0.0)
    return lengths.astype(jnp.float32), jnp.clip(cosine, -1, 1).astype(jnp.float32)
