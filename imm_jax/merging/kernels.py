"""The arithmetic of every method on one leaf: float32 from what is stored, rounded once.

A kernel takes `tensors`, the leaf of every model as [L, ...] (L tensors of equal shape, or one); `scalars`, arrays
[L, ...] with each tensor's settings; and `shared`, what is the same for all: the key's words, `first` (row and column
where a block begins), `zero`, and `half` where only every second column is there. A file streamed in blocks and a tree
in memory run the same kernels.

A compiler may fuse a product and a sum, which rounds once instead of twice, and it chooses anew for every shape and
layout. So that bits do not depend on that choice, products that meet a sum are pinned.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from imm_jax.merging import masks

Tensors = tuple[jax.Array, ...]
Arrays = Mapping[str, jax.Array]


def linear(tensors: Tensors, scalars: Arrays, shared: Arrays, *, divide: bool) -> jax.Array:
  """sum_i w_i t_i, divided by the sum of the weights where `divide`; `weight` [L, n], `total` [L]."""
  total = jnp.zeros((), jnp.float32)
  for i, tensor in enumerate(tensors):
    total = _multiply_add(_f32(tensor), _expand(scalars["weight"][:, i], tensor), total)
  return _divide(total, _expand(scalars["total"], total), shared) if divide else total


def imm(tensors: Tensors, scalars: Arrays, shared: Arrays, *, draw: bool) -> jax.Array:
  """a base + (1 - a)(start + gain * kept(tuned - start)) for (base, start, tuned).

  `base_weight` a, `gain` and `steps` [L]; `code` [L]. A gain of 1 without drops takes `tuned` itself, for
  start + (tuned - start) need not be that in float32.
  """
  base, start, tuned = (_f32(t) for t in tensors)
  weight, gain = (_expand(scalars[name], base) for name in ("base_weight", "gain"))
  delta = _pin((tuned - start) * gain, shared)
  if draw:
    delta = jnp.where(_dropped(base.shape, scalars["code"], scalars["steps"], shared), 0.0, delta)
  moved = jnp.where((gain == 1) & (_expand(scalars["steps"], base) == 0), tuned, start + delta)
  merged = _pin(weight * base, shared) + _pin((1 - weight) * moved, shared)
  return jnp.where(weight == 1, base, jnp.where(weight == 0, moved, merged))


def dare(tensors: Tensors, scalars: Arrays, shared: Arrays) -> jax.Array:
  """gain * kept(delta) for (delta,); `gain`, `steps` and `code` [L]."""
  delta = _f32(tensors[0])
  dropped = _dropped(delta.shape, scalars["code"], scalars["steps"], shared)
  return jnp.where(dropped, 0.0, delta * _expand(scalars["gain"], delta))


def task_vectors(tensors: Tensors, scalars: Arrays, shared: Arrays, *, sparsify: str | None, elect: bool,
                 normalize: bool, rescale: bool) -> jax.Array:
  """base + scale * combine_i(w_i sparsify_i(t_i - base)) for (base, t_1, ..., t_n).

  Args:
    tensors: base first.
    scalars: `weight` [L, n], `total` [L] (sum of weights, not 0), `scale` [L], and what `sparsify` needs: `low` and
      `high` uint32 [L, n] (bits of the least and the greatest magnitude that stays), or `code` [L] with `steps`
      uint32 [L, n], or with `table` uint16 [L, n, buckets].
    shared: see above.
    sparsify: None, `magnitude`, `random` (DARE), or `ranked` (DELLA).
    elect: keep, entry by entry, what has the sign of the sum (TIES).
    normalize: divide by the sum of weights, with `elect` of those that stay.
    rescale: divide what is drawn by the share that stays.
  """
  base = _f32(tensors[0])
  deltas, weights = [], []
  for i, tensor in enumerate(tensors[1:]):
    delta = _f32(tensor) - base
    if sparsify == "magnitude":
      bits = magnitude_bits(delta)
      low, high = (_expand(scalars[name][:, i], delta) for name in ("low", "high"))
      delta = jnp.where((bits >= low) & (bits <= high), delta, 0.0)
    elif sparsify is not None:
      if sparsify == "ranked":
        steps = jax.vmap(lambda table, bucket: table[bucket])(scalars["table"][:, i], bucket_of(delta))
        steps = steps.astype(jnp.uint32)
      else:
        steps = _expand(scalars["steps"][:, i], delta)
      words = masks.fold_in((shared["key"][0], shared["key"][1]), jnp.uint32(i))
      draws = masks.draws(words, scalars["code"], delta.shape, shared["first"], shared.get("half"))
      kept = masks.STEPS - steps.astype(jnp.float32)
      delta = jnp.where(draws < steps, 0.0, _pin(delta * (masks.STEPS / kept), shared) if rescale else delta)
    weights.append(_expand(scalars["weight"][:, i], delta))
    deltas.append(_pin(weights[-1] * delta, shared))
  if elect:
    positive = _sum(deltas) >= 0
    agree = [(d != 0) & ((d > 0) == positive) for d in deltas]
    mixed = _sum([jnp.where(a, d, 0.0) for a, d in zip(agree, deltas, strict=True)])
    if normalize:
      total = _sum([jnp.where(a, w, 0.0) for a, w in zip(agree, weights, strict=True)])
      mixed = mixed / jnp.where(total == 0, 1.0, total)
  else:
    mixed = _sum(deltas)
    if normalize:
      mixed = _divide(mixed, _expand(scalars["total"], mixed), shared)
  return base + _pin(mixed * _expand(scalars["scale"], mixed), shared)


def pair(tensors: Tensors, scalars: Arrays, shared: Arrays) -> jax.Array:
  """c_0 t_0 + c_1 t_1; `coefficient` [L, 2]."""
  first, second = (_pin(_f32(t) * _expand(scalars["coefficient"][:, i], t), shared) for i, t in enumerate(tensors))
  return first + second


def average_and_base(tensors: Tensors, scalars: Arrays, shared: Arrays) -> jax.Array:
  """r mean_i(t_i) + (1 - r) base for (base, t_1, ..., t_n); `ratio` and `count` (n) [L]."""
  base, ratio = _f32(tensors[0]), _expand(scalars["ratio"], tensors[0])
  mean = _divide(_sum([_f32(t) for t in tensors[1:]]), _expand(scalars["count"], base), shared)
  return _pin(ratio * mean, shared) + _pin((1 - ratio) * base, shared)


def magnitude_bits(x: jax.Array) -> jax.Array:
  """The bits of |x|, which as uint32 are in the order of the magnitudes."""
  return jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.uint32)


def bucket_of(x: jax.Array) -> jax.Array:
  """The first 20 bits of |x|: magnitudes within 1/4096 of each other share a bucket."""
  return (magnitude_bits(x) >> 11).astype(jnp.int32)


def _dropped(shape: tuple[int, ...], code: jax.Array, steps: jax.Array, shared: Arrays) -> jax.Array:
  draws = masks.draws((shared["key"][0], shared["key"][1]), code, shape, shared["first"], shared.get("half"))
  return draws < steps.reshape(-1, *(1,) * (len(shape) - 1))


def _sum(terms: list[jax.Array]) -> jax.Array:
  """From left to right."""
  return sum(terms[1:], terms[0])


def _f32(x: jax.Array) -> jax.Array:
  return x.astype(jnp.float32)


def _expand(scalar: jax.Array, like: jax.Array) -> jax.Array:
  """[L] -> [L, 1, ...]."""
  return scalar.reshape(-1, *(1,) * (like.ndim - 1))


def _multiply_add(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
  """a * b + c, rounded once to float32, as torch's `addcmul_` does: the product is exact in float64."""
  with jax.enable_x64(True):
    wide = a.astype(jnp.float64) * b.astype(jnp.float64) + c.astype(jnp.float64)
    return wide.astype(jnp.float32)


def _pin(x: jax.Array, shared: Arrays) -> jax.Array:
  """x, rounded: no fusion looks through the exclusive or with a zero that the compiler cannot know to be one."""
  return _to_float(_to_bits(x) ^ _zero(x, shared))


def _zero(x: jax.Array, shared: Arrays) -> jax.Array:
  """The caller's zero, an argument of the compiled program; within another program, where it would be a constant, one
  made of the data: n (n + 1) is even."""
  if shared["zero"] is not None:
    return shared["zero"]
  bits = _to_bits(x)
  return (bits * (bits + 1)) & 1


def _divide(x: jax.Array, divisor: jax.Array, shared: Arrays) -> jax.Array:
  """x / divisor, rounded once: a divisor that seems to vary by entry is not replaced by a factor."""
  return x / _to_float(_to_bits(divisor) ^ (_to_bits(x) & _zero(x, shared)))


def _to_bits(x: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _to_float(bits: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(bits, jnp.float32)
