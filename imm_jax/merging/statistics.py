"""What some methods must know of a whole tensor before they merge it: angles, order statistics, counts.

Everything is summed as integers, so that the result does not depend on blocks, devices or layout. `Source` is where
tensors come from (trees in memory, checkpoints on disk); it sums the statistics below over a tensor's parts. Tensors
that jax traces (under jit, grad, vmap, eval_shape) are measured within the trace, in float32, so that gradients go
through what is smooth.
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
_HIGH_BITS, _LOW_BITS = 16, 15


class Source(Protocol):
  """The tensors of several models, base first where there is one."""

  names: Sequence[str]
  num_models: int
  # What the models are called in errors.
  labels: Sequence[str]
  # Whether the first model is a base.
  has_base: bool
  # The first layer among the names, where a list over the layers begins.
  first_layer: int
  # Whether jax traces the tensors, so that their values are not known.
  traced: bool

  def size(self, name: str) -> int:
    """Elements of a tensor."""

  def reduce(self, statistic: Statistic, combine: Callable[[np.ndarray, np.ndarray], np.ndarray],
             arguments: Callable[[str], Mapping[str, np.ndarray]] = lambda _: {}, names: Sequence[str] | None = None,
             **static: Any) -> Iterator[tuple[str, np.ndarray]]:
    """For each tensor (of `names`) its name and the statistic over all of it; parts are joined by `combine`.

    With `rows` among the static arguments a part holds whole rows, [rows, columns]; else it is of any form.
    """

  def tensors(self, name: str) -> list[jax.Array]:
    """A traced tensor of every model, float32."""


# What of the models a statistic is of: (float32 tensor of every model) -> vectors of one form.
View = Callable[[Sequence[jax.Array]], Sequence[jax.Array]]


def task_vectors(tensors: Sequence[jax.Array]) -> list[jax.Array]:
  """What models have less the base, which is the first."""
  return [tensor - tensors[0] for tensor in tensors[1:]]


def models(tensors: Sequence[jax.Array]) -> list[jax.Array]:
  """The models themselves."""
  return list(tensors)


def rows_of(tensor: jax.Array) -> jax.Array:
  """[rows, columns] of one tensor; one of at most one axis is one row."""
  return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:])) if tensor.ndim > 1 else tensor.reshape(1, -1)


def namespace(*values: Any) -> Any:
  """numpy, or jax.numpy where any of these is jax's."""
  return jnp if any(isinstance(value, jax.Array) for value in values) else np


def cosines(source: Source, view: View) -> dict[str, tuple[Any, Any]]:
  """By tensor the norms [n] and the cosines [n, n] of vectors, in float64 from exact sums of float32 products.

  A zero vector has the cosine 0 with everything. Of traced tensors they are float32, by jax.
  """
  if source.traced:
    return {name: _traced_cosines(view(source.tensors(name))) for name in source.names}
  peaks = dict(source.reduce(_peak, np.maximum, view=view))
  exponents = {name: np.frexp(peak.astype(np.float64))[1] for name, peak in peaks.items()}
  bits = {name: 62 - max(1, math.ceil(math.log2(max(source.size(name), 1)))) for name in source.names}
  arguments = lambda name: {"shrink": np.ldexp(np.float32(1), -exponents[name]).astype(np.float32),
                            "grow": np.ldexp(np.float32(1), bits[name]).astype(np.float32)}
  result = {}
  for name, peak in peaks.items():
    if not np.isfinite(peak).all():
      first = source.num_models - len(peak)  # where a base is taken away, it may be what is not finite
      which = [*source.labels[:first if not np.isfinite(peak).any() else 0],
               *(label for label, p in zip(source.labels[first:], peak, strict=True) if not np.isfinite(p))]
      raise ValueError(f"{name} has NaN or infinity in {' or '.join(which)}, so that it has no direction")
  for name, sums in source.reduce(_products, np.add, arguments, view=view):
    grid = np.ldexp(sums.astype(np.float64), -bits[name])  # products of vectors divided by 2**exponent
    lengths = np.sqrt(np.diag(grid))
    norms = np.outer(lengths, lengths)
    cosine = np.divide(grid, norms, out=np.zeros_like(grid), where=norms > 0).clip(-1, 1)
    result[name] = (np.ldexp(lengths, exponents[name]), cosine)
  return result


def _traced_cosines(vectors: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
  flat = jnp.stack([vector.reshape(-1) for vector in vectors])
  peak = jax.lax.stop_gradient(jnp.max(jnp.abs(flat), axis=1, keepdims=True, initial=0.0))
  flat = flat / jnp.where(peak > 0, peak, 1.0)
  grid = jnp.einsum("ik,jk->ij", flat, flat, precision="highest")
  squares = jnp.diag(grid)
  # The root of 0 has no derivative; what is not taken must be finite too.
  lengths = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
  norms = jnp.outer(lengths, lengths)
  cosine = jnp.where(norms > 0, grid / jnp.where(norms > 0, norms, 1.0), 0.0)
  return lengths * peak[:, 0], jnp.clip(cosine, -1, 1)


def magnitudes_of_rank(source: Source, ranks: Mapping[Any, np.ndarray], group_of: Mapping[str, Sequence[Any]],
                       names: Sequence[str], view: View = task_vectors, rows: bool = False,
                       ) -> dict[tuple[Any, int], Any]:
  """Exact order statistics of |v_i|, of task vectors t_i - base or of what `view` makes.

  Args:
    source: the models.
    ranks: group -> [m]: the ranks that are asked for, 0 the smallest magnitude, counted over the group.
    group_of: tensor name -> group for each of the n vectors.
    names: the tensors to count.
    view: what the vectors are.
    rows: it needs whole rows.

  Returns:
    (group, vector) -> uint32 [m], the bits of the magnitudes with these ranks.
  """
  if source.traced:
    parts: dict[tuple[Any, int], list[jax.Array]] = {}
    for name in names:
      tensors = [rows_of(t) for t in source.tensors(name)] if rows else source.tensors(name)
      for i, (group, vector) in enumerate(zip(group_of[name], view(tensors), strict=True)):
        parts.setdefault((group, i), []).append(kernels.magnitude_bits(vector).reshape(-1))
    return {key: jnp.sort(jnp.concatenate(found))[ranks[key[0]]] for key, found in parts.items()}
  static = {"view": view} | ({"rows": True} if rows else {})
  find = lambda histogram, rank: np.searchsorted(np.cumsum(histogram), rank, side="right")
  high: dict[tuple[Any, int], np.ndarray] = {}
  for name, counts in source.reduce(_high_counts, np.add, names=names, **static):
    for i, group in enumerate(group_of[name]):
      high[group, i] = high.get((group, i), 0) + counts[i].astype(np.int64)
  top = {key: find(histogram, ranks[key[0]]) for key, histogram in high.items()}
  low: dict[tuple[Any, int], np.ndarray] = {}
  arguments = lambda name: {"top": np.stack([top[group, i] for i, group in enumerate(group_of[name])]).astype(np.int32)}
  for name, counts in source.reduce(_low_counts, np.add, arguments, names=names, **static):
    for i, group in enumerate(group_of[name]):
      low[group, i] = low.get((group, i), 0) + counts[i].astype(np.int64)
  result = {}
  for key, counts in low.items():
    before = np.concatenate([[0], np.cumsum(high[key])])[top[key]]
    rest = [find(counts[m], rank - before[m]) for m, rank in enumerate(ranks[key[0]])]
    result[key] = (top[key].astype(np.uint32) << _LOW_BITS) | np.array(rest, np.uint32)
  return result


def _vectors(tensors: Sequence[jax.Array], view: View) -> Sequence[jax.Array]:
  return view([tensor.astype(jnp.float32) for tensor in tensors])


def _peak(tensors: Sequence[jax.Array], *, view: View) -> jax.Array:
  """float32 [n]: the greatest magnitude of each vector; 0 for empty ones."""
  return jnp.stack([jnp.max(jnp.abs(v), initial=0.0) for v in _vectors(tensors, view)])


def _products(tensors: Sequence[jax.Array], *, shrink: jax.Array, grow: jax.Array, view: View) -> jax.Array:
  """int64 [n, n]: inner products in fixed point; vectors are shrunk below 1 first, products then grown."""
  vectors = [v * shrink[i] for i, v in enumerate(_vectors(tensors, view))]
  product = lambda a, b: jnp.sum(((a * b) * grow).astype(jnp.int64))
  upper = {(i, j): product(vectors[i], vectors[j]) for i in range(len(vectors)) for j in range(i, len(vectors))}
  return jnp.stack([jnp.stack([upper[min(i, j), max(i, j)] for j in range(len(vectors))])
                    for i in range(len(vectors))])


def _high_counts(tensors: Sequence[jax.Array], *, view: View, rows: bool = False) -> jax.Array:
  """int32 [n, 65536]: how many magnitudes have these first 16 of 31 bits."""
  del rows
  return jnp.stack([_histogram((kernels.magnitude_bits(v) >> _LOW_BITS).astype(jnp.int32), 1 << _HIGH_BITS)
                    for v in _vectors(tensors, view)])


def _low_counts(tensors: Sequence[jax.Array], *, top: jax.Array, view: View, rows: bool = False) -> jax.Array:
  """int32 [n, m, 32768]: of the magnitudes that begin with top [n, m], how many go on with these 15 bits."""
  del rows

  def count(v: jax.Array, first: jax.Array) -> jax.Array:
    bits = kernels.magnitude_bits(v)
    last = (bits & ((1 << _LOW_BITS) - 1)).astype(jnp.int32)
    return _histogram(jnp.where((bits >> _LOW_BITS).astype(jnp.int32) == first, last, -1), 1 << _LOW_BITS)

  vectors = _vectors(tensors, view)
  return jnp.stack([jnp.stack([count(v, top[i, m]) for m in range(top.shape[1])]) for i, v in enumerate(vectors)])


def _histogram(bins: jax.Array, count: int) -> jax.Array:
  """How often each bin occurs; negative ones do not count."""
  return jnp.zeros(count, jnp.int32).at[jnp.where(bins < 0, count, bins)].add(1, mode="drop")
