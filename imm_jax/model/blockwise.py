"""Attention over packed rows, a block of queries at a time, for machines without an attention kernel.

Scores exist for one block of queries and the keys up to its end: what the causal mask hides as a whole is not
computed, and the backward pass computes scores again from what the forward pass keeps, its output and one number a
query (Dao et al. 2022, https://arxiv.org/abs/2205.14135).

Axes: B batch, T length, S keys of a block, H heads, K key/value heads, G = H / K, t queries of a block, h head dim.
"""

import functools

import jax
import jax.numpy as jnp

# Queries of a block, and how many blocks a row has at most: each is compiled on its own.
BLOCK, MOST = 128, 16


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise(q: jax.Array, k: jax.Array, v: jax.Array, until: jax.Array, scale: float | None = None) -> jax.Array:
  """Causal attention; scores and softmax are float32.

  Args:
    q: [B, H, T, h].
    k: [B, K, T, h].
    v: [B, K, T, h].
    until: int32 [B, T], the last position that sees each key; that key's own, or a later one.
    scale: of the scores; None for h^-0.5.

  Returns:
    [B, H, T, h] in the dtype of `q`. Gradients flow to `q`, `k` and `v`.

  >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 4, 8))
  >>> out = blockwise(q, k, v, jnp.array([[1, 1, 2, 3]]))
  >>> bool(jnp.allclose(out[:, :, [0, 2, 3]], v[:, :, [0, 2, 3]]))  # none but the second sees another
  True
  """
  return _forward(q, k, v, until, scale)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, until: jax.Array, scale: float | None):
  outs, norms, factor = [], [], scale_of(q, scale)
  for begin, end in _blocks(q.shape[2]):
    scores = factor * _dot(_queries(q, k, begin, end), k[:, :, :end], 3, 3)  # [B, K, G*t, S]
    scores = jnp.where(_seen(until, begin, end, q.shape[1] // k.shape[1]), scores, jnp.finfo(jnp.float32).min)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _dot(weights.astype(q.dtype), v[:, :, :end], 3, 2) / total
    outs.append(out.astype(q.dtype).reshape(*q.shape[:2], end - begin, -1))
    norms.append((top + jnp.log(total))[..., 0])
  out = jnp.concatenate(outs, axis=2)
  return out, (q, k, v, until, out, norms)


def _backward(scale: float | None, residuals, g: jax.Array):
  q, k, v, until, out, norms = residuals
  factor = scale_of(q, scale)
  groups, blocks = q.shape[1] // k.shape[1], _blocks(q.shape[2])
  dq, dk, dv = [], [[] for _ in blocks], [[] for _ in blocks]
  for i, (begin, end) in enumerate(blocks):
    keys, values = k[:, :, :end], v[:, :, :end]
    queries, dout = _queries(q, k, begin, end), _queries(g, k, begin, end)
    slope = jnp.sum(dout.astype(jnp.float32) * _queries(out, k, begin, end), axis=-1)  # of each query's norm
    # Scores lie [B, K, S, G*t] here: XLA's CPU backend transposes in memory what is summed over its first axis, which
    # this way is never the scores.
    weights = jnp.exp(factor * _dot(keys, queries, 3, 3) - norms[i][:, :, None])
    weights = jnp.where(_seen(until, begin, end, groups).swapaxes(2, 3), weights, 0.0)
    dscores = (weights * (_dot(values, dout, 3, 3) - slope[:, :, None])).astype(q.dtype)
    # The barrier keeps XLA from swapping the operands back (see `training.loss`).
    dqueries = factor * jax.lax.optimization_barrier(_dot(keys, dscores, 2, 2)).swapaxes(2, 3)
    dq.append(dqueries.astype(q.dtype).reshape(*q.shape[:2], end - begin, -1))
    dkeys, dvalues = factor * _dot(dscores, queries, 3, 2), _dot(weights.astype(q.dtype), dout, 3, 2)
    for j, (first, last) in enumerate(blocks[:i + 1]):
      dk[j].append(dkeys[:, :, first:last])
      dv[j].append(dvalues[:, :, first:last])
  add = lambda parts, dtype: jnp.concatenate([functools.reduce(jnp.add, p) for p in parts], axis=2).astype(dtype)
  return jnp.concatenate(dq, axis=2), add(dk, k.dtype), add(dv, v.dtype), None


blockwise.defvjp(_forward, _backward)


def _blocks(length: int) -> list[tuple[int, int]]:
  size = max(BLOCK, -(-length // MOST))
  return [(begin, min(begin + size, length)) for begin in range(0, length, size)]


def scale_of(q: jax.Array, scale: float | None) -> float:
  """The factor of the scores: the one given, or h^-0.5."""
  return q.shape[-1]**-0.5 if scale is None else scale


def _queries(q: jax.Array, k: jax.Array, begin: int, end: int) -> jax.Array:
  """One block of [B, H, T, h] as [B, K, G*t, h]: each key/value head with all queries of its group."""
  return q[:, :, begin:end].reshape(*k.shape[:2], -1, q.shape[-1])


def _seen(until: jax.Array, begin: int, end: int, groups: int) -> jax.Array:
  """[B, 1, G*t, S], true where a query of the block sees a key."""
  queries = jnp.arange(begin, end)[:, None]
  seen = (queries >= jnp.arange(end)) & (queries <= until[:, None, :end])
  return jnp.tile(seen, (1, groups, 1))[:, None]


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
  """Sum of products over one axis of each, for every [B, K]; accumulated in float32 and returned so."""
  return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((0, 1), (0, 1))),
                             precision=precision(a.dtype), preferred_element_type=jnp.float32)


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
  """float32 means float32: left to themselves, GPUs take TF32 and TPUs bfloat16 for its products."""
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
