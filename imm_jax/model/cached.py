"""Attention of text continuations to a shared prefix and to their own cached keys and values.

The prefix is stored once. A softmax over both parts equals one over the concatenated keys, up to rounding.

Axes: B batch, T query length, S own slots, P slots of the prefix, H heads, K key/value heads, G = H / K, h head dim.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from imm_jax.model import decode_kernels
from imm_jax.model.blockwise import precision, score_scale

# One layer's keys and values: [B, K, S, h], of a prefix [K, P, h].
LayerCache = tuple[jax.Array, jax.Array]
# Queries whose scores are held at once.
_BLOCK = 256
_MASKED = jnp.finfo(jnp.float32).min


class Prefix(NamedTuple):
  """Holds a prefix shared by all rows.

  Attributes:
    caches: keys and values [K, P, h] of every layer.
    length: int32, its number of tokens; 0 if rows share none. Slots beyond are masked.
  """

  caches: list[LayerCache]
  length: jax.Array


def prefill_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, prefix: LayerCache, length: jax.Array,
                      segment_ids: jax.Array, scale: float | None = None) -> jax.Array:
  """Computes attention of rows packed with prompts, each of which attends to the prefix and its own earlier tokens.

  Args:
    q: [B, H, T, h].
    k: [B, K, T, h].
    v: [B, K, T, h].
    prefix: keys and values of the prefix.
    length: number of its tokens.
    segment_ids: int32 [B, T], one number for each prompt of a row.
    scale: scale of the scores; None for h^-0.5.

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
    outs.append(_joint_softmax(q.dtype, score_scale(q, scale), [
        ("bkgth,ksh->bkgts", queries, *prefix, jnp.arange(prefix[0].shape[1]) < length),
        ("bkgth,bksh->bkgts", queries, k[:, :, :end], v[:, :, :end], own[:, None, None])
    ]).reshape(batch, -1, end - begin, head_dim))
  return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=2)


def write_cache(cache: LayerCache, k: jax.Array, v: jax.Array, slots: jax.Array, *, columns: bool) -> LayerCache:
  """Returns the cache with keys and values [B, K, 1, h] written to `slots` [B]; slots past its end are dropped."""
  rows = jnp.arange(slots.shape[0])
  set_keys = lambda old, new: (old.at[rows, :, :, slots] if columns else old.at[rows, :, slots]).set(new, mode="drop")
  return (scatter(cache[0], set_keys, k[:, :, 0]),
          scatter(cache[1], lambda old, new: old.at[rows, :, slots].set(new, mode="drop"), v[:, :, 0]))


def scatter(old: jax.Array, change: Callable[..., jax.Array], new: jax.Array) -> jax.Array:
  """Applies a scatter `change(old, new)`, on the bits of bfloat16: XLA on CPU would convert all of it to float32."""
  if old.dtype.itemsize > 2:
    return change(old, new)
  bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint16)
  return jax.lax.bitcast_convert_type(change(bits(old), bits(new)), old.dtype)


def decode_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, prefix: LayerCache, length: jax.Array,
                     used: jax.Array, scale: float | None = None, kernel: str = "xla", mesh: Mesh | None = None,
                     interpret: bool = False) -> jax.Array:
  """Computes attention of one token in each row.

  Args:
    q: [B, H, 1, h].
    k: [B, K, S, h]; [B, K, h, S] for the kernel `columns`.
    v: [B, K, S, h].
    prefix: keys and values of the prefix.
    length: number of its tokens.
    used: int32 [B], the slot of each row's token, which attends to slots up to it.
    scale: scale of the scores; None for h^-0.5.
    kernel: kernel for the row's own slots, one of `decode_kernels.KERNELS`.
    mesh: see `decode_kernels.partial_attention`.
    interpret: see `decode_kernels.partial_attention`.

  Returns:
    [B, H, 1, h].
  """
  grouped, scale = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1]), score_scale(q, scale)
  # Moving the rows inside the heads gives one product for all rows, and scores are not transposed.
  shared = _partial_softmax(q.dtype, scale, "kbgh,ksh->kbgs", "kbgs,ksh->kbgh", grouped.swapaxes(0, 1), *prefix,
                            jnp.arange(prefix[0].shape[1]) < length)
  if kernel in ("xla", "columns"):
    scores = "bkgh,bksh->bkgs" if kernel == "xla" else "bkgh,bkhs->bkgs"
    seen = jnp.arange(v.shape[2]) <= used[:, None]
    own = _partial_softmax(q.dtype, scale, scores, "bkgs,bksh->bkgh", grouped, k, v, seen[:, None, None])
  else:
    own = decode_kernels.partial_attention(kernel, grouped, k, v, used + 1, scale, mesh=mesh, interpret=interpret)
  parts = [[x.swapaxes(0, 1) for x in shared], own]
  peak = functools.reduce(jnp.maximum, (part[1] for part in parts))
  out, total = (sum(part[i] * jnp.exp(part[1] - peak) for part in parts) for i in (0, 2))
  return (out / total).astype(q.dtype).reshape(q.shape)


def _joint_softmax(dtype: jnp.dtype, scale: float, parts: list[tuple]) -> jax.Array:
  """Computes one float32 softmax over parts (einsum of scores, queries, keys, values, mask)."""
  scores = [_scores(dtype, scale, equation, q, k, seen) for equation, q, k, _, seen in parts]
  peak = functools.reduce(jnp.maximum, (jnp.max(s, axis=-1, keepdims=True) for s in scores))
  weights = [jnp.exp(s - peak) for s in scores]
  total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
  out = sum(_weigh(w.astype(dtype), v) for w, (_, _, _, v, _) in zip(weights, parts, strict=True))
  return (out / total).astype(dtype)


def _weigh(weights: jax.Array, v: jax.Array) -> jax.Array:
  """Multiplies weights [B, K, G, T, S] by values [B, K, S, h], or by [K, S, h] of all rows; float32 [B, K, G, T, h]."""
  if v.ndim == 4:
    return _einsum(v.dtype)("bkgts,bksh->bkgth", weights, v)
  # Heads come first, since on CPUs with bfloat16 XLA (of jax 0.10) fails at this product with rows first.
  return _einsum(v.dtype)("kbgts,ksh->kbgth", weights.swapaxes(0, 1), v).swapaxes(0, 1)


def _partial_softmax(dtype: jnp.dtype, scale: float, equation: str, outputs: str, q: jax.Array, k: jax.Array,
                     v: jax.Array, seen: jax.Array) -> decode_kernels.PartialSoftmax:
  """Computes one part, in the form of `decode_kernels.PartialSoftmax`."""
  scores = _scores(dtype, scale, equation, q, k, seen)
  peak = jnp.max(scores, axis=-1, keepdims=True)
  weights = jnp.exp(scores - peak)
  return _einsum(dtype)(outputs, weights.astype(dtype), v), peak, jnp.sum(weights, axis=-1, keepdims=True)


def _scores(dtype: jnp.dtype, scale: float, equation: str, q: jax.Array, k: jax.Array, seen: jax.Array) -> jax.Array:
  return jnp.where(seen, _einsum(dtype)(equation, q, k) * scale, _MASKED)


def _einsum(dtype: jnp.dtype):
  return functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision(dtype))
