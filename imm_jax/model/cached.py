"""Attention of texts that go on: to a prefix that all of them share, and to each one's own keys and values.

The prefix is held once. A softmax over both parts is what one over their keys in a row would be, to rounding.

Axes: B batch, T query length, S own slots, P slots of the prefix, H heads, K key/value heads, G = H / K, h head dim.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from imm_jax.model import decode_kernels
from imm_jax.model.blockwise import precision, scale_of

# One layer's keys and values: [B, K, S, h], of a prefix [K, P, h].
LayerCache = tuple[jax.Array, jax.Array]
# Queries whose scores exist at once.
_BLOCK = 256
_LEAST = jnp.finfo(jnp.float32).min


class Prefix(NamedTuple):
  """What all rows begin with.

  Attributes:
    caches: for every layer keys and values [K, P, h].
    length: int32, tokens of it; 0 where rows share nothing. What lies beyond is not seen.
  """

  caches: list[LayerCache]
  length: jax.Array


def prompts(q: jax.Array, k: jax.Array, v: jax.Array, *, prefix: LayerCache, length: jax.Array,
            segment_ids: jax.Array, scale: float | None = None) -> jax.Array:
  """Attention of rows packed with prompts, each of which sees the prefix and the earlier tokens of its own.

  Args:
    q: [B, H, T, h].
    k: [B, K, T, h].
    v: [B, K, T, h].
    prefix: keys and values.
    length: of the prefix.
    segment_ids: int32 [B, T], one number for each prompt of a row.
    scale: of the scores; None for h^-0.5.

  Returns:
    [B, H, T, h].
  """
  batch, _, total, head_dim = q.shape
  outs = []
  for begin in range(0, total, _BLOCK):
    end = min(begin + _BLOCK, total)
    queries = q[:, :, begin:end].reshape(batch, k.shape[1], -1, end - begin, head_dim)
    own = segment_ids[:, begin:end, None] == segment_ids[:, None, :end]
    own &= jnp.arange(begin, end)[:, None] >= jnp.arange(end)
    outs.append(_softmax(q.dtype, scale_of(q, scale), [
        ("bkgth,ksh->bkgts", "bkgts,ksh->bkgth", queries, *prefix, jnp.arange(prefix[0].shape[1]) < length),
        ("bkgth,bksh->bkgts", "bkgts,bksh->bkgth", queries, k[:, :, :end], v[:, :, :end], own[:, None, None])
    ]).reshape(batch, -1, end - begin, head_dim))
  return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=2)


def put(cache: LayerCache, k: jax.Array, v: jax.Array, slots: jax.Array, *, columns: bool) -> LayerCache:
  """A cache with new keys and values [B, K, 1, h] in `slots` [B]; those past its end are dropped."""
  rows = jnp.arange(slots.shape[0])
  keys = lambda old, new: (old.at[rows, :, :, slots] if columns else old.at[rows, :, slots]).set(new, mode="drop")
  return (scatter(cache[0], keys, k[:, :, 0]),
          scatter(cache[1], lambda old, new: old.at[rows, :, slots].set(new, mode="drop"), v[:, :, 0]))


def scatter(old: jax.Array, change: Callable[..., jax.Array], new: jax.Array) -> jax.Array:
  """`change(old, new)`, of bfloat16 as integers: on CPU XLA would widen a scatter to float32, and the whole array."""
  if old.dtype.itemsize > 2:
    return change(old, new)
  bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint16)
  return jax.lax.bitcast_convert_type(change(bits(old), bits(new)), old.dtype)


def step(q: jax.Array, k: jax.Array, v: jax.Array, *, prefix: LayerCache, length: jax.Array, used: jax.Array,
         scale: float | None = None, kernel: str = "xla", mesh: Mesh | None = None, interpret: bool = False,
         ) -> jax.Array:
  """Attention of one token a row.

  Args:
    q: [B, H, 1, h].
    k: [B, K, S, h]; [B, K, h, S] for the kernel `columns`.
    v: [B, K, S, h].
    prefix: keys and values.
    length: of the prefix.
    used: int32 [B], the slot of each row's token; it sees that and those before.
    scale: of the scores; None for h^-0.5.
    kernel: what reads a row's own slots, one of `decode_kernels.KERNELS`.
    mesh: of a kernel, see `decode_kernels.part`.
    interpret: of a kernel.

  Returns:
    [B, H, 1, h].
  """
  grouped, scale = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1]), scale_of(q, scale)
  # Rows lie together for each head: so it is one product of all of them, and no scores are moved.
  shared = _part(q.dtype, scale, "kbgh,ksh->kbgs", "kbgs,ksh->kbgh", grouped.swapaxes(0, 1), *prefix,
                 jnp.arange(prefix[0].shape[1]) < length)
  if kernel in ("xla", "columns"):
    scores = "bkgh,bksh->bkgs" if kernel == "xla" else "bkgh,bkhs->bkgs"
    seen = jnp.arange(v.shape[2]) <= used[:, None]
    own = _part(q.dtype, scale, scores, "bkgs,bksh->bkgh", grouped, k, v, seen[:, None, None])
  else:
    own = decode_kernels.part(kernel, grouped, k, v, used + 1, scale, mesh=mesh, interpret=interpret)
  parts = [[x.swapaxes(0, 1) for x in shared], own]
  top = functools.reduce(jnp.maximum, (part[1] for part in parts))
  out, total = (sum(part[i] * jnp.exp(part[1] - top) for part in parts) for i in (0, 2))
  return (out / total).astype(q.dtype).reshape(q.shape)


def _softmax(dtype: jnp.dtype, scale: float, parts: list[tuple]) -> jax.Array:
  """One softmax over parts (scores' einsum, outputs' einsum, queries, keys, values, mask), in float32."""
  scores = [_scores(dtype, scale, equation, q, k, seen) for equation, _, q, k, _, seen in parts]
  top = functools.reduce(jnp.maximum, (jnp.max(s, axis=-1, keepdims=True) for s in scores))
  weights = [jnp.exp(s - top) for s in scores]
  total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
  out = sum(_einsum(dtype)(equation, w.astype(dtype), v)
            for w, (_, equation, _, _, v, _) in zip(weights, parts, strict=True))
  return (out / total).astype(dtype)


def _part(dtype: jnp.dtype, scale: float, equation: str, outputs: str, q: jax.Array, k: jax.Array, v: jax.Array,
          seen: jax.Array) -> decode_kernels.Part:
  """One part by itself, as a kernel gives it."""
  scores = _scores(dtype, scale, equation, q, k, seen)
  top = jnp.max(scores, axis=-1, keepdims=True)
  weights = jnp.exp(scores - top)
  return _einsum(dtype)(outputs, weights.astype(dtype), v), top, jnp.sum(weights, axis=-1, keepdims=True)


def _scores(dtype: jnp.dtype, scale: float, equation: str, q: jax.Array, k: jax.Array, seen: jax.Array) -> jax.Array:
  return jnp.where(seen, _einsum(dtype)(equation, q, k) * scale, _LEAST)


def _einsum(dtype: jnp.dtype):
  return functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision(dtype))
