"""Reloading of weights by vLLM's servers, and detection of servers with other weights."""

import collections
from pathlib import Path

import numpy as np
import pytest

from imm_jax.errors import UserError
from imm_jax.model import checkpoint_folder
from imm_jax.sampling import Completion
from imm_jax.sampling.vllm import VllmSampler, freshness
from tests import TINY
from tests.fake_vllm import FakeVllm
from tests.sampling.vllm.helpers import OPTIONS, PROMPTS, add_noise, sample

pytestmark = pytest.mark.usefixtures("short_backoff")


def test_a_reload_leaves_no_old_keys_and_values(fake: FakeVllm, other: FakeVllm) -> None:
  fake.folder = "older"
  with VllmSampler(TINY, urls=[fake.url, other.url], compute_dtype="float32"):
    for server in (fake, other):
      assert server.steps == ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version",
                              "/weight_info", "/resume"]
      assert server.folder == str(TINY.resolve())
      assert server.version == checkpoint_folder.digest(TINY)


def test_a_server_that_cannot_reload_is_not_used(
    fake: FakeVllm, other: FakeVllm, plain: list[list[Completion]], capfd: pytest.CaptureFixture) -> None:
  fake.resets = False
  assert sample(fake, other) == plain
  assert "not used in this round (its prefix cache cannot be reset)" in capfd.readouterr().err
  assert "/resume" not in fake.steps
  assert not fake.seen
  other.version = None
  with pytest.raises(UserError, match="no vLLM server is left"):
    sample(fake, other)


def test_old_server_is_refused(fake: FakeVllm) -> None:
  """It has no endpoints for reloading; the message gives advice."""
  fake.dev = False
  with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
    sample(fake)


def test_other_weights_are_detected(
    fake: FakeVllm, tmp_path: Path, plain: list[list[Completion]]) -> None:
  """They are found before the server samples."""
  fake.folder = str(add_noise(tmp_path / "older", 0.01))
  fake.stale = True
  with pytest.raises(UserError, match=r"does not run the weights of .* on average and .* at most \(prompt \d, token"):
    sample(fake)
  assert not fake.seen
  with VllmSampler(TINY, urls=[fake.url], compute_dtype="float32", tolerance=5.0) as sampler:
    assert sampler.generate(PROMPTS, **OPTIONS) == plain


def test_every_replica_is_checked(
    fake: FakeVllm, other: FakeVllm, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
  noisy = str(add_noise(tmp_path / "older", 0.01))
  fake.replicas, fake.folders = 6, {5: noisy}
  with pytest.raises(UserError, match=rf"{fake.url}, replica 5 of 6: does not run the weights of"):
    sample(fake)
  assert collections.Counter(fake.probed) == dict.fromkeys(range(6), freshness.PROMPTS)
  assert not fake.seen
  assert "data-parallel" not in capfd.readouterr().err
  other.replicas = None
  sample(other)
  assert "does not say how many data-parallel replicas it has" in capfd.readouterr().err


def test_small_changes_are_detected(
    fake: FakeVllm, tmp_path: Path) -> None:
  """The earlier weights show them."""
  sample(fake)
  folder = add_noise(tmp_path / "newer", 0.002)
  fake.stale = True
  with VllmSampler(folder, urls=[fake.url], compute_dtype="float32", tolerance=5.0) as sampler, pytest.raises(
      UserError, match=f"still runs the weights of {TINY}"):
    sampler.generate(PROMPTS, **OPTIONS)
  assert len(fake.seen) == len(PROMPTS) * 3  # of the first
  fake.stale = False
  assert sample(fake, folder=folder)


def test_a_reload_by_another_run_ends_this_one(fake: FakeVllm, tmp_path: Path) -> None:
  journal = tmp_path / "journal.jsonl"

  def trouble(number: int, body: dict) -> str:
    if number == 10:
      fake.version = "of another run"
    return ""

  fake.trouble = trouble
  with pytest.raises(UserError, match=r"was given other weights .*'of another run'"):
    sample(fake, journal=journal)
  assert not journal.exists()


def test_a_restart_by_another_run_ends_this_one(fake: FakeVllm, tmp_path: Path) -> None:
  fake.dev, journal = False, tmp_path / "journal.jsonl"

  def trouble(number: int, body: dict) -> str:
    if number == 10:
      fake.folder = "/of/another/run"
    return ""

  fake.trouble = trouble
  with VllmSampler(TINY, urls=[fake.url], compute_dtype="float32", restart="true") as sampler, pytest.raises(
      UserError, match=r"was given other weights .*'/of/another/run'"):
    sampler.generate(PROMPTS, **OPTIONS, journal=journal)
  assert not journal.exists()


def test_decoder_and_transformers_agree(
    fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
  """They do so to a hundredth of the tolerance."""
  result = []
  check = freshness.check_weights
  monkeypatch.setattr(freshness, "check_weights", lambda *args,
                      **options: result.append(check(*args, **options)) or result[-1])
  sample(fake)
  (agreement,), = result[0].values()
  assert agreement.within(freshness.TOLERANCES["float32"] / 100)


def test_nan_is_no_agreement() -> None:
  nan = np.full((1, 1), np.nan)
  result = freshness.measure_agreement([freshness.Generated([1], [-1.0], "length")], nan, nan)
  assert not result.within(1.0)


def test_a_restart_command_replaces_the_reload(fake: FakeVllm, tmp_path: Path, plain: list[list[Completion]]) -> None:
  output = tmp_path / "told"
  fake.dev = False
  command = f"cp {{model}}/config.json {output}"
  with VllmSampler(TINY, urls=[fake.url], compute_dtype="float32", restart=command) as sampler:
    assert sampler.generate(PROMPTS, **OPTIONS) == plain
  assert output.read_text() == (TINY / "config.json").read_text()
  with pytest.raises(UserError, match=r"restart='cat /no/such/file': ended with exit code 1: .*No such file"):
    VllmSampler(TINY, urls=[fake.url], compute_dtype="float32", restart="cat /no/such/file")
  # Background processes of the command are not waited for.
  with VllmSampler(TINY, urls=[fake.url], compute_dtype="float32", restart="sh -c 'sleep 5 & exit 0'", start_timeout=3):
    pass
