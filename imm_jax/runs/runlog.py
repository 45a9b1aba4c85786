"""WORKDIR/log.txt: what a run says, each line with its time, and what went wrong with its traceback.

Lines of stdout and stderr come there as well as to the console, but no progress bars; and records of Python's logging
(of jax, orbax and others) from the level on that `--verbosity` sets.
"""

import datetime
import logging
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from imm_jax.errors import PreemptedError, UserError

FILE = "log.txt"
_LOG = logging.getLogger("imm_jax.run")
_LOG.propagate = False  # the console has these lines already
_LOG.setLevel(logging.DEBUG)
_LOG.addHandler(logging.NullHandler())
_LEVELS = {"error": logging.ERROR, "warning": logging.WARNING}


def log_line(line: str) -> None:
  """A line for the log alone."""
  _LOG.info(line)


def current_file() -> Path | None:
  """The file that this process writes now, if it does."""
  return next((Path(h.baseFilename) for h in _LOG.handlers if isinstance(h, logging.FileHandler)), None)


class RunLog:
  """Keeps the log of a run; use as a context manager. Lines that come before `open` are kept for it.

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
    self._early = _Early()
    self._file: logging.Handler | None = None
    self._streams = sys.stdout, sys.stderr

  def open(self, file: Path) -> None:
    """Appends to this file from now on; where that cannot be done a warning says so."""
    try:
      self._file = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
    except OSError as e:
      print(f"warning: {file} cannot be written ({e.strerror})", file=sys.stderr)
      return
    self._file.setFormatter(_Formatter())
    self._file.handleError = lambda record: None  # of a full disk others speak
    for record in self._early.records:
      self._file.handle(record)
    self._detach(self._early)
    self._attach(self._file)

  def __enter__(self) -> "RunLog":
    self._streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Tee, self._streams)
    self._attach(self._early)
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
    self._detach(self._early)
    if self._file:
      self._detach(self._file)
      self._file.close()

  def _attach(self, handler: logging.Handler) -> None:
    for logger in (_LOG, logging.root):
      logger.addHandler(handler)

  def _detach(self, handler: logging.Handler) -> None:
    for logger in (_LOG, logging.root):
      logger.removeHandler(handler)


def follow(file: Path | None) -> None:
  """Has this process, which another one started, write to the log of that one, until it ends."""
  if file:
    RunLog().__enter__().open(file)


class _Early(logging.Handler):
  """Keeps records."""

  def __init__(self) -> None:
    super().__init__()
    self.records: list[logging.LogRecord] = []

  def emit(self, record: logging.LogRecord) -> None:
    self.records.append(record)


class _Formatter(logging.Formatter):
  """ISO time, level, and where another logger speaks its name."""

  def format(self, record: logging.LogRecord) -> str:
    time = datetime.datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
    name = "" if record.name == _LOG.name else f"{record.name}: "
    return f"{time} {record.levelname} {name}{super().format(record)}"


class _Tee:
  """A stream whose lines are logged, too."""

  def __init__(self, stream: TextIO):
    self._stream, self._line, self._lock = stream, "", threading.Lock()

  def write(self, text: str) -> int:
    written = self._stream.write(text)
    if not text.startswith("\r"):  # a progress bar draws itself over
      with self._lock:
        *lines, self._line = (self._line + text).split("\n")
      for line in filter(str.strip, lines):
        _LOG.log(_LEVELS.get(line.partition(":")[0], logging.INFO), "%s", line)
    return written

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)
