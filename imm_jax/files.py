"""Files that appear whole or not at all, and reading them with clear errors."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from imm_jax.errors import UserError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_REFUSES = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
                 errno.ENOENT, errno.ENAMETOOLONG)


@contextlib.contextmanager
def committed(target: Path) -> Iterator[Path]:
  """A path to write a file or a folder to; it takes the target's place when the block ends without an error.

  What an earlier, killed attempt left behind is removed first.

  Raises:
    UserError: when the disk refuses (full, read-only).
  """
  temporary, replaced = (target.with_name(f".{target.name}.{suffix}") for suffix in ("part", "old"))
  try:
    remove(temporary)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    yield temporary
    _sync(temporary)
    if target.is_dir() and not target.is_symlink():
      remove(replaced)
      os.replace(target, replaced)  # a folder cannot be replaced in one move, a file can
    os.replace(temporary, target)
    remove(replaced)
  except BaseException as e:
    with contextlib.suppress(OSError):
      remove(temporary)
    if not isinstance(e, OSError) or e.errno not in _DISK_REFUSES + _DISK_FULL:
      raise
    advice = "make room" if e.errno in _DISK_FULL else "make it writable"
    where = f" {e.filename}" if e.filename else ""
    raise UserError(f"{target}: cannot be written ({e.strerror}{where}); {advice} and start again, what was finished "
                    "before is kept") from e


@contextlib.contextmanager
def alone(target: Path) -> Iterator[None]:
  """Keeps other processes from writing the same target for the length of a block.

  Raises:
    UserError: when another one does.
  """
  lock = target.with_name(f".{target.name}.lock")
  lock.parent.mkdir(parents=True, exist_ok=True)
  with lock.open("w") as f:
    try:
      fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
      # Who opened the file before its last owner removed it holds a lock that nobody else sees.
      if not os.path.samestat(os.fstat(f.fileno()), lock.stat()):
        raise BlockingIOError
    except (BlockingIOError, FileNotFoundError) as e:
      raise UserError(f"{target}: another process writes it; wait for it or give another name") from e
    try:
      yield
    finally:
      lock.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
  """Replaces a file's text in one move."""
  with committed(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
  """Writes one JSON object a line."""
  with path.open("w", encoding="utf-8") as f:
    for row in rows:
      f.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
  """Reads one JSON object a line; a line that is none, or lacks one of `fields`, is a UserError that names it."""
  rows = []
  with path.open("rb") as f:
    for number, line in enumerate(f, 1):
      try:
        rows.append(json.loads(line.decode()))
      except ValueError as e:
        raise UserError(f"{path}:{number}: not a JSON object ({e}); remove the file to have it made again") from e
      if not isinstance(rows[-1], dict):
        raise UserError(f"{path}:{number}: not a JSON object; remove the file to have it made again")
      wrong = [field for field, kind in fields.items() if not isinstance(rows[-1].get(field), kind)]
      if wrong:
        raise UserError(f"{path}:{number}: {wrong[0]!r} is missing or no {fields[wrong[0]].__name__}; remove the file "
                        "to have it made again")
  return rows


def read_json(path: Path) -> dict[str, Any]:
  """Reads a JSON object; a file that is missing or holds something else is a UserError that names it."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except OSError as e:
    raise UserError(f"{path}: cannot be read ({e.strerror})") from e
  except (ValueError, RecursionError) as e:
    raise UserError(f"{path}: is not JSON ({e})") from e
  if not isinstance(value, dict):
    raise UserError(f"{path}: expected a JSON object")
  return value


def remove(path: Path) -> None:
  """Removes a file or a folder, if it is there."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def files_of(path: Path) -> list[Path]:
  """The file itself, or all files below a folder, in a fixed order."""
  return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def size_of(path: Path) -> int:
  """Bytes of a file, or of all files below a folder."""
  return sum(p.stat().st_size for p in files_of(path))


def digest(path: Path, only: Sequence[Path] | None = None) -> str:
  """sha256 over the contents (and, in a folder, the names) of all files, or of `only` these."""
  total = hashlib.sha256()
  for file in files_of(path) if only is None else only:
    with file.open("rb") as f:
      total.update(f"{file.relative_to(path)}\0{hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
  return total.hexdigest()


def _sync(path: Path) -> None:
  """Puts written files on disk, so that a rename never outlives its bytes."""
  for file in files_of(path):
    fd = os.open(file, os.O_RDONLY)
    try:
      os.fsync(fd)
    finally:
      os.close(fd)
