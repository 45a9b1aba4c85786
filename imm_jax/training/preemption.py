"""Handles SIGTERM in training, which machines get before they are taken away (spot VMs, Slurm, Kubernetes, TPUs)."""

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
  """Makes SIGTERM, for the length of a block, set the event that is yielded in place of ending the process.

  If the block ends without having stopped for it, the previous handler gets the signal then.
  """
  stop_requested = threading.Event()
  if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
    yield stop_requested
    return
  before = signal.signal(signal.SIGTERM, lambda *_: stop_requested.set())
  try:
    with signals.allow_saving():
      yield stop_requested
  finally:
    signal.signal(signal.SIGTERM, before)
  if stop_requested.is_set() and callable(before):
    before(signal.SIGTERM, None)


def any_process_stops(stop_requested: threading.Event) -> bool:
  """Returns whether any process of the run has received SIGTERM; all processes must call it at the same step."""
  if jax.process_count() == 1:
    return stop_requested.is_set()
  return bool(multihost_utils.process_allgather(np.int32(stop_requested.is_set())).any())
