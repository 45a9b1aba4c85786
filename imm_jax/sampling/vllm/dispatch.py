"""Requests over several servers: each is answered exactly once, whatever becomes of the servers.

A request waits in one queue for all servers and is held by one thread at a time. A thread whose server fails asks it
again a few times, waiting longer each time; then the server is taken out, its threads put back what they hold, and the
others' threads take that.
"""

import collections
import queue
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from imm_jax.errors import UserError
from imm_jax.sampling.vllm.client import Server, ServerError, TimedOutError

_Request = TypeVar("_Request")
_Answer = TypeVar("_Answer")


class Dispatcher(Generic[_Request, _Answer]):
  """Asks servers; iterate once over (request, answer), which come in any order."""

  def __init__(self, servers: Sequence[Server], ask: Callable[[Server, _Request], _Answer],
               requests: Sequence[_Request], *, concurrency: int, attempts: int = 4, backoff: float = 0.5):
    """Asks nothing yet.

    Args:
      servers: one or more.
      ask: asks a server; called from many threads. It raises ServerError for what may pass.
      requests: each is answered once.
      concurrency: requests under way at each server.
      attempts: at one server with one request.
      backoff: seconds before the second attempt; doubled before each further one.
    """
    self._servers, self._ask, self._attempts, self._backoff = servers, ask, attempts, backoff
    self._waiting = collections.deque(requests)
    self._count = len(requests)
    self._threads = min(concurrency, self._count)
    # A request's answer, or the error that ends it all.
    self._done: queue.SimpleQueue[tuple[_Request, _Answer] | Exception] = queue.SimpleQueue()
    self._change = threading.Condition()  # of what is below
    self.out: dict[Server, str] = {}  # servers that were taken out, and why
    self._ended = False

  def __iter__(self) -> Iterator[tuple[_Request, _Answer]]:
    """Yields answers as they come.

    Raises:
      UserError: when a server refuses a request, or no server is left.
    """
    for server in self._servers:
      for _ in range(self._threads):
        # Who breaks off does not wait for answers that are still to come.
        threading.Thread(target=self._work, args=(server,), daemon=True).start()
    try:
      for _ in range(self._count):
        done = self._done.get()
        if isinstance(done, Exception):
          raise done
        yield done
    finally:
      with self._change:
        self._ended = True
        self._change.notify_all()

  def _work(self, server: Server) -> None:
    while (request := self._take(server)) is not None:
      try:
        self._done.put((request, self._persist(server, request)))
      except ServerError as e:
        self._take_out(server, request, e)
      except Exception as e:  # whoever iterates is to know
        self._done.put(e)

  def _take(self, server: Server) -> _Request | None:
    """What to ask next; waits while others hold all that is left, for they may have to put it back."""
    with self._change:
      self._change.wait_for(lambda: self._stops(server) or self._waiting)
      return None if self._stops(server) else self._waiting.popleft()

  def _stops(self, server: Server) -> bool:
    return self._ended or server in self.out

  def _persist(self, server: Server, request: _Request) -> _Answer:
    for attempt in range(self._attempts):
      try:
        return self._ask(server, request)
      except ServerError as e:
        with self._change:
          # By chance a little more, lest all threads come back at once.
          wait = self._backoff * 2**attempt * random.uniform(1, 1.5)
          last = attempt + 1 == self._attempts or isinstance(e, TimedOutError) or not server.alive()
          if last or self._change.wait_for(lambda: self._stops(server), timeout=wait):
            raise
    raise AssertionError("not reached")

  def _take_out(self, server: Server, request: _Request, error: ServerError) -> None:
    with self._change:
      self._waiting.appendleft(request)
      if server not in self.out and not self._ended:
        self.out[server] = str(error)
        left = len(self._servers) - len(self.out)
        if left:
          print(f"warning: server {server} is taken out ({error}); {left} left", file=sys.stderr)
        else:
          self._done.put(UserError(none_left(self.out)))
      self._change.notify_all()


def none_left(out: dict[Server, str]) -> str:
  """The message when all servers were taken out for these reasons."""
  return "\n".join(["no vLLM server is left:", *(f"{s}: {why}{s.last_words()}" for s, why in out.items())])
