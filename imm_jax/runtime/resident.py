"""The memory that this process holds: how much at most, and giving back what it does not need."""

import contextlib
import ctypes
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> bool:
  """Has `read_peak` count from now; False where the system does not do that (it is Linux that does)."""
  try:
    _CLEAR.write_text("5")
  except OSError:
    return False
  return True


def read_peak() -> float:
  """The most GiB that lay in this machine's memory since `reset_peak`, of whatever the process had mapped."""
  return _read_status("VmHWM") / 2**20


def read_current() -> int:
  """Bytes that lie in this machine's memory; 0 where the system does not say."""
  try:
    return 1024 * _read_status("VmRSS")
  except OSError:
    return 0


def _read_status(name: str) -> int:
  return next(int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))


def release_freed() -> None:
  """Gives back what was freed: glibc keeps arrays of up to 32 MiB for the next of their size, and most weights of a
  layer are no larger."""
  with contextlib.suppress(AttributeError, OSError):  # another libc
    ctypes.CDLL(None).malloc_trim(0)
