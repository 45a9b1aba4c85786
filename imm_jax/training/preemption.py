"""SIGTERM, with which machines are taken back (spot VMs, Slurm, Kubernetes, Cloud TPU): save, then stop."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], bool]]:
  """For the length of a block, SIGTERM does not end the process but is told.

  Yields:
    A function of the step that says whether to save and stop now. With several processes all of them get the same
    answer at the same step, whichever was signalled (`jax.distributed`'s coordinator agrees on one).
  """
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
  elif threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
    yield lambda step: False
  else:
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
      yield lambda step: told.is_set()
    finally:
      signal.signal(signal.SIGTERM, before)
