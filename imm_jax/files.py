"""Files that appear whole or not at all, and reading them with clear errors."""

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

_LFS = b"version https://git-lfs"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_REFUSES = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
                 errno.ENOENT, errno.ENAMETOOLONG)


@contextlib.contextmanager
def committed(target: Path) -> Iterator[Path]:
  """A path to write a file or a folder to; it takes the target's place when the block ends without an error.

  What an earlier, killed attempt left behind is removed first.

  Raises:
    UserError: when the disk refuses (full, read-only), or the target is the current directory or holds it.
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
    if not isinstance(e, OSError) or e.errno not in _DISK_REFUSES + _DISK_FULL:
      raise
    raise _write_error(target, e) from e


@contextlib.contextmanager
def locked(target: Path, *, wait: bool = False) -> Iterator[None]:
  """Keeps other processes from writing the same target for the length of a block.

  Args:
    target: a file or folder.
    wait: until no other process writes it, rather than refuse.

  Raises:
    UserError: when another one does and `wait` is not set, the disk refuses, or the target is the current directory or
      holds it.
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
      # Who opened the file before its last owner removed it holds a lock that nobody else sees.
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
  """Checks that a tool may write the folder --out, before any work.

  Args:
    out: what the flag says.
    inputs: the folders that are read, by what they are called.
    overwrite: whether --overwrite is given.
    explain_foreign: says of a folder that is there why it is no earlier output of the tool; "" where it is one.

  Raises:
    UserError: when it is, holds or lies in an input, is the current directory or holds it, is no folder, or is there
      and is no earlier output that --overwrite replaces.
  """
  for label, path in inputs.items():
    here, there = out.resolve(), path.resolve()
    if here in (there, *there.parents):
      raise UserError(f"--out={out}: is or holds the input {label} ({path}); give another folder")
    if there in here.parents:
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
  """Reads a JSON object; a file that is missing, holds something else, or a key twice, is a UserError that names it."""
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
  """Raises UserError where a file is what git leaves in place of one that Git LFS has not fetched."""
  with path.open("rb") as f:
    if f.read(len(_LFS)) == _LFS:
      raise UserError(f"{path}: is a pointer of Git LFS, not the file itself; run `git lfs pull` in that folder")


def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """An `object_pairs_hook` for json; raises ValueError where a key stands twice, of which one would be lost."""
  result = dict(pairs)
  if len(result) != len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands in it twice")
  return result


def remove(path: Path) -> None:
  """Removes a file or a folder, if it is there."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def list_files(path: Path) -> list[Path]:
  """The file itself, or all files below a folder, in a fixed order."""
  return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def count_bytes(path: Path) -> int:
  """Bytes of a file, or of all files below a folder."""
  return sum(p.stat().st_size for p in list_files(path))


def digest_files(path: Path) -> dict[str, str]:
  """sha256 of the file, by the name ".", or of each file below a folder, by its path in it."""
  found = {}
  for file in list_files(path):
    with file.open("rb") as f:
      found[str(file.relative_to(path))] = hashlib.file_digest(f, "sha256").hexdigest()
  return found


def digest(path: Path, only: Sequence[Path] | None = None) -> str:
  """sha256 over the contents (and, in a folder, the names) of all files, or of `only` these."""
  return combine_digests(digest_files(path) if only is None else {
      str(p.relative_to(path)): digest_files(p)["."] for p in only})


def combine_digests(found: Mapping[str, str]) -> str:
  """One digest over those of files."""
  return hashlib.sha256("".join(f"{name}\0{value}\n" for name, value in found.items()).encode()).hexdigest()


def _hidden_sibling(target: Path, suffix: str) -> Path:
  """A hidden neighbour of a file or folder; a UserError where nothing can take the target's place."""
  path = Path(os.path.abspath(target))  # "." has no name
  path = path.parent.resolve() / path.name
  if path.is_dir() and path in (Path.cwd(), *Path.cwd().parents):
    raise UserError(f"{target}: is the current directory or holds it; give another name")
  return path.with_name(f".{path.name}.{suffix}")


def explain_disk_error(target: str | Path, error: OSError) -> UserError | None:
  """What to say where the disk is full or refuses to be written; None for another error, as of a network."""
  return _write_error(target, error) if error.errno in _DISK_FULL + (errno.EROFS, errno.EACCES, errno.EPERM) else None


def _write_error(target: str | Path, error: OSError) -> UserError:
  advice = ("make room" if error.errno in _DISK_FULL else
            "give another name" if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG) else
            "make it writable")
  where = f" {error.filename}" if error.filename else ""
  kind = ResourceError if error.errno in _DISK_FULL else UserError
  return kind(f"{target}: cannot be written ({error.strerror}{where}); {advice} and start again, what was finished "
              "before is kept")


def _sync(path: Path) -> None:
  """Puts written files on disk, so that a rename never outlives its bytes."""
  for file in list_files(path):
    fd = os.open(file, os.O_RDONLY)
    try:
      os.fsync(fd)
    finally:
      os.close(fd)
