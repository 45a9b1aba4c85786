"""Writes files atomically, locks and digests them, and reads JSON with errors that name file and line."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from imm_jax.errors import ResourceError, UserError

# A row of a file of JSON lines.
Row = dict[str, Any]
_LFS_HEADER = b"version https://git-lfs"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
                 errno.ENOENT, errno.ENAMETOOLONG)


@contextlib.contextmanager
def write_atomically(target: Path) -> Iterator[Path]:
  """Yields a path to write a file or folder to, which replaces the target when the block ends without an error.

  Whatever an earlier, killed attempt left behind is removed first.

  Raises:
    UserError: when it cannot be written (full disk, no permission), or the target is, or contains, the current
      directory.
  """
  temporary, replaced = _hidden_sibling(target, "part"), _hidden_sibling(target, "old")
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
    if not isinstance(e, OSError) or e.errno not in _NOT_WRITABLE + _DISK_FULL:
      raise
    raise _write_error(target, e) from e


@contextlib.contextmanager
def lock(target: Path, *, wait: bool = False) -> Iterator[None]:
  """Holds a lock on a target for the length of a block, so that no other process writes it.

  Args:
    target: a file or folder, which need not exist.
    wait: whether to wait while another process holds the lock, rather than raise an error.

  Raises:
    UserError: when another process holds the lock and `wait` is not set, the lock cannot be written, or the target is,
      or contains, the current directory.
  """
  lock = _hidden_sibling(target, "lock")
  while True:
    try:
      lock.parent.mkdir(parents=True, exist_ok=True)
      file = lock.open("w")
    except OSError as e:
      raise _write_error(target, e) from e
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
      # If the previous owner removed the file after it was opened here, this lock is on a file that no other process
      # sees.
      if not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
        raise BlockingIOError
      break
    except (BlockingIOError, FileNotFoundError) as e:
      file.close()
      if not wait:
        raise UserError(f"{target}: another process writes it; wait for it or give another name") from e
    except BaseException:
      file.close()
      raise
  with file:
    try:
      yield
    finally:
      lock.unlink(missing_ok=True)


def check_out(out: Path, inputs: Mapping[str, Path], *, overwrite: bool, explain_foreign: Callable[[Path], str],
              ) -> None:
  """Checks that a command may write the folder --out, before any work is done.

  Args:
    out: the value of --out.
    inputs: the folders that the command reads, by their names in messages.
    overwrite: whether --overwrite is given.
    explain_foreign: returns why an existing folder is no earlier output of the command; "" if it is one.

  Raises:
    UserError: when it is, contains or lies in an input, is or contains the current directory, is no folder, or exists
      and is not replaced because --overwrite is missing or it is no earlier output.
  """
  for label, path in inputs.items():
    output, source = out.resolve(), path.resolve()
    if output in (source, *source.parents):
      raise UserError(f"--out={out}: is or holds the input {label} ({path}); give another folder")
    if source in output.parents:
      raise UserError(f"--out={out}: lies in the input {label} ({path}); give another folder")
  if out.is_symlink() or (out.exists() and not out.is_dir()):
    raise UserError(f"--out={out}: is a link or a file; give a folder")
  if not out.exists():
    return
  _hidden_sibling(out, "")
  if not overwrite:
    raise UserError(f"--out={out}: exists; give another folder, or --overwrite to replace it")
  if any(out.iterdir()) and (reason := explain_foreign(out)):
    raise UserError(f"--out={out}: {reason}, so it is not replaced; give another folder")


def write_text(path: Path, text: str) -> None:
  """Writes a text file in UTF-8, atomically."""
  with write_atomically(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, indent: int = 1, **options: Any) -> None:
  """Writes a value as JSON, atomically; `options` are those of `json.dumps`."""
  write_text(path, json.dumps(value, indent=indent, **options) + "\n")


def write_jsonl(path: Path, rows: list[Row]) -> None:
  """Writes a file of JSON lines, one object per row."""
  with path.open("w", encoding="utf-8") as f:
    for row in rows:
      f.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: Path, fields: Mapping[str, type]) -> list[Row]:
  """Reads a file of JSON lines.

  Args:
    path: the file.
    fields: type of each field that every row must have.

  Raises:
    UserError: when a line is no JSON object or lacks a field, with the number of the line.
  """
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
  """Reads a file with a JSON object.

  Raises:
    UserError: when the file cannot be read, holds no JSON object, or has a key twice in one object.
  """
  try:
    reject_lfs_pointer(path)
    value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=reject_duplicates)
  except OSError as e:
    raise UserError(f"{path}: cannot be read ({e.strerror})") from e
  except (ValueError, RecursionError) as e:
    raise UserError(f"{path}: is not JSON ({e})") from e
  if not isinstance(value, dict):
    raise UserError(f"{path}: expected a JSON object")
  return value


def reject_lfs_pointer(path: Path) -> None:
  """Raises UserError if a file is only a pointer, which git writes when Git LFS has not fetched the file."""
  with path.open("rb") as f:
    if f.read(len(_LFS_HEADER)) == _LFS_HEADER:
      raise UserError(f"{path}: is a pointer of Git LFS, not the file itself; run `git lfs pull` in that folder")


def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Builds a dict as json's `object_pairs_hook`; raises ValueError for a duplicate key, which json would drop."""
  result = dict(pairs)
  if len(result) != len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is duplicated")
  return result


def remove(path: Path) -> None:
  """Removes a file or folder if it exists."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def find_existing_parent(path: Path) -> Path:
  """Returns the path if it exists, or else the nearest folder above it that does."""
  return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def list_files(path: Path) -> list[Path]:
  """Lists the file itself, or all files below a folder, sorted."""
  return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def cache_folder() -> Path:
  """Returns the folder for what can be made again: $IMM_JAX_CACHE, or imm_jax in $XDG_CACHE_HOME or ~/.cache."""
  if override := os.environ.get("IMM_JAX_CACHE"):
    return Path(override)
  cache = os.environ.get("XDG_CACHE_HOME", "")
  return (Path(cache) if os.path.isabs(cache) else Path("~/.cache").expanduser()) / "imm_jax"


def count_bytes(path: Path) -> int:
  """Returns the size in bytes of a file, or of all files below a folder."""
  return sum(p.stat().st_size for p in list_files(path))


def digest_files(path: Path) -> dict[str, str]:
  """Returns the SHA-256 of each file below a folder, by relative path; of a file, under the name "."."""
  digests = {}
  for file in list_files(path):
    with file.open("rb") as f:
      digests[str(file.relative_to(path))] = hashlib.file_digest(f, "sha256").hexdigest()
  return digests


def digest(path: Path, only: Sequence[Path] | None = None) -> str:
  """Returns one SHA-256 over the names and contents of all files below a folder (or `only` some), or of a file."""
  return combine_digests(digest_files(path) if only is None else {
      str(p.relative_to(path)): digest_files(p)["."] for p in only})


def digest_json(value: Any, *, digits: int = 64) -> str:
  """Returns the first hex digits of the SHA-256 of a value in JSON types.

  >>> digest_json({"b": 1, "a": [2]}, digits=16)
  '41ff4104bc489a1b'
  """
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:digits]


def combine_digests(digests: Mapping[str, str]) -> str:
  """Returns one SHA-256 over digests of files by name, such as those of `digest_files`."""
  return hashlib.sha256("".join(f"{name}\0{value}\n" for name, value in digests.items()).encode()).hexdigest()


def _hidden_sibling(target: Path, suffix: str) -> Path:
  """Returns the path of a hidden file beside a target; raises UserError if the target cannot be replaced."""
  path = Path(os.path.abspath(target))  # "." has no name
  path = path.parent.resolve() / path.name
  if path.is_dir() and path in (Path.cwd(), *Path.cwd().parents):
    raise UserError(f"{target}: is the current directory or holds it; give another name")
  return path.with_name(f".{path.name}.{suffix}")


def explain_disk_error(target: str | Path, error: OSError) -> UserError | None:
  """Returns the error to raise if a disk is full or not writable; None for other errors, as of a network."""
  return _write_error(target, error) if error.errno in _DISK_FULL + (errno.EROFS, errno.EACCES, errno.EPERM) else None


def is_disk_full(number: int | None) -> bool:
  """Returns whether the system's number of an error tells of a full disk or a quota."""
  return number in _DISK_FULL


def _write_error(target: str | Path, error: OSError) -> UserError:
  advice = ("make room" if error.errno in _DISK_FULL else
            "give another name" if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG) else
            "make it writable")
  file = f" {error.filename}" if error.filename else ""
  kind = ResourceError if error.errno in _DISK_FULL else UserError
  return kind(f"{target}: cannot be written ({error.strerror}{file}); {advice} and start again")


def _sync(path: Path) -> None:
  """Flushes written files to disk, so that after a crash a renamed file has its content."""
  for file in list_files(path):
    fd = os.open(file, os.O_RDONLY)
    try:
      os.fsync(fd)
    finally:
      os.close(fd)
