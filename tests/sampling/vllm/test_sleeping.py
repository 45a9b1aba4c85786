"""A local server that sleeps between samplers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from imm_jax.errors import UserError
from imm_jax.sampling import Prompt
from imm_jax.sampling.vllm import VllmSampler, sleeping
from imm_jax.sampling.vllm.server import SpawnedServer
from tests import TINY
from tests.sampling.vllm.helpers import add_noise, ends

PROMPTS = [Prompt("a", "Tom has 7 eggs."), Prompt("b", "How many eggs does Tom have?")]


@pytest.fixture(autouse=True)
def end_servers() -> Iterator[None]:
  yield
  sleeping.end_all()


def _sample(python: str, folder: Path, log: Path, **options: object) -> tuple[SpawnedServer, list[str]]:
  """Returns the server that a sampler used and its greedy texts."""
  with VllmSampler(folder, python=python, args=("--fake", options.pop("mode", "greedy")), compute_dtype="float32",
                   log=log, sleep=True, start_timeout=60, **options) as sampler:
    texts = [done.text for done, in sampler.generate(PROMPTS, max_new_tokens=6)]
    return sampler._servers[0], texts


@pytest.mark.full
def test_a_server_is_woken_with_the_next_weights(python: str, tmp_path: Path) -> None:
  noisy = add_noise(tmp_path / "noisy", 0.03)
  first, texts = _sample(python, TINY, tmp_path / "a.log")
  second, noisy_texts = _sample(python, noisy, tmp_path / "b.log")
  assert second is first
  assert first.alive()
  assert not (tmp_path / "b.log").exists()  # nothing was started
  assert noisy_texts != texts
  assert _sample(python, TINY, tmp_path / "b.log") == (first, texts)
  third, _ = _sample(python, noisy, tmp_path / "c.log", concurrency=3)
  assert third is not first
  assert ends(first._process.pid)  # it would hold memory for nobody


@pytest.mark.full
def test_a_woken_server_with_old_weights_is_detected(python: str, tmp_path: Path) -> None:
  server, _ = _sample(python, TINY, tmp_path / "a.log", mode="stale")
  # The fake accepts another model's weights, and goes on with its own.
  with pytest.raises(UserError, match=r"does not run the weights of .*noisy"):
    _sample(python, add_noise(tmp_path / "noisy", 0.03), tmp_path / "a.log", mode="stale")
  assert ends(server._process.pid)


def test_a_server_that_cannot_sleep_is_ended(
    python: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
  with VllmSampler(TINY, python=python, args=("--fake", "sleepless"), log=tmp_path / "a.log", sleep=True) as sampler:
    server, sampler._checked = sampler._servers[0], True
  assert "cannot be put to sleep (it does not sleep)" in capfd.readouterr().err
  assert ends(server._process.pid)


def test_unending_server_spares_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
  """A server that cannot be ended leaves the others ended."""
  ended = []

  class Server:
    def __init__(self, name: str):
      self.name = name

    def close(self) -> None:
      ended.append(self.name)
      if self.name == "a":
        raise OSError("a stays")

    def wake(self, *_: object, **__: object) -> None:
      pass

  asleep = {name: (Server(name), TINY) for name in ("a", "b", "c")}
  monkeypatch.setattr(sleeping, "_asleep", asleep)
  with pytest.raises(OSError, match="a stays"):
    sleeping.wake("c", TINY, "1", timeout=1)
  assert ended == ["a", "b"]
  assert sleeping.wake("c", TINY, "1", timeout=1)[0].name == "c"
  assert not asleep
