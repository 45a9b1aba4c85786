"""Threads for work that arrives faster than it is done."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BoundedPool:
  """Threads that hold a bounded number of jobs; the first error of any of them is raised to whoever submits or closes.

  >>> pool = BoundedPool(workers=2, jobs=4)
  >>> done = []
  >>> for i in range(6):
  ...   pool.submit(lambda i=i: done.append(i))
  >>> pool.close()
  >>> sorted(done)
  [0, 1, 2, 3, 4, 5]
  """

  def __init__(self, workers: int, jobs: int):
    self._pool = ThreadPoolExecutor(workers)
    self._free = threading.Semaphore(jobs)
    self._errors: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

  def reserve(self) -> None:
    """Waits until one more job may be held, for `submit_reserved`; raises the first error of an earlier one."""
    self._free.acquire()
    if not self._errors.empty():
      self._free.release()
      raise self._errors.get()

  def submit_reserved(self, work: Callable[[], None], after: Callable[[], None] = lambda: None) -> None:
    """Runs `work`, then in any case `after`, and frees the place that was reserved."""

    def done(future: "Future[None]") -> None:
      if not future.cancelled() and future.exception():
        self._errors.put(future.exception())
      after()
      self._free.release()

    self._pool.submit(work).add_done_callback(done)

  def submit(self, work: Callable[[], None]) -> None:
    """Waits for a place, then runs `work` in a thread."""
    self.reserve()
    self.submit_reserved(work)

  def close(self, *, cancel: bool = False, quiet: bool = False) -> None:
    """Waits for what runs (and, unless cancelled, for what waits); raises the first error unless `quiet`."""
    self._pool.shutdown(cancel_futures=cancel)
    if not quiet and not self._errors.empty():
      raise self._errors.get()
