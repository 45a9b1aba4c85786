"""Distributes requests over several servers such that each is answered exactly once, even if servers fail.

All servers share one queue, and each request is held by one thread at a time. A thread whose server fails retries a few
times with exponential backoff; then the server is taken out, its threads return their requests to the queue, and the
threads of other servers take these.
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
  """Sends requests to servers; iterate once over (request, answer) pairs, which come in any order."""

  def __init__(self, servers: Sequence[Server], ask: Callable[[Server, _Request], _Answer],
               requests: Sequence[_Request], *, concurrency: int, attempts: int = 4, backoff: float = 0.5):
    """Prepares the queue; sends nothing yet.

    Args:
      servers: one or more servers.
      ask: sends a request to a server; called from many threads. Raises ServerError for errors worth a retry.
      requests: requests, each of which is answered once.
      concurrency: maximum number of concurrent requests at each server.
      attempts: maximum number of attempts with a request at one server.
      backoff: seconds before the second attempt; doubled before each further one.
    """
    self._servers, self._ask, self._attempts, self._backoff = servers, ask, attempts, backoff
    self._waiting = collections.deque(requests)
    self._count = len(requests)
    self._threads = min(concurrency, self._count)
    # Answers, or the error that ends the iteration.
    self._done: queue.SimpleQueue[tuple[_Request, _Answer] | Exception] = queue.SimpleQueue()
    self._change = threading.Condition()  # guards the attributes below
    self.out: dict[Server, str] = {}  # servers that were taken out, and why
    self._ended = False

  def __iter__(self) -> Iterator[tuple[_Request, _Answer]]:
    """Yields requests with their answers as they arrive.

    Raises:
      UserError: when a server rejects a request, or no server is left.
    """
    for server in self._servers:
      for _ in range(self._threads):
        # Daemon threads, so that an aborted iteration does not wait for pending answers.
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
        self._done.put((request, self._ask_with_retries(server, request)))
      except ServerError as e:
        self._take_out(server, request, e)
      except Exception as e:  # reraised by the iteration
        self._done.put(e)

  def _take(self, server: Server) -> _Request | None:
    """Takes the next request; waits while other threads hold the rest, because they may have to return theirs."""
    with self._change:
      self._change.wait_for(lambda: self._is_stopped(server) or self._waiting)
      return None if self._is_stopped(server) else self._waiting.popleft()

  def _is_stopped(self, server: Server) -> bool:
    return self._ended or server in self.out

  def _ask_with_retries(self, server: Server, request: _Request) -> _Answer:
    for attempt in range(self._attempts):
      try:
        return self._ask(server, request)
      except ServerError as e:
        with self._change:
          # Random jitter, so that not all threads retry at once.
          wait = self._backoff * 2**attempt * random.uniform(1, 1.5)
          last = attempt + 1 == self._attempts or isinstance(e, TimedOutError) or not server.alive()
          if last or self._change.wait_for(lambda: self._is_stopped(server), timeout=wait):
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
          self._done.put(UserError(no_server_message(self.out)))
      self._change.notify_all()


def no_server_message(out: dict[Server, str]) -> str:
  """Returns the error message when all servers were taken out, with the reasons."""
  return "\n".join(["no vLLM server is left:", *(f"{s}: {reason}{s.log_tail()}" for s, reason in out.items())])
