"""Measures the resident memory of this process, and returns freed memory to the system."""

import contextlib
import ctypes
import gc
from pathlib import Path

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> bool:
  """Makes `read_peak` count from now on; returns False if the system cannot do that (only Linux can)."""
  try:
    _CLEAR_REFS.write_text("5")
  except OSError:
    return False
  return True


def read_peak() -> float:
  """Returns the peak resident memory since `reset_peak`, in GiB."""
  return _read_status("VmHWM") / 2**20


def read_current() -> int:
  """Returns the resident memory now, in bytes; 0 if the system does not report it."""
  try:
    return 1024 * _read_status("VmRSS")
  except OSError:
    return 0


def _read_status(name: str) -> int:
  return next(int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))


def release_freed() -> None:
  """Returns freed memory to the system, also that of objects in reference cycles.

  A sampler is in one, and Python may leave it there, with a whole model, until long after the next stage has begun.
  glibc keeps freed arrays of up to 32 MiB for reuse, and most weight matrices of a layer are no larger.
  """
  gc.collect()
  with contextlib.suppress(AttributeError, OSError):  # other libraries than glibc
    ctypes.CDLL(None).malloc_trim(0)
