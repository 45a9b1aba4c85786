"""Merges HF checkpoints on disk in blocks, with the bits of the functions on trees in memory.

Only blocks are held, so memory does not grow with the model: one thread reads and digests, others merge and write. A
block is a run of entries; where masks are drawn, whole rows or a part of one.
"""

import collections
import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash

from imm_jax import files, progress
from imm_jax.errors import UserError
from imm_jax.merging.methods import Plan
from imm_jax.merging.statistics import Statistic
from imm_jax.model import folder as checkpoint
from imm_jax.model.safetensors import Entry, Reader, aligned
from imm_jax.model.writer import WeightsWriter
from imm_jax.threads import BoundedPool

# Entries of a block: small enough for the caches, large enough to outweigh a call.
BLOCK = 1 << 19
_SMALL = 1 << 14
_BFLOAT16 = np.dtype(jax.numpy.bfloat16)
_MAX_WORKERS = 8


class Output(NamedTuple):
  """One merged checkpoint to write: into this new folder, by this plan, in this dtype (None: the first model's)."""

  folder: Path
  plan: Plan
  dtype: np.dtype | None = None


class CheckpointSource:
  """Checkpoint folders as the `Source` of a plan; use as a context manager."""

  def __init__(self, folders: Mapping[str, Path], *, block: int = BLOCK,
               only: Callable[[str], bool] | None = None):
    """Opens the folders and matches their tensors.

    Args:
      folders: label -> folder; the first one's tensors are what the others are compared with.
      block: entries that are held at once.
      only: says by name which tensors count; None for all.

    Raises:
      UserError: for what `folder.tensors` raises, and unless all have the same tensors; it names those that differ.
    """
    self.folders, self.block = dict(folders), block
    self._reader = Reader()
    try:
      self._models = [self._tensors(path) if only is None else
                      {name: entry for name, entry in checkpoint.tensors(path).items() if only(name)}
                      for path in self.folders.values()]
      _match(list(self.folders), self._models)
    except BaseException:
      self.close()
      raise
    self.order = sorted(self._models[0], key=checkpoint.model_order)
    self.names = [name for name in self.order if _floating(self._models[0][name])]
    self.num_models = len(self._models)

  def __enter__(self) -> "CheckpointSource":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes all files."""
    self._reader.close()

  def size(self, name: str) -> int:
    return self._models[0][name].size

  def row_length(self, name: str) -> int:
    """Entries of a tensor with one index on its first axis; a tensor of at most one axis is one row."""
    shape = self._models[0][name].shape
    return math.prod(shape[1:] if len(shape) > 1 else shape)

  def entries(self, name: str) -> list[Entry]:
    """Where a tensor lies in every model."""
    return [model[name] for model in self._models]

  def read(self, entry: Entry, begin: int, out: np.ndarray) -> None:
    """Fills `out` with a tensor's entries from `begin` on."""
    self._reader.read(entry, begin, out)

  def reduce(self, statistic: Statistic, combine: Callable[..., np.ndarray],
             arguments: Callable[[str], Mapping[str, np.ndarray]] = lambda _: {}, names: Sequence[str] | None = None,
             **static: Any) -> Iterator[tuple[str, np.ndarray]]:
    compiled = _compiled_statistic(statistic, tuple(static.items()))
    whole = names is None or len(names) == len(self.names)
    names, buffers = self.names if names is None else names, _Buffers()
    total = sum(e.size * e.dtype.itemsize for name in names for e in self.entries(name))
    # What is measured for one tensor belongs to the bar of the merge.
    with progress.bar(total, "measure", "B", quiet=not whole, unit_scale=True, leave=False) as bar:
      for name in names:
        numbers, result = dict(arguments(name)), None
        for begin in range(0, max(1, self.size(name)), self.block):
          count = min(self.block, self.size(name) - begin)
          tensors = [buffers.take(count, entry.dtype) for entry in self.entries(name)]
          for entry, tensor in zip(self.entries(name), tensors, strict=True):
            self.read(entry, begin, tensor)
          with jax.enable_x64(True), _on_cpu():  # for sums in int64 and float64
            part = np.asarray(compiled(tensors, numbers))
          result = part if result is None else combine(result, part)
          bar.update(sum(t.nbytes for t in tensors))
          buffers.give(tensors)
        yield name, result

  def _tensors(self, path: Path) -> dict[str, Entry]:
    """A model's tensors, less those that follow from the others."""
    found = checkpoint.tensors(path)
    head, embedding = found.get(checkpoint.HEAD), found.get(checkpoint.EMBEDDING)
    config = files.read_json(path / "config.json")
    tied = config.get("tie_word_embeddings")
    # Where config.json does not say, the family decides, and equal bytes tell.
    if head is not None and embedding is not None and (tied or tied is None):
      if self._equal([head, embedding]):
        del found[checkpoint.HEAD]
      elif tied:
        raise checkpoint.untied(path)
    return {name: entry for name, entry in found.items() if not checkpoint.is_rotary(name)}

  def _equal(self, entries: Sequence[Entry]) -> bool:
    if len({(e.dtype, e.shape) for e in entries}) > 1:
      return False
    for begin in range(0, entries[0].size, self.block):
      blocks = [aligned((min(self.block, e.size - begin),), e.dtype) for e in entries]
      for entry, block in zip(entries, blocks, strict=True):
        self.read(entry, begin, block)
      if len({block.tobytes() for block in blocks}) > 1:
        return False
    return True

  def read_equal(self, name: str) -> np.ndarray:
    """A tensor that is not merged; raises UserError unless it is the same in every model."""
    entries = self.entries(name)
    if not self._equal(entries):
      raise UserError(f"{name} of {entries[0].dtype} differs between the models; only floating tensors are merged")
    whole = aligned((entries[0].size,), entries[0].dtype)
    self.read(entries[0], 0, whole)
    return whole


def merge(source: CheckpointSource, outputs: Sequence[Output], *, key: np.ndarray,
          max_shard_bytes: int = checkpoint.MAX_SHARD_BYTES) -> dict[str, str]:
  """Writes merged checkpoints from one pass over the inputs.

  Args:
    source: the models.
    outputs: what to write; the folders are made here.
    key: words [2] of the key of all masks, see `masks.key_words`.
    max_shard_bytes: a larger checkpoint is written as several files with an index.

  Returns:
    Label -> digest of each input: XXH3 (128 bits) over name, dtype, shape and bytes of its tensors in the order of the
    model, so that the same tensors have one digest however they lie in files.
  """
  by_rows = any(output.plan.draws for output in outputs)
  dtype_of = lambda name, output: (output.dtype if output.dtype is not None and name in shapes
                                   else source.entries(name)[0].dtype)
  numbers_of = lambda name: [{k: np.asarray(v)[None] for k, v in output.plan.scalars(name).items()}
                             for output in outputs]
  shapes = _block_shapes(source, by_rows)
  row_length = lambda name: max(1, source.row_length(name)) if by_rows else source.block
  digests = [xxhash.xxh3_128() for _ in source.folders]
  workers = max(2, min(_MAX_WORKERS, len(os.sched_getaffinity(0))))
  total = sum(entry.size * entry.dtype.itemsize for name in source.order for entry in source.entries(name))
  with contextlib.ExitStack() as stack:
    writers = [stack.enter_context(WeightsWriter(
        output.folder, [(name, dtype_of(name, output), source.entries(name)[0].shape) for name in source.order],
        max_shard_bytes)) for output in outputs]
    bar = stack.enter_context(progress.bar(total, "merge", "B", unit_scale=True))
    pool, buffers = BoundedPool(workers, workers + 2), _Buffers()
    stack.push(lambda kind, *_: pool.close(cancel=kind is not None))

    def merge_block(name: str, begin: int, count: int, arrays: Sequence[np.ndarray], scalars: Sequence[Any]) -> None:
      shared = {"key": key, "zero": np.uint32(0), "first": np.array(divmod(begin, row_length(name)), np.uint32)}
      for output, writer, numbers in zip(outputs, writers, scalars, strict=True):
        merged = _merge_block(output.plan, arrays, numbers, shared, writer.dtype(name))
        if count:
          writer.write(name, begin, merged.reshape(-1)[:count])
      with bar.get_lock():
        bar.update(sum(count * array.itemsize for array in arrays))

    # What differs in shape or dtype is compiled side by side, not one after the other as the tensors come.
    kinds = {(shapes[name], *(entry.dtype for entry in source.entries(name))): name
             for name in sorted(shapes, key=source.size, reverse=True)}
    for shape, *dtypes in kinds:
      name = kinds[shape, *dtypes]
      blank = [aligned((1, *shape), dtype) for dtype in dtypes]
      pool.submit(functools.partial(merge_block, name, 0, 0, blank, numbers_of(name)))
    for name in source.order:
      entries = source.entries(name)
      for entry, digest in zip(entries, digests, strict=True):
        digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
      if name not in shapes:
        whole = source.read_equal(name)
        for digest in digests:
          digest.update(whole.view(np.uint8).data)
        for writer in writers:
          writer.write(name, 0, whole)
        continue
      scalars, shape = numbers_of(name), shapes[name]
      for begin, count in _blocks(source.size(name), row_length(name), shape):
        pool.reserve()
        read: dict[Entry, np.ndarray] = {}
        for entry, digest in zip(entries, digests, strict=True):
          if entry not in read:  # in the first round a model is both base and start
            # The end of a last block is not read, and not written.
            read[entry] = buffers.take(math.prod(shape), entry.dtype)
            source.read(entry, begin, read[entry][:count])
          digest.update(read[entry][:count].view(np.uint8).data)
        arrays = [read[entry].reshape(1, *shape) for entry in entries]
        pool.submit_reserved(functools.partial(merge_block, name, begin, count, arrays, scalars),
                             functools.partial(buffers.give, list(read.values())))
  return {label: digest.hexdigest() for label, digest in zip(source.folders, digests, strict=True)}


def _merge_block(plan: Plan, arrays: Sequence[np.ndarray], scalars: Any, shared: Any, dtype: np.dtype) -> np.ndarray:
  static = tuple(plan.static.items())
  pairs = plan.draws and arrays[0].shape[-1] % 2 == 0 and {a.dtype for a in arrays} == {_BFLOAT16} == {dtype}
  with _on_cpu():
    if pairs:
      return np.asarray(_compiled_pairs(plan.kernel, static)(
          tuple(a.view(np.uint32) for a in arrays), scalars, shared)).view(dtype)
    # XLA has no float64 here; the arithmetic is float32 in any case.
    with np.errstate(over="ignore", invalid="ignore"):  # what lies past the end of a last block is anything
      single = tuple(a.astype(np.float32) if a.dtype == np.float64 else a for a in arrays)
    narrow = np.dtype(np.float32) if dtype == np.float64 else dtype
    return np.asarray(_compiled(plan.kernel, static, narrow)(single, scalars, shared)).astype(dtype, copy=False)


def _block_shapes(source: CheckpointSource, by_rows: bool) -> dict[str, tuple[int, ...]]:
  """In which shape each tensor is merged, block by block: few different ones, so that little is compiled."""
  shapes = {name: source.entries(name)[0].shape for name in source.names}
  if not by_rows:
    return {name: (_SMALL if source.size(name) <= _SMALL else source.block,) for name in shapes}
  # A row that is too long is cut at even columns, for two of them share a word of random bits.
  width = max(2, source.block // 2 * 2)
  rows: dict[int, int] = {}  # by row length, of the tallest tensor
  for name, shape in shapes.items():
    if len(shape) > 1 and source.size(name):
      columns = source.row_length(name)
      rows[columns] = max(rows.get(columns, 1), min(shape[0], max(1, source.block // columns)))
  result: dict[str, tuple[int, ...]] = {
      name: (1, width) if source.row_length(name) > width else (rows[source.row_length(name)], source.row_length(name))
      for name, shape in shapes.items() if len(shape) > 1 and source.size(name)}
  matrices = sorted(set(result.values()), key=math.prod)
  for name in shapes.keys() - result.keys():
    # A tensor of one axis is one row, the first of a block that is wide enough.
    size = source.size(name)
    result[name] = next((m for m in matrices if m[1] >= size), (max(1, min(size, width)),))
  return result


def _blocks(size: int, row_length: int, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
  """Where blocks of this shape begin in a tensor, and how many entries each has; none reaches from a part of one row
  into the next."""
  run, step = row_length if row_length > shape[-1] else max(size, 1), math.prod(shape)
  for first in range(0, size, run):
    for begin in range(first, min(first + run, size), step):
      yield begin, min(step, first + run - begin, size - begin)


class _Buffers:
  """Aligned arrays that are used again: memory that the system hands out anew is slow at its first touch."""

  def __init__(self) -> None:
    self._spare: dict[int, list[np.ndarray]] = collections.defaultdict(list)

  def take(self, count: int, dtype: np.dtype) -> np.ndarray:
    """An array [count] with anything in it."""
    spare = self._spare[count * dtype.itemsize]
    return spare.pop().view(dtype) if spare else aligned((count,), dtype)

  def give(self, arrays: Iterable[np.ndarray]) -> None:
    """Takes arrays back."""
    for array in arrays:
      self._spare[array.nbytes].append(array)


def _match(labels: Sequence[str], models: Sequence[Mapping[str, Entry]]) -> None:
  first, problems = models[0], []
  for label, model in zip(labels[1:], models[1:], strict=True):
    problems += [f"{label} lacks {name}" for name in first.keys() - model.keys()]
    problems += [f"{label} has {name}, {labels[0]} has not" for name in model.keys() - first.keys()]
    for name in sorted(first.keys() & model.keys()):
      a, b = first[name], model[name]
      if a.shape != b.shape:
        vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight")) and a.shape[1:] == b.shape[1:]
        problems.append(f"{name} has shape {a.shape} in {labels[0]}, {b.shape} in {label}"
                        + (" (other vocabularies: give both the same number of rows first)" if vocabulary else ""))
      elif _floating(a) != _floating(b):
        problems.append(f"{name} is {a.dtype} in {labels[0]}, {b.dtype} in {label}")
  if problems:
    problems.sort()
    more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
    raise UserError(f"the checkpoints do not match: {'; '.join(problems[:20])}{more}")


def _on_cpu() -> contextlib.AbstractContextManager:
  """Where there is an accelerator too: to and fro would cost more than the merge."""
  try:
    return jax.default_device(jax.local_devices(backend="cpu")[0])
  except RuntimeError:  # the user has switched that backend off
    return contextlib.nullcontext()


def _floating(entry: Entry) -> bool:
  return jax.numpy.issubdtype(entry.dtype, jax.numpy.floating)


@functools.cache
def _compiled(kernel: Callable[..., jax.Array], static: tuple[tuple[str, Any], ...], dtype: np.dtype,
              ) -> Callable[..., jax.Array]:
  return jax.jit(lambda tensors, scalars, shared: kernel(tensors, scalars, shared, **dict(static)).astype(dtype))


@functools.cache
def _compiled_pairs(kernel: Callable[..., jax.Array], static: tuple[tuple[str, Any], ...]) -> Callable[..., jax.Array]:
  """The kernel on pairs of bfloat16 in words of 32 bits: two neighbours share a draw, which is most of the work."""

  def merge(tensors: tuple[jax.Array, ...], scalars: Any, shared: Any) -> jax.Array:
    halves = []
    for half in (0, 1):  # a float32 is a bfloat16 and 16 bits more; the first of a pair is the low half
      floats = tuple(jax.lax.bitcast_convert_type(t & np.uint32(0xFFFF0000) if half else t << 16, np.float32)
                     for t in tensors)
      merged = kernel(floats, scalars, {**shared, "half": half}, **dict(static)).astype(_BFLOAT16)
      halves.append(jax.lax.bitcast_convert_type(merged, np.uint16).astype(np.uint32))
    return halves[0] | halves[1] << 16

  return jax.jit(merge)


@functools.cache
def _compiled_statistic(statistic: Statistic, static: tuple[tuple[str, Any], ...]) -> Callable[..., jax.Array]:
  return jax.jit(lambda tensors, numbers: statistic(tensors, **numbers, **dict(static)))
