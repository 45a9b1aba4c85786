"""Results on disk as they come, so that a killed run goes on where it was."""

import errno
import json
import operator
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imm_jax.errors import UserError
from imm_jax.sampling import Completion

_SYNC_EVERY_S = 5.0


def completions_of(value: Any) -> list[Completion]:
  """Reads the completions of a request from what json gives for them.

  Raises:
    TypeError, ValueError: for anything else.
  """
  return [Completion(str(text), int(tokens), str(finish)) for text, tokens, finish in value]


class Journal:
  """A file of JSON lines: a header that says what is sampled, then the completions of a request in each line.

  Lines may hold other results than completions, which `parse` reads.

  A torn last line, and all that would follow, is dropped; a file whose header is another's is started anew.

  >>> import contextlib, tempfile
  >>> path = Path(tempfile.mkdtemp()) / "journal.jsonl"
  >>> journal = Journal(path, {"model": "a"})
  >>> journal.add(7, [Completion("four", 2, "stop")])
  >>> journal.close()
  >>> for model in ("a", "b"):
  ...   with contextlib.closing(Journal(path, {"model": model})) as journal:
  ...     journal.done
  {7: [Completion(text='four', num_tokens=2, finish='stop')]}
  {}
  """

  def __init__(self, path: Path, header: dict[str, Any], parse: Callable[[Any], list[Any]] = completions_of):
    """Reads what an earlier run has left.

    Args:
      path: of the file; made where it is missing.
      header: what decides the samples: model, settings, questions. Anything that json can write.
      parse: makes a result of what json gives for it; raises TypeError or ValueError for what is none.
    """
    self.done: dict[int, list[Any]] = {}
    self._path = path
    path.parent.mkdir(parents=True, exist_ok=True)
    self._file = path.open("ab", buffering=0)
    self._synced = time.monotonic()
    first = _line(header, sort_keys=True)
    with path.open("rb") as f:
      end = len(first) if f.readline() == first else 0
      while end and (found := _parsed(line := f.readline(), parse)):
        self.done[found[0]] = found[1]
        end += len(line)
    self._file.truncate(end)
    if not end:
      self._write(first)

  def add(self, number: int, result: list[Any]) -> None:
    """Writes the completions of a request, or another result: at once to the file, a few seconds later to the disk.

    Raises:
      UserError: when the disk refuses.
    """
    self._write(_line([number, result]))
    if time.monotonic() - self._synced > _SYNC_EVERY_S:
      self._sync()

  def close(self) -> None:
    """Puts all on disk."""
    self._sync()
    self._file.close()

  def _write(self, line: bytes) -> None:
    try:
      if self._file.write(line) < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as e:
      raise self._refused(e) from e

  def _refused(self, error: OSError) -> UserError:
    return UserError(f"{self._path}: cannot be written ({error.strerror}); the same command goes on after what is in "
                     "it")

  def _sync(self) -> None:
    try:
      os.fsync(self._file.fileno())
    except OSError as e:
      raise self._refused(e) from e
    self._synced = time.monotonic()


def _line(value: Any, *, sort_keys: bool = False) -> bytes:
  return json.dumps(value, sort_keys=sort_keys).encode() + b"\n"


def _parsed(line: bytes, parse: Callable[[Any], list[Any]]) -> tuple[int, list[Any]] | None:
  """None for what is no whole line of a journal."""
  try:
    number, result = json.loads(line) if line.endswith(b"\n") else None
    return operator.index(number), parse(result)
  except (ValueError, TypeError, IndexError):
    return None
