"""Runs a command and ends all of its processes when it ends, is told to (SIGTERM), or the process that asked is gone.

    python supervisor.py PARENT COMMAND...

A program by itself, of the standard library alone: what it watches may be killed at any moment, so nothing in it can be
relied on to clean up. PARENT is its process id. Linux only.
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
# Between asking and killing.
_GRACE_S = 15.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> int:
  """The command's exit code."""
  parent, command = int(sys.argv[1]), sys.argv[2:]
  libc = ctypes.CDLL(None, use_errno=True)
  # Children whose parent ends become ours, whatever session they have put themselves in.
  libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
  told = []
  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, _: told.append(number))
  # Should this process be killed itself, the command ends, too.
  with subprocess.Popen(command, preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)) as child:
    while not told and os.getppid() == parent and child.poll() is None:
      time.sleep(_POLL_S)
    for number, seconds in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
      end = time.monotonic() + seconds
      found = descendants(os.getpid())
      for process in found:
        with contextlib.suppress(ProcessLookupError):
          os.kill(process, number)
      while descendants(os.getpid()) and time.monotonic() < end:
        if child.poll() is not None:
          _reap()
        time.sleep(0.1)
    return child.poll() or 0


def descendants(process: int) -> list[int]:
  """All processes below one, those that ended and were not waited for included."""
  children: dict[int, list[int]] = {}
  for stat in Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):  # it ended meanwhile
      # The name, in parentheses, may hold anything; after it come the state and the parent.
      children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
  found, new = [], [process]
  while new:
    new = [child for parent in new for child in children.get(parent, [])]
    found += new
  return found


def _reap() -> None:
  """Waits for adopted children that have ended."""
  with contextlib.suppress(ChildProcessError):
    while os.waitpid(-1, os.WNOHANG)[0]:
      pass


if __name__ == "__main__":
  sys.exit(main())
