"""Products of activations with weights, in the manner that is fast and exact on each platform."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from imm_jax.model.blockwise import precision

# Terms of a sum that `short_sums` leaves together.
_PART = 192
_short: contextvars.ContextVar[bool] = contextvars.ContextVar("short_sums", default=False)
_weights_first: contextvars.ContextVar[bool] = contextvars.ContextVar("weights_first", default=False)


@contextlib.contextmanager
def short_sums() -> Iterator[None]:
  """Has what is traced in this block cut the sums of float32 products into parts, which are added in pairs.

  XLA's CPU backend adds the terms of a sum one after the other: for 1536 of them it errs 2.7 times as much as torch,
  and a model's few very large activations carry that on. To cut all sums takes 13 % of a forward pass's time there,
  11 % of a training step's, and nearly doubles the time of a decoding step and the weights' memory in sampling, so only
  what compares with another program does it.
  """
  token = _short.set(True)
  try:
    yield
  finally:
    _short.reset(token)


@contextlib.contextmanager
def weights_first() -> Iterator[None]:
  """Has what is traced in this block multiply W by rows, in place of rows by W, where that is faster: on CPUs.

  Their library copies its right operand into another order at each call. For the few rows of a decoding step that is
  much beside the product itself, unless the rows are that operand: of SmolLM2-135M's weights, 8 rows take 0.65 times
  the processor time, 32 rows 0.8, 128 rows 0.93.
  """
  token = _weights_first.set(True)
  try:
    yield
  finally:
    _weights_first.reset(token)


def dot(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
  """Multiplies rows by a weight: x W^T, accumulated in float32; so is the gradient of W, in W's own dtype.

  Args:
    x: [..., in], in the compute dtype.
    weight: W [out, in], of any dtype; it is cast to that of x.
    out_dtype: of the result; None for that of x.

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
  # The product itself, not `_linear`: policies of `jax.checkpoint` do not look into the latter.
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
  """x [..., in] times W [out, in] transposed, in float32."""
  length, last = x.shape[-1], x.ndim - 1
  if not _short.get() or x.dtype != jnp.float32:
    rows_first = lambda x, weight: _contract(x, weight, last, 1)
    if not _weights_first.get():
      return rows_first(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=_weight_by_rows, default=rows_first)
  parts = [_contract(jax.lax.slice_in_dim(x, begin, min(begin + _PART, length), axis=last),
                     jax.lax.slice_in_dim(weight, begin, min(begin + _PART, length), axis=1), last, 1)
           for begin in range(0, length, _PART)]
  while len(parts) > 1:  # in pairs, so that this sum is short too
    parts = [sum(parts[i + 1:i + 2], parts[i]) for i in range(0, len(parts), 2)]
  return parts[0]


def _weight_by_rows(x: jax.Array, weight: jax.Array) -> jax.Array:
  """`_project` as W x^T; the barriers keep XLA from swapping the operands back."""
  rows = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
  return jax.lax.optimization_barrier(_contract(weight, rows, 1, 0)).T.reshape(*x.shape[:-1], -1)


def _contract(a: jax.Array, b: jax.Array, a_dims: int | tuple[int, ...], b_dims: int | tuple[int, ...]) -> jax.Array:
  dims = tuple((d,) if isinstance(d, int) else d for d in (a_dims, b_dims))
  return jax.lax.dot_general(a, b, (dims, ((), ())), precision=precision(a.dtype),
                             preferred_element_type=jnp.float32)
