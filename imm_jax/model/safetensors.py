"""The safetensors file format: an 8-byte header length, a JSON header, then the tensors' bytes.

`Reader` reads parts of tensors, `read` maps a whole file and returns views, `write` streams tensors in blocks. All
validate their input: a damaged file raises an error that names it.
"""

import io
import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from imm_jax import files
from imm_jax.errors import UserError

_DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000
_ALIGNMENT = 64


class Entry(NamedTuple):
  """Locates a tensor: its data begin `offset` bytes into the file."""

  path: Path
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.shape)


def read_entries(path: Path) -> dict[str, Entry]:
  """Reads the entries of all tensors from a file's header, in its order.

  Raises:
    UserError: if the file is missing or truncated, or its header does not describe its bytes.
  """
  try:
    size = path.stat().st_size
    files.reject_lfs_pointer(path)
    with path.open("rb") as f:
      prefix = f.read(8)
      length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
      if length > min(_MAX_HEADER, size - 8):
        raise UserError(f"{path}: not a whole safetensors file ({size} bytes, header of {length}); copy it again")
      make_header = json.loads(f.read(length), object_pairs_hook=files.reject_duplicates)
  except OSError as e:
    raise UserError(f"{path}: cannot be read ({e.strerror})") from e
  except (ValueError, RecursionError) as e:
    raise UserError(f"{path}: the safetensors header is damaged ({e}); copy the file again") from e
  if not isinstance(make_header, dict):
    raise UserError(f"{path}: the safetensors header is damaged (not a JSON object); copy the file again")
  make_header.pop("__metadata__", None)
  start, result, spans = 8 + length, {}, []
  for name, entry in make_header.items():
    if isinstance(entry, dict) and isinstance(entry.get("dtype"), str) and entry["dtype"] not in _DTYPES:
      raise UserError(f"{path}: tensor {name!r} has dtype {entry['dtype']}, which is not supported; expected weights "
                      "in BF16, F16 or F32")
    try:
      dtype, shape = _DTYPES[entry["dtype"]], _parse_sizes(entry["shape"])
      begin, end = _parse_sizes(entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as e:
      raise UserError(f"{path}: the header's entry of tensor {name!r} cannot be read; copy the file again") from e
    if start + end > size:
      raise UserError(f"{path}: truncated: tensor {name!r} ends at byte {start + end}, the file at {size}; "
                      "copy it again")
    if end - begin != dtype.itemsize * math.prod(shape):
      raise UserError(f"{path}: tensor {name!r} has {end - begin} bytes, its shape {shape} needs another number")
    if len(shape) > 64 or max(shape, default=0) * dtype.itemsize >= 2**63:  # possible for tensors without entries
      raise UserError(f"{path}: tensor {name!r} has a shape that no array can have")
    result[name] = Entry(path, dtype, shape, start + begin)
    spans.append((begin, end))
  spans.sort()
  if any(begin != previous_end for (begin, _), (_, previous_end) in zip(spans, [(0, 0), *spans], strict=False)) or (
      spans and start + spans[-1][1] != size):
    raise UserError(f"{path}: its tensors overlap or leave bytes uncovered; copy the file again")
  return result


def read(path: Path) -> dict[str, np.ndarray]:
  """Maps a file to tensor name -> read-only view, in the file's order; raises as `read_entries` does."""
  result = read_entries(path)
  size = path.stat().st_size
  data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
  return {name: data[e.offset:e.offset + e.size * e.dtype.itemsize].view(e.dtype).reshape(e.shape)
          for name, e in result.items()}


class Reader:
  """Reads parts of tensors, and keeps their files open until closed. A context manager; safe to share by threads."""

  def __init__(self) -> None:
    self._files: dict[Path, int] = {}
    self._lock = threading.Lock()

  def __enter__(self) -> "Reader":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes all files."""
    while self._files:
      os.close(self._files.popitem()[1])

  def read(self, entry: Entry, begin: int, out: np.ndarray) -> None:
    """Fills `out`, C-contiguous and of the tensor's dtype, with its entries from `begin` on.

    Raises:
      UserError: if the file ends too early.
    """
    with self._lock:
      file = self._files.get(entry.path)
      if file is None:
        file = self._files[entry.path] = os.open(entry.path, os.O_RDONLY)
    view, offset = memoryview(out.reshape(-1).view(np.uint8)), entry.offset + begin * entry.dtype.itemsize
    while view:
      count = os.preadv(file, [view], offset)
      if not count:
        raise UserError(f"{entry.path}: ends at byte {offset}, in the middle of a tensor; it changed while it was read")
      view, offset = view[count:], offset + count


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Allocates an uninitialized array at an address that XLA on CPU can use without a copy."""
  size = math.prod(shape) * dtype.itemsize
  raw = np.empty(size + _ALIGNMENT, np.uint8)
  start = -raw.ctypes.data % _ALIGNMENT
  return raw[start:start + size].view(dtype).reshape(shape)


def make_header(tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
  """Makes the header of a file of these tensors, and returns it with the offset of each tensor in the file."""
  descriptions: dict[str, dict] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, dtype, shape in tensors:
    begin, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
    descriptions[name] = {"dtype": _CODES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [begin, end]}
  text = json.dumps(descriptions, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  start = 8 + len(text)
  return struct.pack("<Q", len(text)) + text, {
      name: start + d["data_offsets"][0] for name, d in descriptions.items() if name != "__metadata__"}


def write(path: Path, tensors: Iterable[tuple[str, np.dtype, tuple[int, ...], Callable[[], Iterable[np.ndarray]]]],
          ) -> None:
  """Streams tensors into a new file, block by block.

  Args:
    path: the file.
    tensors: name, dtype, shape, and a function that yields the tensor's entries in order, in arrays of any shape. Each
      function is called once, in order.
  """
  tensors = list(tensors)
  with path.open("wb", buffering=0) as f:
    _write_all(f, make_header(tensor[:3] for tensor in tensors)[0])
    for name, dtype, shape, blocks in tensors:
      missing = math.prod(shape)
      for block in blocks():
        missing -= block.size
        if block.dtype != dtype or missing < 0:
          raise ValueError(f"{name}: got {block.size} entries of {block.dtype}, announced {dtype}{shape}")
        _write_all(f, np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
      if missing:
        raise ValueError(f"{name}: {missing} of the entries of {dtype}{shape} are missing")


def _write_all(file: io.RawIOBase, data: bytes | memoryview) -> None:
  view = memoryview(data)
  while view:
    view = view[file.write(view):]


def _parse_sizes(values: object) -> tuple[int, ...]:
  """Validates a list of non-negative integers; raises ValueError otherwise."""
  if not isinstance(values, list) or any(type(v) is not int or not 0 <= v < 2**63 for v in values):
    raise ValueError(values)
  return tuple(values)
