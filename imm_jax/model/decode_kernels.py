"""Kernels of one decoding step's attention, which read of each row's cache only the slots that are used.

`ragged` is for TPUs; jax's own paged kernels there do not give what a softmax over two parts needs, the largest score
and the sum of the weights. `gqa` is jax's Pallas kernel for GPUs. Both have run in Pallas' interpreter alone, `ragged`
was also compiled for a TPU; neither has run on the device that it is for.

Axes: B batch, S slots, H heads, K key/value heads, G = H / K, h head dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec as P

# (outputs float32 [B, K, G, h] before they are divided, the largest scores [B, K, G, 1], the sums [B, K, G, 1])
Part = tuple[jax.Array, jax.Array, jax.Array]
# `columns` is XLA's own, with keys that lie [B, K, h, S]: a CPU reads them so in two thirds of the time.
KERNELS = ("xla", "columns", "ragged", "gqa")
# Slots of a block, the first that divides their number.
_BLOCKS = (512, 384, 256, 192, 128, 64)
_LANES = 128


def part(name: str, q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, scale: float, *,
         mesh: Mesh | None = None, interpret: bool = False) -> Part:
  """Attention of one token a row to the row's own slots, by a kernel.

  Args:
    name: `ragged` or `gqa`.
    q: [B, K, G, h].
    k: [B, K, S, h].
    v: [B, K, S, h].
    lengths: int32 [B], used slots of each row, 1 or more.
    scale: of the scores.
    mesh: rows are split over `data`, heads over `tensor`.
    interpret: runs it in Pallas' interpreter.
  """
  run = functools.partial({"ragged": ragged, "gqa": gqa}[name], scale=scale, interpret=interpret)
  if mesh is None or mesh.size == 1:
    return run(q, k, v, lengths)
  rows = "data" if q.shape[0] % mesh.shape["data"] == 0 else None
  where = P(rows, "tensor")
  # What a kernel is made of says nothing about the mesh axes that its results vary over.
  return jax.shard_map(run, mesh=mesh, in_specs=(where, where, where, P(rows)), out_specs=where, check_vma=False)(
      q, k, v, lengths)


def ragged(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, scale: float, interpret: bool = False,
           ) -> Part:
  """`part` on a TPU: blocks past a row's length are neither fetched nor computed."""
  batch, heads, group, head_dim = q.shape
  block = next((size for size in _BLOCKS if k.shape[2] % size == 0), k.shape[2])
  last = lambda lengths, b, s: jnp.minimum(s, (lengths[b] - 1) // block)  # the same block again is not fetched again
  own = pl.BlockSpec((1, 1, group, head_dim), lambda b, h, s, lengths: (b, h, 0, 0))
  cached = pl.BlockSpec((1, 1, block, head_dim), lambda b, h, s, lengths: (b, h, last(lengths, b, s), 0))
  column = pl.BlockSpec((1, 1, group, _LANES), lambda b, h, s, lengths: (b, h, 0, 0))
  wide = jax.ShapeDtypeStruct((batch, heads, group, _LANES), jnp.float32)
  out, top, total = pl.pallas_call(
      functools.partial(_ragged, block=block, scale=scale),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(batch, heads, k.shape[2] // block), in_specs=[own, cached, cached],
          out_specs=[own, column, column]),
      out_shape=[jax.ShapeDtypeStruct(q.shape, jnp.float32), wide, wide], interpret=interpret,
      name="ragged_decode")(lengths, q, k, v)
  return out, top[..., :1], total[..., :1]


def _ragged(lengths, q, k, v, out, top, total, *, block: int, scale: float) -> None:
  """One block of one row and key/value head, added to what earlier blocks gave."""
  row, begin = pl.program_id(0), pl.program_id(2) * block

  @pl.when(begin == 0)
  def _() -> None:
    out[...] = jnp.zeros_like(out)
    top[...] = jnp.full_like(top, jnp.finfo(jnp.float32).min)
    total[...] = jnp.zeros_like(total)

  @pl.when(begin < lengths[row])
  def _() -> None:
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    scores = scale * dot(q[0, 0], k[0, 0], (((1,), (1,)), ((), ())))  # [G, block]
    slots = begin + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where(slots < lengths[row], scores, jnp.finfo(jnp.float32).min)
    before = top[0, 0, :, :1]
    now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
    weights, shrunk = jnp.exp(scores - now), jnp.exp(before - now)
    total[0, 0] = total[0, 0] * shrunk + jnp.sum(weights, axis=1, keepdims=True)
    out[0, 0] = out[0, 0] * shrunk + dot(weights.astype(v.dtype), v[0, 0], (((1,), (0,)), ((), ())))
    top[0, 0] = jnp.broadcast_to(now, top.shape[2:])


def gqa(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, scale: float, interpret: bool = False,
        ) -> Part:
  """`part` on a GPU, by jax's kernel; it takes [B, S, K, h] and turns that back, so nothing is moved."""
  from jax.experimental.pallas.ops.gpu import decode_attention

  batch, heads, group, head_dim = q.shape
  slots = k.shape[2]
  block = next(size for size in (128, 64, 32, 16) if slots % size == 0)
  splits = max(n for n in (1, 2, 4, 8, 16) if slots % (n * block) == 0)
  out, (total, top) = decode_attention.gqa(
      q.reshape(batch, heads * group, head_dim), k.swapaxes(1, 2), v.swapaxes(1, 2), kv_seq_len=lengths,
      start_idx=jnp.zeros_like(lengths), sm_scale=scale, block_k=block, k_splits=splits, return_residuals=True,
      normalize_output=False, interpret=interpret)
  shape = lambda x: x.astype(jnp.float32).reshape(batch, heads, group, -1)
  return shape(out), shape(top), shape(total)
