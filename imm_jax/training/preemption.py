"""SIGTERM, with which machines are taken back (spot VMs, Slurm, Kubernetes, Cloud TPU): save, then stop."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from imm_jax.runtime import signals


@contextlib.contextmanager
def watch() -> Iterator[threading.Event]:
  """For the length of a block, SIGTERM does not end the process but sets the event.

  One that comes too late for the block to stop is answered at its end, as it was before.
  """
  stop_requested = threading.Event()
  if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
    yield stop_requested
    return
  before = signal.signal(signal.SIGTERM, lambda *_: stop_requested.set())
  try:
    with signals.saving():
      yield stop_requested
  finally:
    signal.signal(signal.SIGTERM, before)
  if stop_requested.is_set() and callable(before):
    before(signal.SIGTERM, None)


def agree_to_stop(stop_requested: threading.Event) -> bool:
  """Whether any process of the run was told to stop; all of them must ask at the same step, and get the same answer."""
  if jax.process_count() == 1:
    return stop_requested.is_set()
  return bool(multihost_utils.process_allgather(np.int32(stop_requested.is_set())).any())
