"""Merges HF checkpoints on disk in blocks, with the bits of the functions on trees in memory.

Only blocks are held, so memory does not grow with the model: one thread reads and digests, others merge and write. A
block is a run of entries, or of whole rows where masks are drawn.
"""

import contextlib
import functools
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash

from imm_jax import files, progress
from imm_jax.errors import UserError
from imm_jax.merging.methods import Plan
from imm_jax.merging.statistics import Statistic
from imm_jax.model import folder as checkpoint, safetensors
from imm_jax.model.safetensors import Entry

# Entries of a block: small enough for the caches, large enough to outweigh a call.
BLOCK = 1 << 20
_SMALL = 1 << 14
# XLA reads arrays in place where they begin at such an address.
_ALIGNMENT = 64
_MAX_WORKERS = 8


class Output(NamedTuple):
  """One merged checkpoint to write: into this new folder, by this plan, in this dtype (None: the first model's)."""

  folder: Path
  plan: Plan
  dtype: np.dtype | None = None


class CheckpointSource:
  """Checkpoint folders as the `Source` of a plan; use as a context manager."""

  def __init__(self, folders: Mapping[str, Path], *, block: int = BLOCK):
    """Opens the folders and matches their tensors.

    Args:
      folders: label -> folder; the first one's tensors are what the others are compared with.
      block: entries that are held at once.

    Raises:
      UserError: for what `folder.tensors` raises, and unless all have the same tensors; it names those that differ.
    """
    self.folders, self.block = dict(folders), block
    self._files: dict[Path, int] = {}
    try:
      self._models = [self._tensors(path) for path in self.folders.values()]
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
    while self._files:
      os.close(self._files.popitem()[1])

  def size(self, name: str) -> int:
    return self._models[0][name].size

  def entries(self, name: str) -> list[Entry]:
    """Where a tensor lies in every model."""
    return [model[name] for model in self._models]

  def read(self, entry: Entry, begin: int, out: np.ndarray) -> None:
    """Fills `out` with a tensor's entries from `begin` on."""
    file = self._files.get(entry.path)
    if file is None:
      file = self._files[entry.path] = os.open(entry.path, os.O_RDONLY)
    view, offset = memoryview(out.view(np.uint8)), entry.offset + begin * entry.dtype.itemsize
    while view:
      count = os.preadv(file, [view], offset)
      if not count:
        raise UserError(f"{entry.path}: ends at byte {offset}, in the middle of a tensor; it changed while it was read")
      view, offset = view[count:], offset + count

  def reduce(self, statistic: Statistic, combine: Callable[..., np.ndarray],
             arguments: Callable[[str], Mapping[str, np.ndarray]] = lambda _: {}, names: Sequence[str] | None = None,
             **static: Any) -> Iterator[tuple[str, np.ndarray]]:
    compiled = _compiled_statistic(statistic, tuple(static.items()))
    names = self.names if names is None else names
    total = sum(e.size * e.dtype.itemsize for name in names for e in self.entries(name))
    with progress.bar(total, "measure", "B", unit_scale=True, leave=False) as bar:
      for name in names:
        numbers, result = dict(arguments(name)), None
        for begin in range(0, max(1, self.size(name)), 4 * self.block):
          count = min(4 * self.block, self.size(name) - begin)
          tensors = [_aligned(count, entry.dtype) for entry in self.entries(name)]
          for entry, tensor in zip(self.entries(name), tensors, strict=True):
            self.read(entry, begin, tensor)
          with jax.enable_x64(True):  # for sums in int64
            part = np.asarray(compiled(tensors, numbers))
          result = part if result is None else combine(result, part)
          bar.update(sum(t.nbytes for t in tensors))
        yield name, result

  def _tensors(self, path: Path) -> dict[str, Entry]:
    """A model's tensors, less those that follow from the others."""
    found = checkpoint.tensors(path)
    head, embedding = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    config = files.read_json(path / "config.json")
    if head is not None and embedding is not None and config.get("tie_word_embeddings"):
      if not self._equal([head, embedding]):
        raise UserError(f"{path}: config.json ties the embeddings, but lm_head.weight differs from the embedding")
      del found["lm_head.weight"]
    return {name: entry for name, entry in found.items() if not name.endswith("rotary_emb.inv_freq")}

  def _equal(self, entries: Sequence[Entry]) -> bool:
    if len({(e.dtype, e.shape) for e in entries}) > 1:
      return False
    for begin in range(0, entries[0].size, self.block):
      blocks = [_aligned(min(self.block, e.size - begin), e.dtype) for e in entries]
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
    whole = _aligned(entries[0].size, entries[0].dtype)
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
  dtype_of = lambda name, output: (output.dtype if output.dtype is not None and name in source.names
                                   else source.entries(name)[0].dtype)
  digests = [xxhash.xxh3_128() for _ in source.folders]
  workers = max(1, min(_MAX_WORKERS, os.cpu_count() or 1))
  total = sum(entry.size * entry.dtype.itemsize for name in source.order for entry in source.entries(name))
  with contextlib.ExitStack() as stack:
    writers = [stack.enter_context(_Writer(
        output.folder, [(name, dtype_of(name, output), source.entries(name)[0].shape) for name in source.order],
        max_shard_bytes)) for output in outputs]
    bar = stack.enter_context(progress.bar(total, "merge", "B", unit_scale=True))
    pool = stack.enter_context(_Pool(workers))
    for name in source.order:
      entries = source.entries(name)
      for entry, digest in zip(entries, digests, strict=True):
        digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
      if name not in source.names:
        whole = source.read_equal(name)
        for digest in digests:
          digest.update(whole.view(np.uint8).data)
        for writer in writers:
          writer.write(name, 0, whole)
        continue
      scalars = [{k: np.asarray(v)[None] for k, v in output.plan.scalars(name).items()} for output in outputs]
      for begin, count, shape in _blocks(entries[0].shape, source.block, by_rows):
        read: dict[Entry, np.ndarray] = {}
        for entry, digest in zip(entries, digests, strict=True):
          if entry not in read:  # in the first round a model is both base and start
            # The end of a last block is not read, and not written.
            read[entry] = _aligned(int(np.prod(shape)), entry.dtype)
            source.read(entry, begin, read[entry][:count])
          digest.update(read[entry][:count].view(np.uint8).data)
        arrays = [read[entry].reshape(1, *shape) for entry in entries]
        first_row = np.uint32(begin // shape[-1] if by_rows else 0)
        pool.submit(_merge_block, outputs, writers, name, begin, count, arrays, scalars,
                    {"key": key, "zero": np.uint32(0), "first_row": first_row}, bar)
  return {label: digest.hexdigest() for label, digest in zip(source.folders, digests, strict=True)}


def _merge_block(outputs: Sequence[Output], writers: Sequence["_Writer"], name: str, begin: int, count: int,
                 arrays: Sequence[np.ndarray], scalars: Sequence[Any], shared: Any, bar: Any) -> None:
  for output, writer, numbers in zip(outputs, writers, scalars, strict=True):
    merged = _compiled(output.plan.kernel, tuple(output.plan.static.items()), writer.dtype(name))(
        tuple(arrays), numbers, shared)
    writer.write(name, begin, np.asarray(merged).reshape(-1)[:count])
  bar.update(sum(count * a.itemsize for a in arrays))


def _blocks(shape: tuple[int, ...], size: int, by_rows: bool) -> Iterator[tuple[int, int, tuple[int, ...]]]:
  """(first entry, number of entries, shape to merge them in) of each block; few shapes, so that little is compiled."""
  entries = int(np.prod(shape))
  if not entries:
    return
  if not by_rows or len(shape) < 2:
    # A tensor of one axis is one row, so it is never cut where masks are drawn.
    length = _SMALL if entries <= _SMALL else max(size, entries) if by_rows else size
    for begin in range(0, entries, length):
      yield begin, min(length, entries - begin), (length,)
    return
  columns = entries // shape[0]
  rows = min(1 << (max(1, size // columns).bit_length() - 1), 1 << (shape[0] - 1).bit_length())
  for row in range(0, shape[0], rows):
    yield row * columns, min(rows, shape[0] - row) * columns, (rows, columns)


class _Writer:
  """A checkpoint's weights, written at any place in any order."""

  def __init__(self, folder: Path, tensors: Sequence[tuple[str, np.dtype, tuple[int, ...]]], max_shard_bytes: int):
    folder.mkdir(parents=True)
    shards = checkpoint.split(tensors, max_shard_bytes)
    checkpoint.write_index(folder, shards)
    self._places: dict[str, tuple[int, int, np.dtype]] = {}
    self._files: list[int] = []
    for file, shard in shards:
      start, offsets = safetensors.header(shard)
      self._files.append(os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
      self._put(self._files[-1], start, 0)
      self._places |= {name: (self._files[-1], offsets[name], np.dtype(dtype)) for name, dtype, _ in shard}

  def __enter__(self) -> "_Writer":
    return self

  def __exit__(self, *_: object) -> None:
    while self._files:
      os.close(self._files.pop())

  def dtype(self, name: str) -> np.dtype:
    return self._places[name][2]

  def write(self, name: str, begin: int, values: np.ndarray) -> None:
    """Puts values of the tensor's dtype at its entries from `begin` on."""
    file, offset, dtype = self._places[name]
    self._put(file, values.view(np.uint8), offset + begin * dtype.itemsize)

  def _put(self, file: int, data: Any, offset: int) -> None:
    view = memoryview(data)
    while view:
      count = os.pwrite(file, view, offset)
      view, offset = view[count:], offset + count


class _Pool:
  """Threads that hold a bounded number of blocks; the first error of any of them is raised to the submitter."""

  def __init__(self, workers: int):
    self._pool = ThreadPoolExecutor(workers)
    self._free = threading.Semaphore(2 * workers)
    self._errors: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

  def __enter__(self) -> "_Pool":
    return self

  def __exit__(self, kind: type | None, *_: object) -> None:
    self._pool.shutdown(cancel_futures=kind is not None)
    if kind is None and not self._errors.empty():
      raise self._errors.get()

  def submit(self, work: Callable[..., None], *args: Any) -> None:
    self._free.acquire()
    if not self._errors.empty():
      self._free.release()
      raise self._errors.get()
    self._pool.submit(work, *args).add_done_callback(self._done)

  def _done(self, future: "Future[None]") -> None:
    if not future.cancelled() and future.exception():
      self._errors.put(future.exception())
    self._free.release()


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


def _floating(entry: Entry) -> bool:
  return jax.numpy.issubdtype(entry.dtype, jax.numpy.floating)


def _aligned(count: int, dtype: np.dtype) -> np.ndarray:
  """An uninitialised array at an address that XLA reads in place."""
  size = count * dtype.itemsize
  raw = np.empty(size + _ALIGNMENT, np.uint8)
  start = -raw.ctypes.data % _ALIGNMENT
  return raw[start:start + size].view(dtype)


@functools.cache
def _compiled(kernel: Callable[..., jax.Array], static: tuple[tuple[str, Any], ...], dtype: np.dtype,
              ) -> Callable[..., jax.Array]:
  return jax.jit(lambda tensors, scalars, shared: kernel(tensors, scalars, shared, **dict(static)).astype(dtype))


@functools.cache
def _compiled_statistic(statistic: Statistic, static: tuple[tuple[str, Any], ...]) -> Callable[..., jax.Array]:
  return jax.jit(lambda tensors, numbers: statistic(tensors, **numbers, **dict(static)))
