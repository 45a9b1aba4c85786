"""A thread pool that holds a bounded number of jobs, for work that arrives faster than it is done."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BoundedPool:
  """Runs jobs in threads and blocks when too many wait; the first error of a job is raised by `submit` or `close`.

  >>> pool = BoundedPool(workers=2, jobs=4)
  >>> done = []
  >>> for i in range(6):
  ...   pool.submit(lambda i=i: done.append(i))
  >>> pool.close()
  >>> sorted(done)
  [0, 1, 2, 3, 4, 5]
  """

  def __init__(self, workers: int, jobs: int):
    """Starts with `workers` threads and room for `jobs` jobs, running or waiting."""
    self._pool = ThreadPoolExecutor(workers)
    self._free = threading.Semaphore(jobs)
    self._errors: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

  def reserve(self) -> None:
    """Waits for a free place, which `submit_reserved` takes; raises the first error of an earlier job."""
    self._free.acquire()
    if not self._errors.empty():
      self._free.release()
      raise self._errors.get()

  def submit_reserved(self, job: Callable[[], None], after: Callable[[], None] = lambda: None) -> None:
    """Runs `job` in the reserved place; then, even after an error, calls `after` and frees the place."""

    def done(future: "Future[None]") -> None:
      if not future.cancelled() and future.exception():
        self._errors.put(future.exception())
      after()
      self._free.release()

    self._pool.submit(job).add_done_callback(done)

  def submit(self, job: Callable[[], None]) -> None:
    """Waits for a free place, then runs `job` in a thread; raises the first error of an earlier job."""
    self.reserve()
    self.submit_reserved(job)

  def close(self, *, cancel: bool = False, quiet: bool = False) -> None:
    """Waits for the jobs to end; raises the first error unless `quiet`.

    Args:
      cancel: whether jobs that have not begun are dropped.
      quiet: whether errors are ignored.
    """
    self._pool.shutdown(cancel_futures=cancel)
    if not quiet and not self._errors.empty():
      raise self._errors.get()
