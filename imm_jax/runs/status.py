"""WORKDIR/status.json: where a run stands, and in which process.

It is written when a run begins, at every stage, every half minute, and at the end. A process that is killed writes no
end: who reads the file with `read` is told so, by the lock that a run has on its directory while its process lives.
"""

import contextlib
import datetime
import fcntl
import json
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
_BEAT_S = 30.0


class Status(NamedTuple):
  """Where a run stands.

  Attributes:
    plan: the names of all its stages, or empty where that is not known.
    state: `running`, `finished`, `stopped` (it was told to, or killed), `failed`, or empty where that is not known.
    why: what ended it.
    stage: the one that it works on, or worked on last.
    pid: of its process 0.
    host: where that is.
    started: when, as ISO 8601.
    updated: when this was written.
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
  """Keeps status.json of a run; use as a context manager. Process 0 alone writes."""

  def __init__(self, root: Path, plan: Sequence[str]):
    self._path = root / FILE
    self._status = Status(tuple(plan), "running", pid=os.getpid(), host=socket.gethostname(), started=_now())
    self._done, self._lock, self._stack = threading.Event(), threading.Lock(), contextlib.ExitStack()

  def set_stage(self, name: str) -> None:
    """Says which stage is worked on now."""
    self._write(stage=name)

  def __enter__(self) -> "StatusWriter":
    if distributed.is_main():
      self._write()
      self._stack.enter_context(signals.before_forced_end(lambda why: self._end("stopped", why)))
      threading.Thread(target=self._beat, daemon=True).start()
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
    self._stack.close()
    self._end(*describe_end(error))

  def _end(self, state: str, why: str) -> None:
    self._done.set()
    self._write(state=state, why=why)

  def _beat(self) -> None:
    while not self._done.wait(_BEAT_S):
      self._write()

  def _write(self, **changes: str) -> None:
    if not distributed.is_main():
      return
    with self._lock:
      if self._status.state != "running":  # it has ended, while the beat was on its way
        return
      self._status = self._status._replace(updated=_now(), **changes)
      try:
        files.write_text(self._path, json.dumps(self._status._asdict(), indent=1) + "\n")
      except (OSError, UserError) as e:  # a full disk, say; a run does not end over this
        print(f"warning: {self._path} was not written ({e})", file=sys.stderr)


def describe_end(error: BaseException | None) -> tuple[str, str]:
  """The state in which an error, or none, leaves a run, and why.

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
  """Where a run stands; a process that is gone without a word is one that was killed."""
  status, running = _read(root), is_running(root)
  if status and status.state == "running" and not running:  # it may have ended between the two looks
    status, running = _read(root), is_running(root)
  if not status or running:
    return (status or Status())._replace(state="running" if running else "", why="")
  if status.state == "running" and not _beats(status):
    return status._replace(state="stopped", why=f"process {status.pid} on {status.host} was killed; last seen "
                           f"{status.updated or 'never'}")
  return status


def _read(root: Path) -> Status | None:
  """What the file says; None where it is missing or damaged."""
  try:
    found = {name: value for name, value in files.read_json(root / FILE).items() if name in Status._fields}
    found["plan"] = tuple(found["plan"])
    status = Status(**found)
    if not all(isinstance(value, str) for value in (*status.plan, *status[1:4], *status[5:])):
      raise ValueError("no status")
  except (KeyError, TypeError, UserError, ValueError):
    return None
  return status


def format_line(status: Status) -> str:
  """A line for the console; empty where nothing is known.

  >>> format_line(Status(("a", "b"), "stopped", "interrupted (Ctrl-C)", "b"))
  'stopped in b: interrupted (Ctrl-C)'
  """
  where = f" in {status.stage}" if status.stage and status.state != "finished" else ""
  who = f", process {status.pid} on {status.host} since {status.started}" if status.state == "running" else ""
  return status.state and f"{status.state}{where}{who}{f': {status.why}' if status.why else ''}"


def is_running(root: Path) -> bool:
  """Whether a process works in a run directory."""
  try:
    with (root / ".lock").open("r") as f:
      fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  except OSError:
    return False
  return False


def _beats(status: Status) -> bool:
  """Whether a process on another host has written lately: on some file systems only its own host sees its lock."""
  if status.host == socket.gethostname():
    return False
  try:
    updated = datetime.datetime.fromisoformat(status.updated).astimezone()  # a time without a zone is one of here
  except (OverflowError, ValueError):
    return False
  return (datetime.datetime.now().astimezone() - updated).total_seconds() < 4 * _BEAT_S


def _now() -> str:
  return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
