"""What some methods must know of a whole tensor before they merge it: angles, order statistics, ranks.

Everything is summed as integers, so that the result does not depend on blocks, devices or layout. `Source` is where
tensors come from (trees in memory, checkpoints on disk); it sums the statistics below over a tensor's parts.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax.merging import kernels

# Statistics of one tensor, or of a part of one: (tensor of every model, arguments) -> integers.
Statistic = Callable[..., jax.Array]
_HIGH_BITS, _LOW_BITS, BUCKETS = 16, 15, 1 << 20


class Source(Protocol):
  """The tensors of several models, base first where there is one."""

  names: Sequence[str]
  num_models: int

  def size(self, name: str) -> int:
    """Elements of a tensor."""

  def reduce(self, statistic: Statistic, combine: Callable[[np.ndarray, np.ndarray], np.ndarray],
             arguments: Callable[[str], Mapping[str, np.ndarray]] = lambda _: {}, names: Sequence[str] | None = None,
             **static: Any) -> Iterator[tuple[str, np.ndarray]]:
    """For each tensor (of `names`) its name and the statistic over all of it; parts are joined by `combine`."""


def cosines(source: Source, *, deltas: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """By tensor the norms [n] and the cosines [n, n] of its models, in float64 from exact sums of float32 products.

  Args:
    source: n models, or with `deltas` a base and n models.
    deltas: measure what models have less the base.

  A zero vector has the cosine 0 with everything.
  """
  peaks = dict(source.reduce(_peak, np.maximum, deltas=deltas))
  exponents = {name: np.frexp(peak.astype(np.float64))[1] for name, peak in peaks.items()}
  bits = {name: 62 - max(1, math.ceil(math.log2(max(source.size(name), 1)))) for name in source.names}
  arguments = lambda name: {"shrink": np.ldexp(np.float32(1), -exponents[name]).astype(np.float32),
                            "grow": np.ldexp(np.float32(1), bits[name]).astype(np.float32)}
  result = {}
  for name, peak in peaks.items():
    if not np.isfinite(peak).all():
      raise ValueError(f"{name} has values that are not finite, so that it has no direction")
  for name, sums in source.reduce(_products, np.add, arguments, deltas=deltas):
    grid = np.ldexp(sums.astype(np.float64), -bits[name])  # products of vectors divided by 2**exponent
    lengths = np.sqrt(np.diag(grid))
    norms = np.outer(lengths, lengths)
    cosine = np.divide(grid, norms, out=np.zeros_like(grid), where=norms > 0).clip(-1, 1)
    result[name] = (np.ldexp(lengths, exponents[name]), cosine)
  return result


def magnitudes_of_rank(source: Source, ranks: Mapping[Any, np.ndarray], group_of: Mapping[str, Sequence[Any]],
                       names: Sequence[str]) -> dict[tuple[Any, int], np.ndarray]:
  """Exact order statistics of |t_i - base|.

  Args:
    source: a base and n models.
    ranks: group -> [m]: the ranks that are asked for, 0 the smallest magnitude, counted over the group.
    group_of: tensor name -> group for each of the n models.
    names: the tensors to count.

  Returns:
    (group, model) -> uint32 [m], the bits of the magnitudes with these ranks.
  """
  find = lambda histogram, rank: np.searchsorted(np.cumsum(histogram), rank, side="right")
  high: dict[tuple[Any, int], np.ndarray] = {}
  for name, counts in source.reduce(_high_counts, np.add, names=names):
    for i, group in enumerate(group_of[name]):
      high[group, i] = high.get((group, i), 0) + counts[i].astype(np.int64)
  top = {key: find(histogram, ranks[key[0]]) for key, histogram in high.items()}
  low: dict[tuple[Any, int], np.ndarray] = {}
  arguments = lambda name: {"top": np.stack([top[group, i] for i, group in enumerate(group_of[name])]).astype(np.int32)}
  for name, counts in source.reduce(_low_counts, np.add, arguments, names=names):
    for i, group in enumerate(group_of[name]):
      low[group, i] = low.get((group, i), 0) + counts[i].astype(np.int64)
  result = {}
  for key, counts in low.items():
    before = np.concatenate([[0], np.cumsum(high[key])])[top[key]]
    rest = [find(counts[m], rank - before[m]) for m, rank in enumerate(ranks[key[0]])]
    result[key] = (top[key].astype(np.uint32) << _LOW_BITS) | np.array(rest, np.uint32)
  return result


def mean_ranks(source: Source, name: str) -> np.ndarray:
  """float64 [n, BUCKETS]: where a magnitude |t_i - base| of a bucket stands among those of the tensor, from 0 to 1.

  Equal magnitudes share their mean rank, and so do those that agree in their first 13 binary digits.
  """
  (_, counts), = source.reduce(_bucket_counts, np.add, names=[name])
  counts = counts.astype(np.int64)
  first = np.cumsum(counts, axis=1) - counts
  return (first + (counts - 1) / 2).clip(0) / max(1, source.size(name) - 1)


def _vectors(tensors: Sequence[jax.Array], deltas: bool) -> list[jax.Array]:
  floats = [t.astype(jnp.float32) for t in tensors]
  return [t - floats[0] for t in floats[1:]] if deltas else floats


def _peak(tensors: Sequence[jax.Array], *, deltas: bool) -> jax.Array:
  """float32 [n]: the greatest magnitude of each vector; 0 for empty ones."""
  return jnp.stack([jnp.max(jnp.abs(v), initial=0.0) for v in _vectors(tensors, deltas)])


def _products(tensors: Sequence[jax.Array], *, shrink: jax.Array, grow: jax.Array, deltas: bool) -> jax.Array:
  """int64 [n, n]: inner products in fixed point; vectors are shrunk below 1 first, products then grown."""
  vectors = [v * shrink[i] for i, v in enumerate(_vectors(tensors, deltas))]
  product = lambda a, b: jnp.sum(((a * b) * grow).astype(jnp.int64))
  upper = {(i, j): product(vectors[i], vectors[j]) for i in range(len(vectors)) for j in range(i, len(vectors))}
  return jnp.stack([jnp.stack([upper[min(i, j), max(i, j)] for j in range(len(vectors))])
                    for i in range(len(vectors))])


def _high_counts(tensors: Sequence[jax.Array]) -> jax.Array:
  """int32 [n, 65536]: how many magnitudes have these first 16 of 31 bits."""
  return jnp.stack([_histogram((kernels.magnitude_bits(v) >> _LOW_BITS).astype(jnp.int32), 1 << _HIGH_BITS)
                    for v in _vectors(tensors, deltas=True)])


def _low_counts(tensors: Sequence[jax.Array], *, top: jax.Array) -> jax.Array:
  """int32 [n, m, 32768]: of the magnitudes that begin with top [n, m], how many go on with these 15 bits."""

  def count(v: jax.Array, first: jax.Array) -> jax.Array:
    bits = kernels.magnitude_bits(v)
    last = (bits & ((1 << _LOW_BITS) - 1)).astype(jnp.int32)
    return _histogram(jnp.where((bits >> _LOW_BITS).astype(jnp.int32) == first, last, -1), 1 << _LOW_BITS)

  vectors = _vectors(tensors, deltas=True)
  return jnp.stack([jnp.stack([count(v, top[i, m]) for m in range(top.shape[1])]) for i, v in enumerate(vectors)])


def _bucket_counts(tensors: Sequence[jax.Array]) -> jax.Array:
  """int32 [n, BUCKETS]."""
  return jnp.stack([_histogram(kernels.bucket_of(v), BUCKETS) for v in _vectors(tensors, deltas=True)])


def _histogram(bins: jax.Array, count: int) -> jax.Array:
  """How often each bin occurs; negative ones do not count."""
  return jnp.zeros(count, jnp.int32).at[jnp.where(bins < 0, count, bins)].add(1, mode="drop")
