"""Writes WORKDIR/log.txt: the lines that a run prints, each with its time, and errors with their traceback.

It holds the lines of stdout and stderr except progress bars, and the records of Python's logging (of jax, orbax and
others) at or above the level that `--verbosity` sets.
"""

import contextlib
import datetime
import logging
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from imm_jax import integrity
from imm_jax.errors import PreemptedError, UserError

FILE = "log.txt"
_LOG = logging.getLogger("imm_jax.run")
_LOG.propagate = False  # the console has these lines already
_LOG.setLevel(logging.DEBUG)
_LOG.addHandler(logging.NullHandler())
_LEVELS = {"error": logging.ERROR, "warning": logging.WARNING}


def log_line(line: str) -> None:
  """Writes a line to the log and not to the console."""
  _LOG.info(line)


def get_log_file() -> Path | None:
  """Returns the log file that this process is writing, or None."""
  return next((Path(h.baseFilename) for h in _LOG.handlers if isinstance(h, logging.FileHandler)), None)


class RunLog:
  """Writes the log of a run; use as a context manager. Lines from before `open` are buffered and written then.

  >>> import tempfile
  >>> folder = Path(tempfile.mkdtemp())
  >>> with RunLog() as log:
  ...   print("before")
  ...   log.open(folder / FILE)
  ...   print("warning: after")
  before
  warning: after
  >>> [line.split(" ", 1)[1] for line in (folder / FILE).read_text().splitlines()]
  ['INFO before', 'WARNING warning: after']
  """

  def __init__(self) -> None:
    self._buffer = _BufferHandler()
    self._file: logging.FileHandler | None = None
    self._streams = sys.stdout, sys.stderr

  def open(self, file: Path) -> None:
    """Appends to this file from now on; prints a warning if it cannot be written."""
    try:
      self._file = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
    except OSError as e:
      print(f"warning: {file} cannot be written ({e.strerror})", file=sys.stderr)
      return
    self._file.setFormatter(_Formatter())
    self._file.handleError = lambda record: None  # a full disk is reported by the writers of the run's results
    for record in self._buffer.records:
      self._file.handle(record)
    self._detach(self._buffer)
    self._attach(self._file)

  def __enter__(self) -> "RunLog":
    self._streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Tee, self._streams)
    self._attach(self._buffer)
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
               ) -> None:
    if isinstance(error, UserError):
      _LOG.error("error: %s", error)
    elif isinstance(error, PreemptedError):
      _LOG.warning("%s", error)
    elif isinstance(error, KeyboardInterrupt):
      _LOG.warning("interrupted (Ctrl-C)")
    elif error is not None:
      _LOG.error("error: %r", error, exc_info=(kind, error, trace))
    sys.stdout, sys.stderr = self._streams
    self._detach(self._buffer)
    if self._file:
      self._detach(self._file)
      self._file.close()
      file = Path(self._file.baseFilename)
      with contextlib.suppress(OSError, UserError):  # such as a full disk; must not hide an error of the run
        integrity.seal(file.parent, file.name)

  def _attach(self, handler: logging.Handler) -> None:
    for logger in (_LOG, logging.root):
      logger.addHandler(handler)

  def _detach(self, handler: logging.Handler) -> None:
    for logger in (_LOG, logging.root):
      logger.removeHandler(handler)


def follow(file: Path | None) -> None:
  """Makes this process append to the log of the process that started it, until it ends; does nothing for None."""
  if file:
    RunLog().__enter__().open(file)


class _BufferHandler(logging.Handler):
  """Keeps records in memory."""

  def __init__(self) -> None:
    super().__init__()
    self.records: list[logging.LogRecord] = []

  def emit(self, record: logging.LogRecord) -> None:
    self.records.append(record)


class _Formatter(logging.Formatter):
  """Formats a record as ISO time, level and message, with the logger's name unless it is the run's own."""

  def format(self, record: logging.LogRecord) -> str:
    time = datetime.datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
    name = "" if record.name == _LOG.name else f"{record.name}: "
    return f"{time} {record.levelname} {name}{super().format(record)}"


class _Tee:
  """Passes text on to a stream and also logs its lines."""

  def __init__(self, stream: TextIO):
    self._stream, self._line, self._lock = stream, "", threading.Lock()

  def write(self, text: str) -> int:
    written = self._stream.write(text)
    if not text.startswith("\r"):  # a progress bar, which overwrites its line
      with self._lock:
        *lines, self._line = (self._line + text).split("\n")
      for line in filter(str.strip, lines):
        _LOG.log(_LEVELS.get(line.partition(":")[0], logging.INFO), "%s", line)
    return written

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)
