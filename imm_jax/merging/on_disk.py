"""Merges HF checkpoints on disk in blocks, bit-identical to merging trees in memory.

Only blocks are held, so memory does not grow with the model: one thread reads and digests, others merge and write. A
block is a run of entries; where masks are drawn, it is whole rows or part of one row. A method that looks along columns
(`nuslerp` with `row_wise`) needs whole tensors: for each of up to ten that wait or are merged, all inputs, and while it
is merged some copies in float32.
"""

import contextlib
import functools
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from imm_jax.errors import UserError
from imm_jax.merging import kernels, registry, users_kernels
from imm_jax.merging.registry import Plan
from imm_jax.merging.source import BLOCK, Buffers, CheckpointSource, is_floating, on_cpu
from imm_jax.model import checkpoint_folder
from imm_jax.model.safetensors import Entry
from imm_jax.model.writer import WeightsWriter
from imm_jax.runtime import progress
from imm_jax.runtime.threads import BoundedPool

__all__ = ["BLOCK", "CheckpointSource", "Output", "Part", "Result", "merge", "merge_folders", "merge_parts"]

_SMALL = 1 << 14
_BFLOAT16 = np.dtype(jnp.bfloat16)
_MAX_WORKERS = 8


class Output(NamedTuple):
  """Describes a checkpoint to write: its new folder, its plan, and its dtype (None: that of the first model)."""

  folder: Path
  plan: Plan
  dtype: np.dtype | None = None


class Part(NamedTuple):
  """Holds a part of the outputs' tensors: their source, the plan of each output, and a prefix of the inputs' labels."""

  source: CheckpointSource
  plans: Sequence[Plan]
  prefix: str = ""


class Result(NamedTuple):
  """Digests of the inputs and overflows in the outputs.

  Attributes:
    digests: label -> digest of each input: XXH3 (128 bits) over name, dtype, shape and bytes of its tensors in the
      order of the model, so that the digest does not depend on how tensors are split into files.
    overflowed: for each output, tensor name -> number of entries that exceed the range of its dtype.
  """

  digests: dict[str, str]
  overflowed: list[Counter[str]]


def merge_folders(method: str, models: Mapping[str, Path], outputs: Mapping[Path, Mapping[str, Any]], *,
                  key: np.ndarray | None = None, dtype: np.dtype | None = None,
                  max_shard_bytes: int = checkpoint_folder.MAX_SHARD_BYTES, allow_nonfinite: bool = False) -> Result:
  """Merges checkpoint folders into one new folder for each set of options, reading the models once.

  Only weights are written; `folder.copy_side_files` copies the other files.

  Args:
    method: a name in `registry.list_disk_methods()`.
    models: label -> folder in the method's order, `base` first where it has one, such as
      {"base": ..., "models[0]": ...}.
    outputs: folder to write -> the method's options; a setting may be a number, a list over the layers, or a mapping
      from a regex of tensor names to either, see `imm_jax.merging`.
    key: words [2] of the key of all masks, see `masks.key_words`; zeros by default.
    dtype: dtype of the weights; that of the first model by default.
    max_shard_bytes: see `merge_parts`.
    allow_nonfinite: see `merge_parts`.

  Raises:
    UserError: if the models do not match.
    ValueError: if an option is invalid.
  """
  with CheckpointSource(models) as source:
    planned = [Output(folder, registry.METHODS[method](source, **settings), dtype)
               for folder, settings in outputs.items()]
    return merge(source, planned, key=np.zeros(2, np.uint32) if key is None else key, max_shard_bytes=max_shard_bytes,
                 allow_nonfinite=allow_nonfinite)


def merge(source: CheckpointSource, outputs: Sequence[Output], *, key: np.ndarray,
          max_shard_bytes: int = checkpoint_folder.MAX_SHARD_BYTES, allow_nonfinite: bool = False) -> Result:
  """Writes merged checkpoints from one pass over the inputs; calls `merge_parts` with one part.

  Args:
    source: the models.
    outputs: the checkpoints to write; their folders are created.
    key: see `merge_parts`.
    max_shard_bytes: see `merge_parts`.
    allow_nonfinite: see `merge_parts`.
  """
  targets = [(output.folder, output.dtype) for output in outputs]
  return merge_parts([Part(source, [output.plan for output in outputs])], targets, key=key,
                     max_shard_bytes=max_shard_bytes, allow_nonfinite=allow_nonfinite)


def merge_parts(parts: Sequence[Part], targets: Sequence[tuple[Path, np.dtype | None]], *, key: np.ndarray,
                max_shard_bytes: int = checkpoint_folder.MAX_SHARD_BYTES, allow_nonfinite: bool = False) -> Result:
  """Writes checkpoints whose tensors come from several sources, such as slices of layers.

  Args:
    parts: disjoint sets of tensors with their sources.
    targets: folder of each output, which is created, and its dtype (None: that of the part's first model).
    key: words [2] of the key of all masks, see `masks.key_words`.
    max_shard_bytes: a larger checkpoint is written as several files with an index.
    allow_nonfinite: also merge tensors with NaN or infinity.

  Raises:
    UserError: for a tensor with NaN or infinity, unless allowed, for NaN that a method makes of finite numbers, and for
      non-floating tensors that differ.
  """
  tensors = sorted(((name, part) for part in parts for name in part.source.order),
                   key=lambda item: checkpoint_folder.model_order(item[0]))
  workers = max(2, min(_MAX_WORKERS, len(os.sched_getaffinity(0))))
  total = sum(e.size * e.dtype.itemsize for name, part in tensors for e in part.source.entries(name))
  with contextlib.ExitStack() as stack:
    writers = [stack.enter_context(WeightsWriter(folder, [
        (name, _output_dtype(part.source.entries(name)[0], dtype), part.source.entries(name)[0].shape)
        for name, part in tensors], max_shard_bytes)) for folder, dtype in targets]
    bar = stack.enter_context(progress.make_bar(total, "merge", "B", unit_scale=True))
    pool = BoundedPool(workers, workers + 2)
    stack.push(lambda kind, *_: pool.close(cancel=kind is not None))
    run = _MergeRun(writers, pool, bar, key, allow_nonfinite)
    digests: dict[str, str] = {}
    for part in parts:
      digests |= run.merge(part)
  return Result(digests, run.overflowed)


class _MergeRun:
  """Merges parts in one pass over the inputs."""

  def __init__(self, writers: Sequence[WeightsWriter], pool: BoundedPool, bar: Any, key: np.ndarray,
               allow_nonfinite: bool):
    self._writers, self._pool, self._bar, self._key, self._allow = writers, pool, bar, key, allow_nonfinite
    self._buffers = Buffers()
    self._lock = threading.Lock()
    self.overflowed: list[Counter[str]] = [Counter() for _ in writers]

  def merge(self, part: Part) -> dict[str, str]:
    """Merges the tensors of a part and digests its inputs."""
    source, plans = part.source, part.plans
    numbers_of = lambda name: [{k: _to_numpy(v) for k, v in plan.numbers(name).items()} for plan in plans]
    whole = next((plan.whole for plan in plans if plan.whole == "tensor"),
                 next((plan.whole for plan in plans if plan.whole), None))
    by_rows = whole is not None or any(plan.draws for plan in plans)
    shapes = _block_shapes(source, by_rows, whole)
    row_length = lambda name: max(1, source.row_length(name)) if by_rows else source.block
    digests = [xxhash.xxh3_128() for _ in source.folders]
    self._check_kernels(part, shapes)
    # Compile all combinations of shape and dtype in parallel, rather than one by one as their tensors come up.
    kinds = {(shapes[name], *(entry.dtype for entry in source.entries(name))): name
             for name in sorted(shapes, key=source.size, reverse=True)}
    for shape, *dtypes in kinds:
      name = kinds[shape, *dtypes]
      blank = [np.zeros((1, *shape), dtype) for dtype in dtypes]
      self._pool.submit(functools.partial(self._merge_block, part, name, 0, 0, blank, numbers_of(name), 1))
    for name in source.order:
      entries = source.entries(name)
      for entry, digest in zip(entries, digests, strict=True):
        digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
      if name not in shapes:
        copied = source.read_equal(name)
        for digest in digests:
          digest.update(copied.view(np.uint8).data)
        for writer in self._writers:
          writer.write(name, 0, copied)
        continue
      numbers, shape = numbers_of(name), shapes[name]
      for begin, count in _blocks(source.size(name), row_length(name), shape):
        self._pool.reserve()
        read: dict[Entry, np.ndarray] = {}
        for entry, digest in zip(entries, digests, strict=True):
          if entry not in read:  # in the first round one model is both base and start
            # The last block may be partly filled; the rest is neither read nor written.
            read[entry] = self._buffers.take(math.prod(shape), entry.dtype)
            source.read(entry, begin, read[entry][:count])
          digest.update(read[entry][:count].view(np.uint8).data)
        arrays = [read[entry].reshape(1, *shape) for entry in entries]
        self._pool.submit_reserved(
            functools.partial(self._merge_block, part, name, begin, count, arrays, numbers, row_length(name)),
            functools.partial(self._buffers.give, list(read.values())))
    return {part.prefix + label: digest.hexdigest() for label, digest in zip(source.folders, digests, strict=True)}

  def _check_kernels(self, part: Part, names: Iterable[str]) -> None:
    for plan in part.plans:
      try:
        users_kernels.check_kernel(plan, names, part.source.num_models)
      except kernels.KernelError as e:
        raise UserError(str(e)) from e

  def _merge_block(self, part: Part, name: str, begin: int, count: int, arrays: Sequence[np.ndarray],
                   numbers: Sequence[Any], row_length: int) -> None:
    shared = {"key": self._key, "zero": np.uint32(0), "first": np.array(divmod(begin, row_length), np.uint32)}
    inputs = {id(array): array.reshape(-1)[:count] for array in arrays}
    if not self._allow and not all(map(_is_finite, inputs.values())):
      for label, folder, array in zip(part.source.folders, part.source.folders.values(), arrays, strict=True):
        if not _is_finite(inputs[id(array)]):
          is_wide = np.isfinite(inputs[id(array)].astype(np.float64)).all()
          raise UserError(f"{name} has {'numbers beyond float32' if is_wide else 'NaN or infinity'} in {label} "
                          f"({folder}): a merge would {'make them infinite' if is_wide else 'spread it'}; take a sound "
                          "checkpoint, or allow it (--allow_nonfinite)")
    for i, (plan, writer, plan_numbers) in enumerate(zip(part.plans, self._writers, numbers, strict=True)):
      try:
        merged = _compute_block(plan, arrays, plan_numbers, shared, writer.dtype(name)).reshape(-1)[:count]
      except kernels.KernelError as e:
        raise UserError(f"{name}: {e}") from e
      if not _is_finite(merged):
        self._check_overflow(name, i, plan.kernel.__name__, inputs.values(), merged)
      if count:
        writer.write(name, begin, merged)
    with self._bar.get_lock():
      self._bar.update(sum(count * array.itemsize for array in arrays))

  def _check_overflow(self, name: str, output: int, method: str, inputs: Iterable[np.ndarray], merged: np.ndarray,
                      ) -> None:
    """Counts entries beyond the dtype's range where the inputs are finite; raises UserError if any are NaN instead."""
    finite = np.logical_and.reduce([np.isfinite(array.astype(np.float64)) for array in inputs])
    wide = merged.astype(np.float32)
    # Some dtypes of 8 bits have no infinity, but NaN instead. Where NaN is allowed, whole tensors and rows spread it.
    has_infinity = np.isinf(np.array(np.inf).astype(merged.dtype).astype(np.float32))
    if has_infinity and not self._allow and (undefined := int(np.isnan(wide).sum())):
      raise UserError(f"{name}: {method} gave NaN from finite inputs ({undefined} of {merged.size} entries), as a "
                      "division by zero does, or a number beyond float32")
    count = int((finite & (np.isinf(wide) if has_infinity else ~np.isfinite(wide))).sum())
    with self._lock:
      self.overflowed[output] += Counter({name: count} if count else {})


def _is_finite(array: np.ndarray) -> bool:
  """Returns whether all entries are finite in float32. Comparing exponent bits is far faster than np.isfinite."""
  if not array.size or array.dtype.itemsize not in (2, 4):
    with np.errstate(over="ignore"):
      return bool(np.isfinite(array.astype(np.float32)).all())
  bits = np.dtype(f"u{array.dtype.itemsize}")
  infinity = np.array(np.inf, array.dtype).view(bits)
  return bool((array.view(bits) & (np.iinfo(bits).max >> 1)).max() < infinity)


def _output_dtype(entry: Entry, wanted: np.dtype | None) -> np.dtype:
  """Returns the dtype in which a tensor is written."""
  return wanted if wanted is not None and is_floating(entry) else entry.dtype


def _to_numpy(value: Any) -> np.ndarray:
  """Converts a number of one tensor to an array [1, ...]; float64 becomes float32."""
  array = np.asarray(value)[None]
  return array.astype(np.float32) if array.dtype == np.float64 else array


def _compute_block(plan: Plan, arrays: Sequence[np.ndarray], numbers: Any, shared: Any, dtype: np.dtype,
                   ) -> np.ndarray:
  static = tuple(plan.static.items())
  pairs = (plan.draws and not plan.whole and arrays[0].shape[-1] % 2 == 0
           and {a.dtype for a in arrays} == {_BFLOAT16} == {dtype})
  with on_cpu():
    if pairs:
      return np.asarray(_compiled_pairs(plan.kernel, static)(
          tuple(a.view(np.uint32) for a in arrays), numbers, shared)).view(dtype)
    # Float64 is disabled in jax by default; the arithmetic is float32 in any case.
    with np.errstate(over="ignore", invalid="ignore"):  # the last block may end in uninitialized memory
      single = tuple(a.astype(np.float32) if a.dtype == np.float64 else a for a in arrays)
    narrow = np.dtype(np.float32) if dtype == np.float64 else dtype
    return np.asarray(_compiled(plan.kernel, static, narrow)(single, numbers, shared)).astype(dtype, copy=False)


def _block_shapes(source: CheckpointSource, by_rows: bool, whole: str | None) -> dict[str, tuple[int, ...]]:
  """Chooses the block shape of each tensor. There are few different ones, so that little is compiled."""
  shapes = {name: source.entries(name)[0].shape for name in source.names}
  if not by_rows:
    return {name: (_SMALL if source.size(name) <= _SMALL else source.block,) for name in shapes}
  if whole == "tensor":
    return {name: (shape[0], source.row_length(name)) if len(shape) > 1 else shape or (1,)
            for name, shape in shapes.items()}
  # Long rows are cut at even columns, because two columns share a word of random bits.
  width = math.inf if whole else max(2, source.block // 2 * 2)
  rows: dict[int, int] = {}  # row length -> rows of a block
  for name, shape in shapes.items():
    if len(shape) > 1 and source.size(name):
      columns = source.row_length(name)
      rows[columns] = max(rows.get(columns, 1), min(shape[0], max(1, source.block // columns)))
  result: dict[str, tuple[int, ...]] = {
      name: (1, width) if source.row_length(name) > width else (rows[source.row_length(name)], source.row_length(name))
      for name, shape in shapes.items() if len(shape) > 1 and source.size(name)}
  matrices = sorted(set(result.values()), key=math.prod)
  for name in shapes.keys() - result.keys():
    if whole:
      result[name] = (source.size(name) or 1,)
      continue
    # A tensor of one axis is one row; it takes the first row of a block that is wide enough.
    size = source.size(name)
    result[name] = next((m for m in matrices if m[1] >= size), (max(1, min(size, width)),))
  return result


def _blocks(size: int, row_length: int, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
  """Yields the first entry and the number of entries of each block. A block with part of a row ends with that row."""
  run, step = row_length if row_length > shape[-1] else max(size, 1), math.prod(shape)
  for first in range(0, size, run):
    for begin in range(first, min(first + run, size), step):
      yield begin, min(step, first + run - begin, size - begin)


@functools.cache
def _compiled(kernel: Callable[..., jax.Array], static: tuple[tuple[str, Any], ...], dtype: np.dtype,
              ) -> Callable[..., jax.Array]:
  def merge(tensors: tuple[jax.Array, ...], numbers: Any, shared: Any) -> jax.Array:
    floats = tuple(t.astype(jnp.float32) for t in tensors)
    return kernels.call(kernel, floats, numbers, shared, dict(static)).astype(dtype)

  return jax.jit(merge)


@functools.cache
def _compiled_pairs(kernel: Callable[..., jax.Array], static: tuple[tuple[str, Any], ...]) -> Callable[..., jax.Array]:
  """Compiles the kernel on pairs of bfloat16 in 32-bit words: neighbors share a draw, which is most of the work."""

  def merge(tensors: tuple[jax.Array, ...], numbers: Any, shared: Any) -> jax.Array:
    halves = []
    for half in (0, 1):  # a bfloat16 is the high half of a float32; the first of a pair is the low half of its word
      floats = tuple(jax.lax.bitcast_convert_type(t & np.uint32(0xFFFF0000) if half else t << 16, np.float32)
                     for t in tensors)
      merged = kernels.call(kernel, floats, numbers, {**shared, "half": half}, dict(static))
      halves.append(jax.lax.bitcast_convert_type(merged.astype(_BFLOAT16), np.uint16).astype(np.uint32))
    return halves[0] | halves[1] << 16

  return jax.jit(merge)
