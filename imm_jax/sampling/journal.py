"""Results saved as they arrive, so that a killed run resumes where it was."""

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


def parse_completions(value: Any) -> list[Completion]:
  """Converts parsed JSON to the completions of a request.

  Raises:
    TypeError, ValueError: for malformed input.
  """
  return [Completion(str(text), int(tokens), str(finish)) for text, tokens, finish in value]


class Journal:
  """Appends results to a JSONL file: a header that identifies the task, then one request's completions per line.

  With another `parse` lines may hold other results. Everything from the first torn line on is dropped; a file with a
  different header is started over.

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

  def __init__(self, path: Path, header: dict[str, Any], parse: Callable[[Any], list[Any]] = parse_completions):
    """Opens or creates the file, and reads the results of an earlier run into `done`.

    Args:
      path: path of the file.
      header: everything that determines the samples (model, settings, questions), JSON-serializable.
      parse: converts parsed JSON to a result; raises TypeError or ValueError for malformed input.
    """
    self.done: dict[int, list[Any]] = {}
    self._path = path
    path.parent.mkdir(parents=True, exist_ok=True)
    self._file = path.open("ab", buffering=0)
    self._synced = time.monotonic()
    header_line = _line(header, sort_keys=True)
    with path.open("rb") as f:
      end = len(header_line) if f.readline() == header_line else 0
      while end and (entry := _parse_line(line := f.readline(), parse)):
        self.done[entry[0]] = entry[1]
        end += len(line)
    self._file.truncate(end)
    if not end:
      self._write(header_line)

  def add(self, number: int, result: list[Any]) -> None:
    """Appends the result of a request; it is flushed to disk within a few seconds.

    Raises:
      UserError: when the file cannot be written.
    """
    self._write(_line([number, result]))
    if time.monotonic() - self._synced > _SYNC_EVERY_S:
      self._sync()

  def close(self) -> None:
    """Flushes everything to disk and closes the file."""
    self._sync()
    self._file.close()

  def _write(self, line: bytes) -> None:
    try:
      if self._file.write(line) < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as e:
      raise self._write_error(e) from e

  def _write_error(self, error: OSError) -> UserError:
    return UserError(f"{self._path}: cannot be written ({error.strerror}); repeat the command to resume after the "
                     "results in it")

  def _sync(self) -> None:
    try:
      os.fsync(self._file.fileno())
    except OSError as e:
      raise self._write_error(e) from e
    self._synced = time.monotonic()


def _line(value: Any, *, sort_keys: bool = False) -> bytes:
  return json.dumps(value, sort_keys=sort_keys).encode() + b"\n"


def _parse_line(line: bytes, parse: Callable[[Any], list[Any]]) -> tuple[int, list[Any]] | None:
  """Parses a line of a journal; returns None if it is torn or malformed."""
  try:
    number, result = json.loads(line) if line.endswith(b"\n") else None
    return operator.index(number), parse(result)
  except (ValueError, TypeError, IndexError):
    return None
