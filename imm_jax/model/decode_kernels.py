"""Attention kernels for decoding steps that read only the used slots of each row's cache.

`ragged` is for TPUs; jax's own paged kernels do not return the largest score and the sum of the weights, which a
softmax over two parts needs. `gqa` is jax's Pallas kernel for GPUs. Both have run only in Pallas' interpreter; `ragged`
was also compiled for a TPU. Neither has run on its target device.

Axes: B batch, S slots, H heads, K key/value heads, G = H / K, h head dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec as P

# (unnormalized outputs float32 [B, K, G, h], largest scores [B, K, G, 1], sums of the weights [B, K, G, 1])
PartialSoftmax = tuple[jax.Array, jax.Array, jax.Array]
# `columns` is plain XLA with keys in the layout [B, K, h, S], which a CPU reads in two thirds of the time.
KERNELS = ("xla", "columns", "ragged", "gqa")
# Slots in a block; the first size that divides their number is used.
_BLOCKS = (512, 384, 256, 192, 128, 64)
_LANES = 128


def partial_attention(name: str, q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, scale: float, *,
                      mesh: Mesh | None = None, interpret: bool = False) -> PartialSoftmax:
  """Computes attention of one token in each row to the row's own slots, with a kernel.

  Args:
    name: `ragged` or `gqa`.
    q: [B, K, G, h].
    k: [B, K, S, h].
    v: [B, K, S, h].
    lengths: int32 [B], number of used slots of each row, at least 1.
    scale: scale of the scores.
    mesh: shards rows over `data` and heads over `tensor`.
    interpret: runs the kernel in Pallas' interpreter.
  """
  run = functools.partial({"ragged": ragged, "gqa": gqa}[name], scale=scale, interpret=interpret)
  if mesh is None or mesh.size == 1:
    return run(q, k, v, lengths)
  rows = "data" if q.shape[0] % mesh.shape["data"] == 0 else None
  specs = P(rows, "tensor")
  # Kernels do not declare over which mesh axes their results vary, so that check is off.
  return jax.shard_map(run, mesh=mesh, in_specs=(specs, specs, specs, P(rows)), out_specs=specs, check_vma=False)(
      q, k, v, lengths)


def ragged(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, scale: float, interpret: bool = False,
           ) -> PartialSoftmax:
  """Runs `partial_attention` on a TPU: blocks past a row's length are neither fetched nor computed."""
  batch, heads, group, head_dim = q.shape
  block = next((size for size in _BLOCKS if k.shape[2] % size == 0), k.shape[2])
  last = lambda lengths, b, s: jnp.minimum(s, (lengths[b] - 1) // block)  # Pallas does not refetch the same block
  own = pl.BlockSpec((1, 1, group, head_dim), lambda b, h, s, lengths: (b, h, 0, 0))
  cached = pl.BlockSpec((1, 1, block, head_dim), lambda b, h, s, lengths: (b, h, last(lengths, b, s), 0))
  stat_block = pl.BlockSpec((1, 1, group, _LANES), lambda b, h, s, lengths: (b, h, 0, 0))
  row_stat = jax.ShapeDtypeStruct((batch, heads, group, _LANES), jnp.float32)
  out, peak, total = pl.pallas_call(
      functools.partial(_ragged, block=block, scale=scale),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(batch, heads, k.shape[2] // block), in_specs=[own, cached, cached],
          out_specs=[own, stat_block, stat_block]),
      out_shape=[jax.ShapeDtypeStruct(q.shape, jnp.float32), row_stat, row_stat], interpret=interpret,
      name="ragged_decode")(lengths, q, k, v)
  return out, peak[..., :1], total[..., :1]


def _ragged(lengths, q, k, v, out, peak, total, *, block: int, scale: float) -> None:
  """Accumulates one block of one row and key/value head into the result of earlier blocks."""
  row, begin = pl.program_id(0), pl.program_id(2) * block

  @pl.when(begin == 0)
  def _() -> None:
    out[...] = jnp.zeros_like(out)
    peak[...] = jnp.full_like(peak, jnp.finfo(jnp.float32).min)
    total[...] = jnp.zeros_like(total)

  @pl.when(begin < lengths[row])
  def _() -> None:
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    scores = scale * dot(q[0, 0], k[0, 0], (((1,), (1,)), ((), ())))  # [G, block]
    slots = begin + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where(slots < lengths[row], scores, jnp.finfo(jnp.float32).min)
    old_peak = peak[0, 0, :, :1]
    new_peak = jnp.maximum(old_peak, jnp.max(scores, axis=1, keepdims=True))
    weights, decay = jnp.exp(scores - new_peak), jnp.exp(old_peak - new_peak)
    total[0, 0] = total[0, 0] * decay + jnp.sum(weights, axis=1, keepdims=True)
    out[0, 0] = out[0, 0] * decay + dot(weights.astype(v.dtype), v[0, 0], (((1,), (0,)), ((), ())))
    peak[0, 0] = jnp.broadcast_to(new_peak, peak.shape[2:])


def gqa(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, scale: float, interpret: bool = False,
        ) -> PartialSoftmax:
  """Runs `partial_attention` on a GPU with jax's kernel, whose own swap of k's and v's axes undoes the one here."""
  from jax.experimental.pallas.ops.gpu import decode_attention

  batch, heads, group, head_dim = q.shape
  slots = k.shape[2]
  block = next(size for size in (128, 64, 32, 16) if slots % size == 0)
  splits = max(n for n in (1, 2, 4, 8, 16) if slots % (n * block) == 0)
  out, (total, peak) = decode_attention.gqa(
      q.reshape(batch, heads * group, head_dim), k.swapaxes(1, 2), v.swapaxes(1, 2), kv_seq_len=lengths,
      start_idx=jnp.zeros_like(lengths), sm_scale=scale, block_k=block, k_splits=splits, return_residuals=True,
      normalize_output=False, interpret=interpret)
  shape = lambda x: x.astype(jnp.float32).reshape(batch, heads, group, -1)
  return shape(out), shape(peak), shape(total)
