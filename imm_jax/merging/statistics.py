"""Statistics of whole tensors that some methods need before they merge: angles, order statistics, counts.

The sums here are of integers, so that the result does not depend on blocks, devices or layout; those of `sce` are of
float64, in the order of the blocks. A `Source` provides the tensors (from trees in memory or checkpoints on disk) and
adds up the statistics below over a tensor's parts. For tensors that jax traces (under jit, grad, vmap, eval_shape) they
are computed in the trace in float32, so that gradients flow through their smooth parts.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from imm_jax.merging import kernels

# A statistic of a tensor or part of one: (tensor of every model, arguments) -> sums.
Statistic = Callable[..., jax.Array]
_HIGH_BITS, _LOW_BITS = 16, 15


class Source(Protocol):
  """Provides the tensors of several models, base first where there is one."""

  names: Sequence[str]
  num_models: int
  # Names of the models in errors.
  labels: Sequence[str]
  # Whether the first model is a base.
  has_base: bool
  # First layer among the names, where lists over the layers begin.
  first_layer: int
  # Stack of layers -> where lists over the layers end, and the number of layers of the whole output.
  layers: Mapping[str, int]
  output_layers: Mapping[str, int]
  # Whether jax traces the tensors, so that their values are not concrete.
  traced: bool

  def size(self, name: str) -> int:
    """Returns the number of entries of a tensor."""

  def reduce(self, statistic: Statistic, combine: Callable[[np.ndarray, np.ndarray], np.ndarray],
             arguments: Callable[[str], Mapping[str, ArrayLike]] = lambda _: {}, names: Sequence[str] | None = None,
             **static: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields name and statistic of each tensor (of `names`); `combine` joins the statistics of a tensor's parts.

    With `rows` among the static arguments a part holds whole rows, [rows, columns]; else it has any shape.
    """

  def tensors(self, name: str) -> list[jax.Array]:
    """Returns a traced tensor of every model in float32."""


# Selects what to measure: (float32 tensor of every model) -> vectors of equal shape.
View = Callable[[Sequence[jax.Array]], Sequence[jax.Array]]


def task_vectors(tensors: Sequence[jax.Array]) -> list[jax.Array]:
  """Subtracts the base, which comes first, from the other models."""
  return [tensor - tensors[0] for tensor in tensors[1:]]


def models(tensors: Sequence[jax.Array]) -> list[jax.Array]:
  """Returns the models themselves."""
  return list(tensors)


def as_matrix(tensor: jax.Array) -> jax.Array:
  """Reshapes a tensor to [rows, columns]; below two axes it becomes one row."""
  return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:])) if tensor.ndim > 1 else tensor.reshape(1, -1)


def namespace(*values: Any) -> Any:
  """Returns jax.numpy if any value is a jax array, else numpy."""
  return jnp if any(isinstance(value, jax.Array) for value in values) else np


def cosines(source: Source, view: View) -> dict[str, tuple[Any, Any]]:
  """Computes norms [n] and cosines [n, n] of each tensor's vectors, in float64 from exact sums of float32 products.

  The cosine of a zero vector with any other is 0. For traced tensors both are float32 jax arrays.
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
      first = source.num_models - len(peak)  # 1 for task vectors: the base itself may be what is not finite
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
  # sqrt has no derivative at 0; the branch not taken must have a finite one too.
  lengths = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
  norms = jnp.outer(lengths, lengths)
  cosine = jnp.where(norms > 0, grid / jnp.where(norms > 0, norms, 1.0), 0.0)
  return lengths * peak[:, 0], jnp.clip(cosine, -1, 1)


def select_magnitudes(source: Source, ranks: Mapping[Any, np.ndarray], group_of: Mapping[str, Sequence[Any]],
                      names: Sequence[str], view: View = task_vectors, rows: bool = False,
                      ) -> dict[tuple[Any, int], Any]:
  """Finds exact order statistics of the magnitudes |v_i| of task vectors, or of the vectors that `view` returns.

  Args:
    source: the models.
    ranks: group -> [m]: the ranks to find, counted over the group from 0 for the smallest magnitude.
    group_of: tensor name -> group for each of the n vectors.
    names: the tensors over which ranks are counted.
    view: computes the vectors from the models.
    rows: whether `view` needs whole rows.

  Returns:
    (group, vector) -> uint32 [m], the bits of the magnitudes with these ranks.
  """
  if source.traced:
    parts: dict[tuple[Any, int], list[jax.Array]] = {}
    for name in names:
      tensors = [as_matrix(t) for t in source.tensors(name)] if rows else source.tensors(name)
      for i, (group, vector) in enumerate(zip(group_of[name], view(tensors), strict=True)):
        parts.setdefault((group, i), []).append(kernels.magnitude_bits(vector).reshape(-1))
    return {key: jnp.sort(jnp.concatenate(bits))[ranks[key[0]]] for key, bits in parts.items()}
  static: dict[str, Any] = {"view": view} | ({"rows": True} if rows else {})
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
  """Returns float32 [n]: the largest magnitude of each vector; 0 for empty ones."""
  return jnp.stack([jnp.max(jnp.abs(v), initial=0.0) for v in _vectors(tensors, view)])


def _products(tensors: Sequence[jax.Array], *, shrink: jax.Array, grow: jax.Array, view: View) -> jax.Array:
  """Returns int64 [n, n]: inner products in fixed point. `shrink` scales vectors below 1, `grow` scales products."""
  vectors = [v * shrink[i] for i, v in enumerate(_vectors(tensors, view))]
  product = lambda a, b: jnp.sum(((a * b) * grow).astype(jnp.int64))
  upper = {(i, j): product(vectors[i], vectors[j]) for i in range(len(vectors)) for j in range(i, len(vectors))}
  return jnp.stack([jnp.stack([upper[min(i, j), max(i, j)] for j in range(len(vectors))])
                    for i in range(len(vectors))])


def _high_counts(tensors: Sequence[jax.Array], *, view: View, rows: bool = False) -> jax.Array:
  """Returns int32 [n, 65536]: a histogram of the first 16 of 31 bits of the magnitudes."""
  del rows
  return jnp.stack([_histogram((kernels.magnitude_bits(v) >> _LOW_BITS).astype(jnp.int32), 1 << _HIGH_BITS)
                    for v in _vectors(tensors, view)])


def _low_counts(tensors: Sequence[jax.Array], *, top: jax.Array, view: View, rows: bool = False) -> jax.Array:
  """Returns int32 [n, m, 32768]: a histogram of the last 15 bits of the magnitudes that begin with top [n, m]."""
  del rows

  def count(v: jax.Array, first: jax.Array) -> jax.Array:
    bits = kernels.magnitude_bits(v)
    last = (bits & ((1 << _LOW_BITS) - 1)).astype(jnp.int32)
    return _histogram(jnp.where((bits >> _LOW_BITS).astype(jnp.int32) == first, last, -1), 1 << _LOW_BITS)

  vectors = _vectors(tensors, view)
  return jnp.stack([jnp.stack([count(v, top[i, m]) for m in range(top.shape[1])]) for i, v in enumerate(vectors)])


def _histogram(bins: jax.Array, count: int) -> jax.Array:
  """Counts the occurrences of each bin; negative bins are ignored."""
  return jnp.zeros(count, jnp.int32).at[jnp.where(bins < 0, count, bins)].add(1, mode="drop")
