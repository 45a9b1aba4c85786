"""Worker processes that say whether two LaTeX expressions are equal, within limits of time and memory.

They run `equality.py`, and are spoken to in JSON lines: nothing of a model's text is unpickled or evaluated here.
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
  """Worker processes, each started when it is first needed. Threads may ask together.

  >>> workers = Workers(1)
  >>> workers.equal(r"\\sqrt{8}", r"2\\sqrt{2}")
  True
  >>> workers.close()
  """

  def __init__(self, count: int | None = None) -> None:
    """Takes the number of processes, about 0.1 GB each; by default one for each core, at most eight.

    Raises:
      ValueError: for less than one.
    """
    self.count = min(8, os.cpu_count() or 1) if count is None else count
    if self.count < 1:
      raise ValueError(f"workers={count}: expected at least 1")
    self._all = [_Worker() for _ in range(self.count)]
    self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in self._all:
      self._free.put(worker)
    # A question's samples often end in the same wrong answer.
    self.equal = functools.lru_cache(maxsize=1 << 16)(self._equal)

  def _equal(self, gold: str, answer: str) -> bool:
    """Whether two expressions are equal; False where that was not found out in time.

    Raises:
      UserError: when a process cannot start.
    """
    worker = self._free.get()
    try:
      return worker.ask(gold, answer)
    finally:
      self._free.put(worker)

  def close(self) -> None:
    """Ends the processes; who asks afterwards starts them again."""
    for worker in self._all:
      worker.end()


@functools.cache
def shared() -> Workers:
  """One process for single verdicts, until this one ends."""
  workers = Workers(1)
  atexit.register(workers.close)
  return workers


class _Worker:
  """A process of `equality.py`, started when first asked and again after a death."""

  def __init__(self) -> None:
    self._process: subprocess.Popen[str] | None = None

  def ask(self, gold: str, answer: str) -> bool:
    """Whether two expressions are equal; False where that was not found out in time."""
    for _ in range(2):  # a second process where the first had been killed
      process = self._process or self._start()
      try:
        process.stdin.write(json.dumps([gold, answer]) + "\n")
        process.stdin.flush()
        reply = process.stdout.readline()
      except (OSError, ValueError):  # it is dead
        reply = ""
      if reply:
        return json.loads(reply) is True
      self.end()
    return False

  def _start(self) -> subprocess.Popen[str]:
    # A session of its own: Ctrl-C is this process's to handle. It ends with its standard input, so when this one does.
    self._process = subprocess.Popen([sys.executable, "-P", str(_PROGRAM)], stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE, text=True, start_new_session=True)
    if self._process.stdout.readline() != "ready\n":
      code = self._process.wait()
      self.end()
      raise UserError(f"{_PROGRAM.name}, which compares LaTeX answers, ended with code {code} before it was ready; "
                      "its error stands above. `pip install 'math-verify[antlr4_13_2]>=0.9'` if a module is missing")
    return self._process

  def end(self) -> None:
    process, self._process = self._process, None
    if process is None:
      return
    process.kill()  # its child dies with it
    process.wait()
    for pipe in (process.stdin, process.stdout):
      try:
        pipe.close()
      except OSError:  # what could not be written any more
        continue
