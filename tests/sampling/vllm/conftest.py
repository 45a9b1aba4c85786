"""Fixtures of the tests of vLLM: fake servers, and a program that starts them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imm_jax.sampling import Completion
from imm_jax.sampling.vllm.dispatch import Dispatcher
from tests import TINY, fake_vllm
from tests.fake_vllm import FakeVllm
from tests.sampling.vllm.helpers import expect_rows, find_seeds, sample


@pytest.fixture
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
  """Shortens the backoff of retries."""
  monkeypatch.setattr(Dispatcher.__init__, "__kwdefaults__", {"attempts": 4, "backoff": 0.02})


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
  with FakeVllm(TINY) as server:
    yield server


@pytest.fixture
def other() -> Iterator[FakeVllm]:
  with FakeVllm(TINY) as server:
    yield server


@pytest.fixture(scope="module")
def plain() -> list[list[Completion]]:
  """Returns the completions of a well-behaved server."""
  with FakeVllm(TINY) as server:
    rows = sample(server)
    assert rows == expect_rows(find_seeds(server))
  return rows


@pytest.fixture
def python(tmp_path: Path) -> str:
  """Writes a program that runs the fake server instead of `python -m vllm...`."""
  program = tmp_path / "bin" / "python"
  program.parent.mkdir()
  program.write_text("#!/bin/sh\n[ $1 = -c ] && echo vllm True && exit\nshift 2\n"
                     f"exec {sys.executable} {fake_vllm.__file__} \"$@\"\n")
  program.chmod(0o755)
  return str(program)
