"""Worker processes that tell whether two LaTeX expressions are equal, within limits of time and memory.

They run `equality.py` and communicate in JSON lines: model output is neither unpickled nor evaluated here.
"""

import atexit
import functools
import json
import os
import queue
import subprocess
import sys
from pathlib import Path

from imm_jax.errors import UserError

_PROGRAM = Path(__file__).with_name("equality.py")


class Workers:
  """Runs a pool of worker processes, which are started on first use. Safe to share by threads.

  >>> workers = Workers(1)
  >>> workers.equal(r"\\sqrt{8}", r"2\\sqrt{2}")
  True
  >>> workers.close()
  """

  def __init__(self, count: int | None = None) -> None:
    """Initializes a pool of `count` >= 1 processes of about 0.1 GB each; by default one a core, at most eight."""
    self.count = min(8, os.cpu_count() or 1) if count is None else count
    self._all = [_Worker() for _ in range(self.count)]
    self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in self._all:
      self._free.put(worker)
    # Cached, because a question's samples often have the same wrong answer.
    self.equal = functools.lru_cache(maxsize=1 << 16)(self._equal)

  def _equal(self, gold: str, answer: str) -> bool:
    """Returns whether two expressions are equal; False if that was not decided in time.

    Raises:
      UserError: if a process cannot start.
    """
    worker = self._free.get()
    try:
      return worker.compare(gold, answer)
    finally:
      self._free.put(worker)

  def close(self) -> None:
    """Stops the processes; a later call of `equal` starts them again."""
    for worker in self._all:
      worker.stop()


@functools.cache
def shared_workers() -> Workers:
  """Returns one shared process for single verdicts, which ends with this one."""
  workers = Workers(1)
  atexit.register(workers.close)
  return workers


class _Worker:
  """Runs a process of `equality.py`, started on first use and restarted after it dies."""

  def __init__(self) -> None:
    self._process: subprocess.Popen[str] | None = None

  def compare(self, gold: str, answer: str) -> bool:
    """Returns whether two expressions are equal; False if that was not decided in time."""
    for _ in range(2):  # try a second process if the first had been killed
      process = self._process or self._start()
      reply = ""
      try:
        if process.stdin and process.stdout:  # they are pipes
          process.stdin.write(json.dumps([gold, answer]) + "\n")
          process.stdin.flush()
          reply = process.stdout.readline()
      except (OSError, ValueError):  # it is dead
        reply = ""
      if reply:
        return json.loads(reply) is True
      self.stop()
    return False

  def _start(self) -> subprocess.Popen[str]:
    # It has its own session, so that Ctrl-C reaches only this process. It ends with its stdin, and so with this one.
    self._process = subprocess.Popen([sys.executable, "-P", str(_PROGRAM)], stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE, text=True, start_new_session=True)
    if self._process.stdout is None or self._process.stdout.readline() != "ready\n":
      code = self._process.wait()
      self.stop()
      raise UserError(f"{_PROGRAM.name}, which compares LaTeX answers, ended with code {code} before it was ready; "
                      "see its error above; `pip install 'math-verify[antlr4_13_2]>=0.9'` if a module is missing")
    return self._process

  def stop(self) -> None:
    process, self._process = self._process, None
    if process is None:
      return
    process.kill()  # its child dies with it
    process.wait()
    for pipe in filter(None, (process.stdin, process.stdout)):
      try:
        pipe.close()
      except OSError:  # flushing fails as the process is dead
        continue
