"""Iterates over the tensors of a checkpoint in blocks, wherever the shards of the parameters are."""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

# Names of a leaf's tensors: one, or one for each layer of a stacked leaf.
TensorNames = str | tuple[str, ...]
# Entries read, converted or written at once: enough to amortise a call, few compared with the parameters.
BLOCK = 1 << 21


class Tensor(NamedTuple):
  """Describes a tensor of a checkpoint: a leaf, or layer `index` of a stacked leaf."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  leaf: Any
  index: int | None


def split_leaf(leaf: Any, names: TensorNames) -> list[Tensor]:
  """Splits a leaf into the tensors that it holds under these names."""
  if isinstance(names, str):
    return [Tensor(names, np.dtype(leaf.dtype), leaf.shape, leaf, None)]
  return [Tensor(name, np.dtype(leaf.dtype), leaf.shape[1:], leaf, i) for i, name in enumerate(names)]


def replicate(tensor: Tensor) -> Tensor:
  """Replicates a tensor that is spread over hosts; a collective, so all processes must call it."""
  if not isinstance(tensor.leaf, jax.Array) or tensor.leaf.is_fully_addressable:
    return tensor
  replicated = jax.sharding.NamedSharding(tensor.leaf.sharding.mesh, jax.sharding.PartitionSpec())
  leaf = _replicate_on_device(tensor.leaf, tensor.index or 0, stacked=tensor.index is not None, dtype=tensor.dtype,
                              sharding=replicated)
  return tensor._replace(index=None, leaf=leaf)


@functools.partial(jax.jit, static_argnames=("stacked", "dtype", "sharding"))
def _replicate_on_device(leaf: jax.Array, index: jax.Array | int, *, stacked: bool, dtype: np.dtype,
                         sharding: jax.sharding.Sharding) -> jax.Array:
  tensor = jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False) if stacked else leaf
  return jax.lax.with_sharding_constraint(tensor.astype(dtype), sharding)


def iterate_blocks(tensor: Tensor) -> Iterator[np.ndarray]:
  """Yields blocks of a tensor's rows, C-contiguous and in its dtype, assembled from the devices' shards."""
  tensor = replicate(tensor)
  rows = tensor.shape[0]
  step = max(1, BLOCK // max(1, math.prod(tensor.shape[1:])))
  parts = _addressable_parts(tensor.leaf)
  for begin in range(0, rows, step):
    end = min(begin + step, rows)
    block = None
    for bounds, data in parts:
      index = None
      if tensor.index is not None:
        (first, last), *bounds = bounds
        if not first <= tensor.index < last:
          continue
        index = tensor.index - first
      low, high = max(begin, bounds[0][0]), min(end, bounds[0][1])
      if low >= high:
        continue
      rows_of_part = _read_rows(data, index, low - bounds[0][0], high - low, tensor.dtype)
      if rows_of_part.shape == (end - begin, *tensor.shape[1:]):
        block = rows_of_part
        break
      block = np.empty((end - begin, *tensor.shape[1:]), tensor.dtype) if block is None else block
      block[(slice(low - begin, high - begin), *(slice(*b) for b in bounds[1:]))] = rows_of_part
    yield np.ascontiguousarray(block)


def _addressable_parts(leaf: Any) -> list[tuple[list[tuple[int, int]], Any]]:
  """Lists (begin, end) on each axis and the data of every distinct shard of an array."""
  if not isinstance(leaf, jax.Array):
    return [([(0, size) for size in leaf.shape], leaf)]
  shards = {}
  for shard in leaf.addressable_shards:
    bounds = tuple(axis.indices(size)[:2] for axis, size in zip(shard.index, leaf.shape, strict=True))
    shards.setdefault(bounds, shard.data)
  return [(list(bounds), data) for bounds, data in shards.items()]


def _read_rows(data: Any, index: int | None, begin: int, count: int, dtype: np.dtype) -> np.ndarray:
  """Copies rows of one device's shard, or of a layer of it, to the host in this dtype."""
  if isinstance(data, jax.Array):
    if data.dtype != dtype or next(iter(data.devices())).platform != "cpu":
      return np.asarray(_slice_on_device(data, index or 0, begin, stacked=index is not None, count=count, dtype=dtype))
    data = np.asarray(data)  # no copy
  rows = data if index is None else data[index]
  return rows[begin:begin + count].astype(dtype, copy=False)


@functools.partial(jax.jit, static_argnames=("stacked", "count", "dtype"))
def _slice_on_device(data: jax.Array, index: jax.Array | int, begin: jax.Array | int, *, stacked: bool, count: int,
                     dtype: np.dtype) -> jax.Array:
  rows = jax.lax.dynamic_index_in_dim(data, index, keepdims=False) if stacked else data
  return jax.lax.dynamic_slice_in_dim(rows, begin, count).astype(dtype)
