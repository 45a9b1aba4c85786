"""The dispatcher with simulated failures of servers."""

import contextlib
import time

import numpy as np
import pytest

from imm_jax.errors import UserError
from imm_jax.sampling.vllm.client import Server, ServerError
from imm_jax.sampling.vllm.dispatch import Dispatcher


def test_an_unexpected_error_ends_the_iteration() -> None:
  def ask(server: Server, request: int) -> int:
    raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    list(Dispatcher([Server("http://127.0.0.1:1")], ask, [1, 2], concurrency=2))


def test_failing_servers_lose_nothing() -> None:
  """Servers that fail at random lose and repeat nothing."""
  rng = np.random.default_rng(0)
  servers = [Server(f"http://127.0.0.1:{port}") for port in range(1, 6)]
  doomed = {server: int(rng.integers(5, 30)) for server in servers[:-1]}

  def ask(server: Server, request: int) -> int:
    if server in doomed:
      doomed[server] -= 1
      if doomed[server] < 0:
        raise ServerError("gone")
    return request

  asked = list(range(500))
  dispatcher = Dispatcher(servers, ask, asked, concurrency=8, backoff=0.001)
  answers = list(dispatcher)
  assert sorted(answers) == [(i, i) for i in asked]
  assert servers[-1] not in dispatcher.out


def test_the_loss_of_all_servers_loses_no_answer() -> None:
  def ask(server: Server, request: int) -> int:
    if request >= 50:
      raise ServerError("gone")
    return request

  answers = iter(Dispatcher([Server("http://127.0.0.1:1")], ask, range(60), concurrency=1, backoff=0.001))
  assert [next(answers) for _ in range(50)] == [(i, i) for i in range(50)]
  with pytest.raises(UserError, match="no vLLM server is left"):
    next(answers)


def test_closing_the_iterator_stops_requests() -> None:
  asked = []

  def ask(server: Server, request: int) -> None:
    asked.append(request)
    time.sleep(0.01)

  with contextlib.closing(iter(Dispatcher([Server("http://127.0.0.1:1")], ask, range(10_000), concurrency=2))) as it:
    next(it)
  count = len(asked)
  time.sleep(0.1)
  assert len(asked) <= count + 2


@pytest.mark.parametrize("url", ["host:8000", "ftp://host", "http://", "http://host/v1", "", "http://[::1"])
def test_malformed_urls_are_refused(url: str) -> None:
  with pytest.raises(UserError, match="expected the URL of a server"):
    Server(url)
