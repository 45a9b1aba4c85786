"""The arithmetic that methods share: float32 from what is stored, rounded once.

A kernel, the function that a file of `methods/` registers, takes

- `tensors`: the leaf of every model in float32, [L, ...] (L tensors of equal shape, or one);
- `numbers`: each tensor's settings, `numbers["t"]` an array [L, 1, ...] that broadcasts against the tensors, and for a
  setting of several models a tuple of such;
- `shared`: what is the same for all tensors: the key's words, `first` (row and column where a block begins), `zero`,
  and `half` where only every second column is there; for `pin`, `divide` and `dropped`;
- flags and choices by name, which are known when it is compiled.

A file streamed in blocks and a tree in memory run the same kernels.

A compiler may fuse a product and a sum, which rounds once instead of twice, and it chooses anew for every shape and
layout. So that bits do not depend on that choice, products that meet a sum are pinned.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from imm_jax.merging import masks

Tensors = tuple[jax.Array, ...]
Shared = Mapping[str, Any]


class Numbers:
  """The settings of stacked tensors, in a form that broadcasts against them."""

  def __init__(self, scalars: Mapping[str, jax.Array], rank: int):
    """Takes arrays [L] or [L, n] and the rank of the tensors [L, ...]."""
    self._scalars, self._rank = scalars, rank

  def __getitem__(self, name: str) -> Any:
    value = self._scalars[name]
    if value.ndim == 1:
      return value.reshape(-1, *(1,) * (self._rank - 1))
    return tuple(value[:, i].reshape(-1, *(1,) * (self._rank - 1)) for i in range(value.shape[1]))


def add(terms: Sequence[jax.Array]) -> jax.Array:
  """Their sum, from left to right."""
  return sum(terms[1:], terms[0])


def dropped(shape: tuple[int, ...], code: jax.Array, steps: jax.Array, shared: Shared,
            model: int | None = None) -> jax.Array:
  """Which entries DARE drops: those whose draw is below `steps`; each model of several draws its own."""
  return draws(shape, code, shared, model) < steps


def draws(shape: tuple[int, ...], code: jax.Array, shared: Shared, model: int | None = None) -> jax.Array:
  """Uniform draws in [0, 65536), see `masks.draws`."""
  words = (shared["key"][0], shared["key"][1])
  if model is not None:
    words = masks.fold_in(words, jnp.uint32(model))
  return masks.draws(words, code, shape, shared["first"], shared.get("half"))


def by_row(tensor: jax.Array) -> jax.Array:
  """[layers, rows, columns] of a block of tensors of any more axes; a lesser rank stays. Axes may be empty."""
  return tensor.reshape(*tensor.shape[:2], math.prod(tensor.shape[2:])) if tensor.ndim > 3 else tensor


def magnitude_bits(x: jax.Array) -> jax.Array:
  """The bits of |x|, which as uint32 are in the order of the magnitudes."""
  return jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.uint32)


def multiply_add(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
  """a * b + c, rounded once to float32, as torch's `addcmul_` does: the product is exact in float64."""
  with jax.enable_x64(True):
    wide = a.astype(jnp.float64) * b.astype(jnp.float64) + c.astype(jnp.float64)
    return wide.astype(jnp.float32)


def pin(x: jax.Array, shared: Shared) -> jax.Array:
  """x, rounded: no fusion looks through the exclusive or with a zero that the compiler cannot know to be one."""
  return _flip(x, _zero(x, shared))


def divide(x: jax.Array, divisor: jax.Array, shared: Shared) -> jax.Array:
  """x / divisor, rounded once: a divisor that seems to vary by entry is not replaced by a factor."""
  return x / _flip(divisor, _to_bits(x) & _zero(x, shared))


def _zero(x: jax.Array, shared: Shared) -> jax.Array:
  """The caller's zero, an argument of the compiled program; within another program, where it would be a constant, one
  made of the data: n (n + 1) is even."""
  if shared["zero"] is not None:
    return shared["zero"]
  bits = _to_bits(x)
  return (bits * (bits + 1)) & 1


@jax.custom_jvp
def _flip(x: jax.Array, zero: jax.Array) -> jax.Array:
  """x with the bits of zero flipped, which are none: the identity, also to jax.grad."""
  return jax.lax.bitcast_convert_type(_to_bits(x) ^ zero, jnp.float32)


@_flip.defjvp
def _(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]) -> tuple[jax.Array, jax.Array]:
  flipped = _flip(*primals)
  return flipped, jnp.broadcast_to(tangents[0], flipped.shape)


def _to_bits(x: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x), jnp.uint32)
