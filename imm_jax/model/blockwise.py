"""Blockwise attention over packed rows, for machines without an attention kernel.

Scores are computed for one block of queries and the keys up to its end, so blocks hidden by the causal mask are
skipped. The backward pass recomputes scores from the forward pass's output and one number for each query (Dao et al.
2022, https://arxiv.org/abs/2205.14135).

Axes: B batch, T length, S keys of a block, H heads, K key/value heads, G = H / K, t queries of a block, h head dim.
"""

import functools

import jax
import jax.numpy as jnp

# Queries in a block, and the maximum number of blocks in a row, as each is compiled separately.
BLOCK, MAX_BLOCKS = 128, 16


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise(q: jax.Array, k: jax.Array, v: jax.Array, until: jax.Array, scale: float | None = None) -> jax.Array:
  """Computes causal attention; scores and softmax are float32.

  Args:
    q: [B, H, T, h].
    k: [B, K, T, h].
    v: [B, K, T, h].
    until: int32 [B, T], the last position that attends to each key; that key's own, or a later one.
    scale: scale of the scores; None for h^-0.5.

  Returns:
    [B, H, T, h] in the dtype of `q`. Gradients flow to `q`, `k` and `v`.

  >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 4, 8))
  >>> out = blockwise(q, k, v, jnp.array([[1, 1, 2, 3]]))
  >>> bool(jnp.allclose(out[:, :, [0, 2, 3]], v[:, :, [0, 2, 3]]))  # only the second attends to another
  True
  """
  return _forward(q, k, v, until, scale)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, until: jax.Array, scale: float | None):
  outs, norms, factor = [], [], score_scale(q, scale)
  for begin, end in _blocks(q.shape[2]):
    scores = factor * _dot(_group_queries(q, k, begin, end), k[:, :, :end], 3, 3)  # [B, K, G*t, S]
    scores = jnp.where(_attention_mask(until, begin, end, q.shape[1] // k.shape[1]), scores, jnp.finfo(jnp.float32).min)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _dot(weights.astype(q.dtype), v[:, :, :end], 3, 2) / total
    outs.append(out.astype(q.dtype).reshape(*q.shape[:2], end - begin, -1))
    norms.append((peak + jnp.log(total))[..., 0])
  out = jnp.concatenate(outs, axis=2)
  return out, (q, k, v, until, out, norms)


def _backward(scale: float | None, residuals, g: jax.Array):
  q, k, v, until, out, norms = residuals
  factor = score_scale(q, scale)
  groups, blocks = q.shape[1] // k.shape[1], _blocks(q.shape[2])
  dq, dk, dv = [], [[] for _ in blocks], [[] for _ in blocks]
  for i, (begin, end) in enumerate(blocks):
    keys, values = k[:, :, :end], v[:, :, :end]
    queries, dout = _group_queries(q, k, begin, end), _group_queries(g, k, begin, end)
    row_sum = jnp.sum(dout.astype(jnp.float32) * _group_queries(out, k, begin, end), axis=-1)
    # Scores are laid out as [B, K, S, G*t] here, because XLA's CPU backend transposes operands that are contracted over
    # their first axis in memory, and so that is never the scores.
    weights = jnp.exp(factor * _dot(keys, queries, 3, 3) - norms[i][:, :, None])
    weights = jnp.where(_attention_mask(until, begin, end, groups).swapaxes(2, 3), weights, 0.0)
    dscores = (weights * (_dot(values, dout, 3, 3) - row_sum[:, :, None])).astype(q.dtype)
    # The barrier prevents XLA from swapping the operands back (see `training.loss`).
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
  size = max(BLOCK, -(-length // MAX_BLOCKS))
  return [(begin, min(begin + size, length)) for begin in range(0, length, size)]


def score_scale(q: jax.Array, scale: float | None) -> float:
  """Returns the scale of the scores: the one given, or h^-0.5."""
  return q.shape[-1]**-0.5 if scale is None else scale


def _group_queries(q: jax.Array, k: jax.Array, begin: int, end: int) -> jax.Array:
  """Reshapes one block of [B, H, T, h] to [B, K, G*t, h]: all queries of a group with their key/value head."""
  return q[:, :, begin:end].reshape(*k.shape[:2], -1, q.shape[-1])


def _attention_mask(until: jax.Array, begin: int, end: int, groups: int) -> jax.Array:
  """Returns a mask [B, 1, G*t, S], true where a query of the block attends to a key."""
  queries = jnp.arange(begin, end)[:, None]
  seen = (queries >= jnp.arange(end)) & (queries <= until[:, None, :end])
  return jnp.tile(seen, (1, groups, 1))[:, None]


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
  """Contracts one axis of each for every [B, K]; accumulates in and returns float32."""
  return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((0, 1), (0, 1))),
                             precision=precision(a.dtype), preferred_element_type=jnp.float32)


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
  """Requests full precision for float32, whose products GPUs by default compute in TF32 and TPUs in bfloat16."""
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
