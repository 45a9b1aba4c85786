"""Runs a command, and ends all of its processes when the command ends, on SIGTERM, or when the parent process is gone.

    python supervisor.py PARENT COMMAND...

A separate program that uses only the standard library, because the parent may be killed at any moment and then cannot
clean up. PARENT is the parent's process id. Linux only.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_POLL_S = 0.5
# Seconds between SIGTERM and SIGKILL.
_GRACE_S = 15.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> int:
  """Runs the command; returns its exit code."""
  parent, command = int(sys.argv[1]), sys.argv[2:]
  libc = ctypes.CDLL(None, use_errno=True)
  # Adopts orphaned descendants, whatever session they have moved to.
  libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
  received = []
  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, _: received.append(number))
  # PDEATHSIG ends the command even if this process is killed.
  # No context manager: it would wait without a limit for a process that cannot be killed.
  child = subprocess.Popen(command, preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM))
  while not received and os.getppid() == parent and child.poll() is None:
    time.sleep(_POLL_S)
  for number, seconds in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
    end = time.monotonic() + seconds
    for process in descendants(os.getpid()):
      with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)
    while descendants(os.getpid()) and time.monotonic() < end:
      if child.poll() is not None:
        _reap()
      time.sleep(0.1)
  return child.poll() or 0


def descendants(process: int) -> list[int]:
  """Returns the ids of all descendants of a process, zombies included."""
  children: dict[int, list[int]] = {}
  for stat in Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):  # the process has ended meanwhile
      # The state and the parent follow the name in parentheses, which may contain anything.
      children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
  result, generation = [], [process]
  while generation:
    generation = [child for parent in generation for child in children.get(parent, [])]
    result += generation
  return result


def _reap() -> None:
  """Waits for adopted children that have ended."""
  with contextlib.suppress(ChildProcessError):
    while os.waitpid(-1, os.WNOHANG)[0]:
      pass


if __name__ == "__main__":
  sys.exit(main())
