"""Writes and reads WORKDIR/status.json: the state of a run, its current stage and its process.

It is written when a run begins, at every stage, every 30 seconds, and at the end. A process that is killed cannot
write its end; `read` notices that from the lock, which a run holds on its directory as long as its process lives.
"""

import contextlib
import datetime
import fcntl
import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from imm_jax import files
from imm_jax.errors import PreemptedError, UserError
from imm_jax.runtime import distributed, signals

FILE = "status.json"
_HEARTBEAT_S = 30.0


class Status(NamedTuple):
  """Holds the content of status.json.

  Attributes:
    plan: names of all stages; empty if unknown.
    state: `running`, `finished`, `stopped` (by a signal), `failed`, or empty if unknown.
    why: the reason why it ended; empty while it runs, and if it finished.
    stage: name of the current or last stage.
    pid: process id of its process 0.
    host: host name of that process.
    started: time of its start, ISO 8601.
    updated: time when this was written, ISO 8601.
  """

  plan: tuple[str, ...] = ()
  state: str = ""
  why: str = ""
  stage: str = ""
  pid: int = 0
  host: str = ""
  started: str = ""
  updated: str = ""


class StatusWriter:
  """Writes the status of a run while it lasts; use as a context manager. Only process 0 writes."""

  def __init__(self, root: Path, plan: Sequence[str]):
    self._path = root / FILE
    self._status = Status(tuple(plan), "running", pid=os.getpid(), host=socket.gethostname(), started=_now())
    self._ended, self._lock, self._stack = threading.Event(), threading.Lock(), contextlib.ExitStack()

  def set_stage(self, name: str) -> None:
    """Records the stage that begins now."""
    self._write(stage=name)

  def __enter__(self) -> "StatusWriter":
    if distributed.is_main():
      self._write()
      self._stack.enter_context(signals.call_before_exit(lambda reason: self._end("stopped", reason)))
      threading.Thread(target=self._write_regularly, daemon=True).start()
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
    self._stack.close()
    self._end(*describe_end(error))

  def _end(self, state: str, reason: str) -> None:
    self._ended.set()
    self._write(state=state, why=reason)

  def _write_regularly(self) -> None:
    while not self._ended.wait(_HEARTBEAT_S):
      self._write()

  def _write(self, **changes: str) -> None:
    if not distributed.is_main():
      return
    with self._lock:
      if self._status.state != "running":  # the run ended while the thread waited for the lock
        return
      self._status = self._status._replace(updated=_now(), **changes)
      try:
        files.write_json(self._path, self._status._asdict())
      except (OSError, UserError) as e:  # such as a full disk; the status is no reason to end a run
        print(f"warning: {self._path} was not written ({e})", file=sys.stderr)


def describe_end(error: BaseException | None) -> tuple[str, str]:
  """Returns the state of a run that ends with this error (None: without one), and the reason.

  >>> describe_end(None), describe_end(KeyboardInterrupt()), describe_end(ZeroDivisionError("of 1"))
  (('finished', ''), ('stopped', 'interrupted (Ctrl-C)'), ('failed', 'ZeroDivisionError: of 1'))
  """
  if error is None:
    return "finished", ""
  if isinstance(error, KeyboardInterrupt):
    return "stopped", "interrupted (Ctrl-C)"
  if isinstance(error, UserError | PreemptedError):
    return "failed" if isinstance(error, UserError) else "stopped", str(error)
  return "failed", f"{type(error).__name__}: {error}".strip().partition("\n")[0]


def read(root: Path) -> Status:
  """Returns the status of a run directory; a run whose process ended without writing an end was killed."""
  status, running = _read(root), is_running(root)
  if status and status.state == "running" and not running:  # it may have ended between the two checks
    status, running = _read(root), is_running(root)
  if not status or running:
    return (status or Status())._replace(state="running" if running else "", why="")
  if status.state == "running" and not _is_alive_elsewhere(status):
    return status._replace(state="stopped", why=f"process {status.pid} on {status.host} was killed; last seen "
                           f"{status.updated or 'never'}")
  return status


def _read(root: Path) -> Status | None:
  """Reads the file; returns None if it is missing or damaged."""
  try:
    fields = {name: value for name, value in files.read_json(root / FILE).items() if name in Status._fields}
    fields["plan"] = tuple(fields["plan"])
    status = Status(**fields)
    if not all(isinstance(value, str) for value in (*status.plan, *status[1:4], *status[5:])):
      raise ValueError("no status")
  except (KeyError, TypeError, UserError, ValueError):
    return None
  return status


def format_line(status: Status) -> str:
  """Formats a status as one line for the console; empty if the state is unknown.

  >>> format_line(Status(("a", "b"), "stopped", "interrupted (Ctrl-C)", "b"))
  'stopped in b: interrupted (Ctrl-C)'
  """
  stage = f" in {status.stage}" if status.stage and status.state != "finished" else ""
  process = f", process {status.pid} on {status.host} since {status.started}" if status.state == "running" else ""
  return status.state and f"{status.state}{stage}{process}{f': {status.why}' if status.why else ''}"


def is_running(root: Path) -> bool:
  """Returns whether a process of this host holds the lock of a run directory."""
  try:
    with (root / ".lock").open("r") as f:
      fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  except OSError:
    return False
  return False


def _is_alive_elsewhere(status: Status) -> bool:
  """Returns whether a process on another host has written recently; some file systems show locks to one host only."""
  if status.host == socket.gethostname():
    return False
  try:
    updated = datetime.datetime.fromisoformat(status.updated).astimezone()  # a time without a zone is local
  except (OverflowError, ValueError):
    return False
  return (datetime.datetime.now().astimezone() - updated).total_seconds() < 4 * _HEARTBEAT_S


def _now() -> str:
  return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
