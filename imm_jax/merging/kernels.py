"""Arithmetic shared by the methods: computed in float32 from the stored values and rounded once.

A kernel is the function that a file of `methods/` registers. It takes

- `tensors`: the leaf of every model in float32, [L, ...] (L stacked tensors of equal shape, or one);
- `numbers`: the tensors' settings: `numbers["t"]` is an array [L, 1, ...] that broadcasts against the tensors, or a
  tuple with one such array for each model;
- `shared`: values common to all tensors, for `pin`, `divide` and `drop_mask`: the key's words, `first` (row and column
  where a block begins), `zero`, and `half` if the block has only every second column;
- flags and choices as keyword arguments, which are static under jit.

The same kernels run on blocks streamed from files and on trees in memory.

A compiler may fuse a product into a sum, which rounds once instead of twice, and decides so anew for every shape and
layout. Products that enter a sum are pinned so that the bits do not depend on that decision.
"""

import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from imm_jax.merging import masks

Tensors = tuple[jax.Array, ...]
Shared = Mapping[str, Any]


class KernelError(ValueError):
  """Reports a mistake in a method's kernel."""


class Numbers:
  """Holds the settings of stacked tensors, shaped to broadcast against them."""

  def __init__(self, values: Mapping[str, jax.Array], rank: int):
    """Takes arrays [L] or [L, n] and the rank of the tensors [L, ...]."""
    self._values, self._rank = values, rank

  def __getitem__(self, name: str) -> Any:
    if name not in self._values:
      raise KernelError(f"numbers has {', '.join(map(repr, self._values)) or 'nothing'}, not {name!r}")
    value = self._values[name]
    if value.ndim == 1:
      return value.reshape(-1, *(1,) * (self._rank - 1))
    return tuple(value[:, i].reshape(-1, *(1,) * (self._rank - 1)) for i in range(value.shape[1]))


def call(kernel: Callable[..., jax.Array], tensors: Tensors, numbers: Mapping[str, jax.Array], shared: Shared,
         static: Mapping[str, Any]) -> jax.Array:
  """Calls a kernel.

  Raises:
    KernelError: if it asks for a number that there is not, or returns something else than an array of floats of the
      tensors' shape; for a kernel of the user's also if it raises anything.
  """
  expected = f"an array of floats {tensors[0].shape}"
  try:
    merged = kernel(tensors, Numbers(numbers, tensors[0].ndim), shared, **static)
  except KernelError as e:
    raise KernelError(f"{kernel.__name__}: {e}") from None
  except Exception as e:
    if not is_users(kernel):
      raise
    lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == find_file(kernel)]
    raise KernelError(f"{find_file(kernel)}{f':{lines[-1]}' if lines else ''}: {kernel.__name__} raised "
                      f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}") from e
  if not isinstance(merged, jax.Array):
    raise KernelError(f"{kernel.__name__} returned {'nothing' if merged is None else type(merged).__name__}, expected "
                      f"{expected}")
  if merged.shape != tensors[0].shape or not jnp.issubdtype(merged.dtype, jnp.floating):
    raise KernelError(f"{kernel.__name__} returned {merged.dtype} {merged.shape}, expected {expected}")
  return merged


def is_users(kernel: Callable[..., Any]) -> bool:
  """Returns whether a kernel is not one of this package."""
  return not (kernel.__module__ or "").startswith("imm_jax.")


def find_file(kernel: Callable[..., Any]) -> str:
  """Returns the path of the file that a kernel is written in."""
  code = getattr(inspect.unwrap(kernel), "__code__", None)
  return code.co_filename if code else kernel.__module__


def add(terms: Sequence[jax.Array]) -> jax.Array:
  """Adds arrays from left to right."""
  return sum(terms[1:], terms[0])


def drop_mask(shape: tuple[int, ...], code: jax.Array, steps: jax.Array, shared: Shared,
              model: int | None = None) -> jax.Array:
  """Returns which entries DARE drops: those whose draw is below `steps`. With `model` each model has its own mask."""
  return draw_uint16(shape, code, shared, model) < steps


def draw_uint16(shape: tuple[int, ...], code: jax.Array, shared: Shared, model: int | None = None) -> jax.Array:
  """Draws uniform integers in [0, 65536); see `masks.draw_uint16`."""
  words = (shared["key"][0], shared["key"][1])
  if model is not None:
    words = masks.fold_in(words, jnp.uint32(model))
  return masks.draw_uint16(words, code, shape, shared["first"], shared.get("half"))


def flatten_rows(tensor: jax.Array) -> jax.Array:
  """Reshapes stacked tensors of rank above 3 to [layers, rows, columns]; lower ranks are returned as they are."""
  return tensor.reshape(*tensor.shape[:2], math.prod(tensor.shape[2:])) if tensor.ndim > 3 else tensor


def magnitude_bits(x: jax.Array) -> jax.Array:
  """Returns the bits of |x| as uint32, whose order is that of the magnitudes."""
  return jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.uint32)


def multiply_add(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
  """Computes a * b + c rounded once to float32, as torch's `addcmul_` does: the product is exact in float64."""
  with jax.enable_x64(True):
    wide = a.astype(jnp.float64) * b.astype(jnp.float64) + c.astype(jnp.float64)
    return wide.astype(jnp.float32)


@jax.custom_jvp
def substitute(where: jax.Array, exact: jax.Array, rounded: jax.Array) -> jax.Array:
  """Returns `exact` in place of a formula's rounded value where these are equal but for rounding.

  jax.grad follows the formula: `exact` may depend on fewer of its variables.
  """
  return jnp.where(where, exact, rounded)


@substitute.defjvp
def _(primals: tuple[jax.Array, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
  substituted = substitute(*primals)
  return substituted, jnp.broadcast_to(tangents[2], substituted.shape)


def pin(x: jax.Array, shared: Shared) -> jax.Array:
  """Returns x and forces its rounding: no fusion crosses an exclusive or with a zero that the compiler cannot see."""
  return _flip(x, _zero(x, shared))


def divide(x: jax.Array, divisor: jax.Array, shared: Shared) -> jax.Array:
  """Computes x / divisor, rounded once. The divisor appears to vary, so it is not replaced by its reciprocal."""
  return x / _flip(divisor, _to_bits(x) & _zero(x, shared))


def _zero(x: jax.Array, shared: Shared) -> jax.Array:
  """Returns a zero that the compiler cannot see: the caller's, an argument of the compiled program. Inside another
  program that would be a constant, so the zero is computed from the data: n (n + 1) is even."""
  if shared["zero"] is not None:
    return shared["zero"]
  bits = _to_bits(x)
  return (bits * (bits + 1)) & 1


@jax.custom_jvp
def _flip(x: jax.Array, zero: jax.Array) -> jax.Array:
  """Flips the bits of x that are set in `zero`, which are none: the identity, also under jax.grad."""
  return jax.lax.bitcast_convert_type(_to_bits(x) ^ zero, jnp.float32)


@_flip.defjvp
def _(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]) -> tuple[jax.Array, jax.Array]:
  flipped = _flip(*primals)
  return flipped, jnp.broadcast_to(tangents[0], flipped.shape)


def _to_bits(x: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x), jnp.uint32)
