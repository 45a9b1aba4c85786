"""Writes a checkpoint's weights in any order, bypassing the page cache if the file system allows it.

A merged checkpoint is written once and is often larger than memory: in the page cache it would evict the inputs, and
filling a cache page costs several times as much as the copy to the disk. So whole, aligned segments are written with
O_DIRECT.
"""

import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imm_jax.model import checkpoint_folder, safetensors
from imm_jax.runtime.threads import BoundedPool

_SEGMENT = 1 << 22
# Alignment of addresses, offsets and lengths for O_DIRECT; no device needs more.
_ALIGNMENT = 4096
# Maximum number of segments queued for the disk: enough to keep it busy, few enough to need little memory.
_IN_FLIGHT = 8


class WeightsWriter:
  """Writes the weight files of a new folder. A context manager; safe to share by threads."""

  def __init__(self, folder: Path, tensors: Sequence[tuple[str, np.dtype, tuple[int, ...]]], max_shard_bytes: int):
    """Creates the folder, its files with their headers, and the index.

    Args:
      folder: folder to create; if it exists, the files must not.
      tensors: name, dtype and shape, in the order of the files.
      max_shard_bytes: see `folder.split_into_shards`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = checkpoint_folder.split_into_shards(tensors, max_shard_bytes)
    checkpoint_folder.write_index(folder, shards)
    self._places: dict[str, tuple[_File, int, np.dtype]] = {}
    self._files: list[_File] = []
    self._disk = BoundedPool(2, _IN_FLIGHT)
    try:
      for name, shard in shards:
        start, offsets = safetensors.make_header(shard)
        size = len(start) + sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for _, dtype, shape in shard)
        file = _File(folder / name, size, self._disk)
        self._files.append(file)
        file.write(0, start)
        self._places |= {tensor: (file, offsets[tensor], np.dtype(dtype)) for tensor, dtype, _ in shard}
    except BaseException:
      self._close()
      raise

  def __enter__(self) -> "WeightsWriter":
    return self

  def __exit__(self, kind: type | None, *_: object) -> None:
    try:
      self._disk.close(cancel=kind is not None)
      if kind is None:
        for file in self._files:
          file.finish()
    finally:
      self._close()

  def dtype(self, name: str) -> np.dtype:
    """Returns the dtype in which a tensor is written."""
    return self._places[name][2]

  def write(self, name: str, begin: int, values: np.ndarray) -> None:
    """Writes values [n] of the tensor's dtype to its entries from `begin` on; each entry must be written once."""
    file, offset, dtype = self._places[name]
    if values.dtype != dtype:
      raise ValueError(f"{name}: got {values.dtype}, announced {dtype}")
    file.write(offset + begin * dtype.itemsize, values.view(np.uint8))

  def _close(self) -> None:
    self._disk.close(cancel=True, quiet=True)
    while self._files:
      os.close(self._files.pop().number)


class _File:
  """Writes a file of known size in segments, which may be filled in any order."""

  def __init__(self, path: Path, size: int, disk: BoundedPool):
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
      self.number = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
    except OSError:  # the file system lacks O_DIRECT, which it reports only after it has created the file
      path.unlink(missing_ok=True)
      self.number = os.open(path, flags, 0o644)
    self._size, self._disk = size, disk
    self._lock = threading.Lock()
    # Segment -> its buffer and the number of bytes still missing.
    self._open: dict[int, tuple[mmap.mmap, int]] = {}
    self._spare: list[mmap.mmap] = []

  def write(self, offset: int, data: Any) -> None:
    view = memoryview(data)
    while view:
      segment, start = divmod(offset, _SEGMENT)
      count = min(len(view), _SEGMENT - start)
      with self._lock:
        if segment not in self._open:
          buffer = self._spare.pop() if self._spare else mmap.mmap(-1, _SEGMENT)
          self._open[segment] = buffer, min(_SEGMENT, self._size - segment * _SEGMENT)
        buffer = self._open[segment][0]
      buffer[start:start + count] = view[:count]
      with self._lock:
        missing = self._open[segment][1] - count
        self._open[segment] = buffer, missing
        if not missing:
          del self._open[segment]
      if not missing:
        self._disk.submit(lambda buffer=buffer, segment=segment: self._write_segment(buffer, segment))
      view, offset = view[count:], offset + count

  def finish(self) -> None:
    """Truncates the padding of the last segment."""
    if self._open:
      raise ValueError("some entries of the checkpoint were not written")
    os.ftruncate(self.number, self._size)

  def _write_segment(self, buffer: mmap.mmap, segment: int) -> None:
    used = min(_SEGMENT, self._size - segment * _SEGMENT)
    view, offset = memoryview(buffer)[:-(-used // _ALIGNMENT) * _ALIGNMENT], segment * _SEGMENT
    while view:
      count = os.pwrite(self.number, view, offset)
      view, offset = view[count:], offset + count
    with self._lock:
      self._spare.append(buffer)
