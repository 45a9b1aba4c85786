"""Products of activations with weights, computed fast and accurately on each platform."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from imm_jax.model.blockwise import precision

# Terms that `pairwise_sums` adds up sequentially.
_CHUNK = 192
_pairwise: contextvars.ContextVar[bool] = contextvars.ContextVar("pairwise_sums", default=False)
_weights_first: contextvars.ContextVar[bool] = contextvars.ContextVar("weights_first", default=False)


@contextlib.contextmanager
def pairwise_sums() -> Iterator[None]:
  """Makes float32 products traced in this block use pairwise summation over chunks.

  XLA's CPU backend adds the terms of a sum sequentially: for 1536 of them its error is 2.7 times torch's, and a model's
  few very large activations propagate it. Pairwise summation costs 13 % of a forward pass's time there, 11 % of a
  training step's, and nearly doubles the time of a decoding step and the weights' memory in sampling, so it is used
  only in comparisons with other programs.
  """
  token = _pairwise.set(True)
  try:
    yield
  finally:
    _pairwise.reset(token)


@contextlib.contextmanager
def weights_first() -> Iterator[None]:
  """Makes products traced in this block compute W x^T in place of x W^T on CPUs, where that is faster.

  The CPU library repacks its right operand at each call. For the few rows of a decoding step that is expensive compared
  with the product itself, unless the rows are that operand: with SmolLM2-135M's weights, 8 rows take 0.65 times the
  processor time, 32 rows 0.8, 128 rows 0.93.
  """
  token = _weights_first.set(True)
  try:
    yield
  finally:
    _weights_first.reset(token)


def dot(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
  """Multiplies rows by a weight, x W^T, accumulated in float32, as is the gradient of W, which has W's dtype.

  Args:
    x: [..., in], in the compute dtype.
    weight: W [out, in] of any dtype; it is cast to that of x.
    out_dtype: dtype of the result; None for that of x.

  Returns:
    [..., out].

  >>> dot(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])).tolist()
  [[11.0, 17.0, 23.0]]
  """
  return _linear(x, weight, jnp.dtype(out_dtype or x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
  return _project(x, weight.astype(x.dtype)).astype(out_dtype)


def _linear_forward(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype):
  # Not `_linear`: policies of `jax.checkpoint` do not see products inside a custom_vjp.
  return _project(x, weight.astype(x.dtype)).astype(out_dtype), (x, weight)


def _linear_backward(out_dtype: jnp.dtype, residuals: tuple[jax.Array, jax.Array], g: jax.Array):
  del out_dtype
  x, weight = residuals
  g = g.astype(x.dtype)
  rows = tuple(range(x.ndim - 1))
  return (_contract(g, weight.astype(x.dtype), x.ndim - 1, 0).astype(x.dtype),
          _contract(g, x, rows, rows).astype(weight.dtype))


_linear.defvjp(_linear_forward, _linear_backward)


def _project(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Multiplies x [..., in] by the transpose of W [out, in], in float32."""
  length, last = x.shape[-1], x.ndim - 1
  if not _pairwise.get() or x.dtype != jnp.float32:
    rows_first = lambda x, weight: _contract(x, weight, last, 1)
    if not _weights_first.get():
      return rows_first(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=_weight_by_rows, default=rows_first)
  parts = [_contract(jax.lax.slice_in_dim(x, begin, min(begin + _CHUNK, length), axis=last),
                     jax.lax.slice_in_dim(weight, begin, min(begin + _CHUNK, length), axis=1), last, 1)
           for begin in range(0, length, _CHUNK)]
  while len(parts) > 1:
    parts = [sum(parts[i + 1:i + 2], parts[i]) for i in range(0, len(parts), 2)]
  return parts[0]


def _weight_by_rows(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Computes `_project` as W x^T; the barriers prevent XLA from swapping the operands back."""
  rows = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
  return jax.lax.optimization_barrier(_contract(weight, rows, 1, 0)).T.reshape(*x.shape[:-1], -1)


def _contract(a: jax.Array, b: jax.Array, a_dims: int | tuple[int, ...], b_dims: int | tuple[int, ...]) -> jax.Array:
  dims = tuple((d,) if isinstance(d, int) else d for d in (a_dims, b_dims))
  return jax.lax.dot_general(a, b, (dims, ((), ())), precision=precision(a.dtype),
                             preferred_element_type=jnp.float32)
