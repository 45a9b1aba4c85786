"""The client of vLLM with a fake server that speaks its API and can misbehave."""

import json
import resource
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from imm_jax.errors import UserError
from imm_jax.model import checkpoint_folder, hf
from imm_jax.sampling import Completion, Prompt
from imm_jax.sampling.vllm import VllmSampler, sampler as vllm
from tests import TINY
from tests.fake_vllm import END, FakeVllm, _Handler
from tests.sampling.vllm.helpers import EOS, OPTIONS, PROMPTS, TOKENIZER, sample

pytestmark = pytest.mark.usefixtures("short_backoff")


def test_requests_hold_all_settings(fake: FakeVllm) -> None:
  """There is one request for each question and temperature."""
  rows = sample(fake, stop=("zebra",), top_p=0.9)
  assert all(len(row) == 5 for row in rows)
  assert len(fake.seen) == len(PROMPTS) * 3
  counts = {0.0: 1, 0.5: 2, 1.5: 1}  # equal answers at temperature 0 are asked for once
  for body in fake.seen:
    assert body["n"] == counts[body["temperature"]]
    assert body["prompt"] in [TOKENIZER(p.text)["input_ids"] for p in PROMPTS]
    assert (body["top_p"], body["stop"]) == (0.9, ["zebra"])
    assert (body["stop_token_ids"], body["ignore_eos"]) == (list(EOS), True)
    # Requests override a server's defaults, such as those of a model's generation_config.json.
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (0, 0.0, 1.0)
  for row in rows:
    assert row[0] == row[3]


def test_no_two_samples_share_a_seed() -> None:
  prompts = [Prompt(f"q{i % 900}", "text") for i in range(1000)]
  requests = vllm._requests(prompts, [[1]] * 1000, 12, (0.2, 0.4, 0.6), 7)
  seeds = [r.seed + j for r in requests for j in range(r.count)]
  assert len(set(seeds)) == len(seeds) == 12_000
  assert 0 <= min(seeds) <= max(seeds) < 2**63
  assert {r.seed for r in requests}.isdisjoint(
      r.seed for r in vllm._requests(prompts, [[1]] * 1000, 12, (0.2, 0.4, 0.6), 8))


@pytest.mark.full
def test_samples_are_independent(fake: FakeVllm, other: FakeVllm, plain: list[list[Completion]]) -> None:
  """They do not depend on order or on other prompts."""
  assert sample(fake, other, prompts=PROMPTS[::-1]) == plain[::-1]
  assert sample(fake, prompts=PROMPTS[2:5], concurrency=1) == plain[2:5]
  assert [row[:3] for row in plain] == sample(fake, num_samples=3)
  assert sample(fake, seed=4) != plain


@pytest.mark.full
@pytest.mark.parametrize("trouble", [t for t in _Handler.TROUBLES if t not in ("400", "slow")])
def test_transient_errors_are_retried(fake: FakeVllm, plain: list[list[Completion]], trouble: str) -> None:
  fake.trouble = lambda number, body: trouble if fake.seen.count(body) == 1 else ""
  assert sample(fake) == plain
  assert len(fake.answered) == len(PROMPTS) * 3


def test_rejected_request_ends_the_call(fake: FakeVllm) -> None:
  """The message is the server's."""
  fake.trouble = lambda number, body: "400"
  with pytest.raises(UserError, match=r"/v1/completions: the server refuses \(HTTP 400\).*said no"):
    sample(fake, concurrency=1)
  assert len(fake.seen) <= 2


def test_a_failing_server_is_taken_out(
    fake: FakeVllm, other: FakeVllm, plain: list[list[Completion]], capfd: pytest.CaptureFixture) -> None:
  fake.trouble = lambda number, body: "500"
  assert sample(fake, other) == plain
  assert f"{fake.url} is taken out (/v1/completions: HTTP 500" in capfd.readouterr().err
  assert len(other.answered) == len(PROMPTS) * 3
  assert len(fake.seen) <= 4 * 4  # each thread's attempts


def test_a_slow_server_is_taken_out(
    fake: FakeVllm, other: FakeVllm, plain: list[list[Completion]], capfd: pytest.CaptureFixture) -> None:
  fake.trouble = lambda number, body: "slow"
  assert sample(fake, other, timeout=1.0) == plain
  assert "has not answered /v1/completions for 1 s" in capfd.readouterr().err
  assert len(fake.seen) <= 4  # no second attempt


def test_dead_server_loses_no_question(
    fake: FakeVllm, other: FakeVllm, plain: list[list[Completion]], tmp_path: Path) -> None:
  """Each question is answered once."""
  dead = []

  def trouble(number: int, body: dict) -> str:
    if number < 5:
      return ""
    if not dead:
      dead.append(number)
      fake.kill()
    return "drop"

  fake.trouble = trouble
  journal = tmp_path / "journal.jsonl"
  assert sample(fake, other, journal=journal) == plain
  numbers = [json.loads(line)[0] for line in journal.read_text().splitlines()[1:]]
  assert sorted(numbers) == list(range(len(PROMPTS) * 3))
  assert fake.answered
  assert len(other.answered) >= len(numbers) - len(fake.answered)


def test_the_loss_of_all_servers_reports_all_reasons(fake: FakeVllm, other: FakeVllm) -> None:
  fake.trouble = lambda number, body: "500"
  other.trouble = lambda number, body: "not json"
  with VllmSampler(TINY, urls=[fake.url, other.url], compute_dtype="float32") as sampler:
    for _ in range(2):  # nor does another call wait for them
      with pytest.raises(UserError, match="no vLLM server is left") as error:
        sampler.generate(PROMPTS, **OPTIONS)
      for part in (fake.url, "HTTP 500", other.url, "not JSON"):
        assert part in str(error.value)


def test_a_killed_run_resumes_from_its_journal(
    fake: FakeVllm, plain: list[list[Completion]], tmp_path: Path) -> None:
  journal = tmp_path / "journal.jsonl"
  fake.trouble = lambda number, body: "" if number < 10 else "500"
  with pytest.raises(UserError, match="no vLLM server is left"):
    sample(fake, journal=journal, concurrency=1)
  lines = journal.read_bytes().splitlines(keepends=True)
  assert len(lines) == 11
  journal.write_bytes(b"".join(lines[:9]) + lines[9][:-7])  # killed while it wrote the ninth answer
  fake.trouble, fake.seen = lambda number, body: "", []
  assert sample(fake, journal=journal) == plain
  assert len(fake.seen) == len(PROMPTS) * 3 - 8
  fake.seen.clear()
  assert sample(fake, journal=journal) == plain
  assert not fake.seen


@pytest.mark.full
@pytest.mark.parametrize("change", [{"seed": 4}, {"max_new_tokens": 11}, {"prompts": PROMPTS[1:]}, {"top_p": 0.5}],
                         ids=["seed", "max_new_tokens", "prompts", "top_p"])
def test_a_journal_of_other_samples_is_started_over(fake: FakeVllm, tmp_path: Path, change: dict) -> None:
  journal = tmp_path / "journal.jsonl"
  few = {"prompts": PROMPTS[:2], **change}
  sample(fake, prompts=PROMPTS[:2], journal=journal)
  fake.seen.clear()
  sample(fake, **few, journal=journal)
  assert len(fake.seen) == 3 * len(few["prompts"])
  assert len(journal.read_text().splitlines()) == 1 + len(fake.seen)


def test_stop_string_cuts_text_and_tokens(fake: FakeVllm) -> None:
  """It cuts the text, and its tokens count."""
  tokens = TOKENIZER("18-8=10. The answer is 10.")["input_ids"]
  fake.draw = lambda prompt, seed, temperature, most: tokens[:most]
  (row,) = sample(fake, prompts=PROMPTS[:1], num_samples=1, max_new_tokens=len(tokens), stop=(" answer",))
  count = next(n for n in range(len(tokens)) if " answer" in TOKENIZER.decode(tokens[:n]))
  assert row == [Completion("18-8=10. The", count, "stop")]


@pytest.mark.full
def test_unknown_ids_are_drawn_again(fake: FakeVllm, tmp_path: Path) -> None:
  _, params = hf.load(TINY, dtype=jnp.float32)
  weight = np.asarray(params["embed_tokens"]["weight"])
  hf.save({**params, "embed_tokens": {"weight": np.concatenate([weight, 0 * weight[:32]])}}, tmp_path / "padded")
  checkpoint_folder.copy_side_files(TINY, tmp_path / "padded")
  config = {**json.loads((TINY / "config.json").read_text()), "vocab_size": 600, "dtype": "float32"}
  (tmp_path / "padded" / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match="a model of another shape"):
    sample(fake, folder=tmp_path / "padded")
  assert "/pause" not in fake.steps
  fake.folder = str(tmp_path / "padded")
  fake.draw = lambda prompt, seed, temperature, most: [5, 6 if "logit_bias" in fake.seen[-1] else 580, END]
  rows = sample(fake, folder=tmp_path / "padded", concurrency=1)
  assert {c.text for row in rows for c in row} == {TOKENIZER.decode([5, 6])}
  biased = [body for body in fake.seen if "logit_bias" in body]
  assert len(biased) == len(fake.seen) // 2
  assert {int(i) for i in biased[0]["logit_bias"]} >= set(range(568, 600))


@pytest.mark.parametrize("options", [{"urls": []}, {"python": "python"}, {"compute_dtype": "int8"}], ids=str)
def test_wrong_arguments_are_refused(options: dict) -> None:
  with pytest.raises(ValueError, match="expected"):
    VllmSampler(TINY, **{"urls": ["http://host"], **options})


def test_full_disk_is_one_line(fake: FakeVllm, plain: list[list[Completion]], tmp_path: Path) -> None:
  """The journal resumes."""
  path = tmp_path / "journal.jsonl"
  sample(fake, journal=path)
  size = path.stat().st_size
  path.unlink()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
  try:
    with pytest.raises(UserError, match=r"journal.jsonl: cannot be written \("):
      sample(fake, journal=path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, old)
  fake.seen.clear()
  assert sample(fake, journal=path) == plain
  assert 0 < len(fake.seen) < len(PROMPTS) * 3


def test_no_prompts_give_no_completions(fake: FakeVllm) -> None:
  assert sample(fake, prompts=[]) == []
  assert not fake.seen


def test_a_complete_journal_starts_no_server(fake: FakeVllm, tmp_path: Path) -> None:
  journal = tmp_path / "journal.jsonl"
  rows = sample(fake, journal=journal)
  with VllmSampler(TINY, python="/no/such/python", compute_dtype="float32", start=False) as sampler:
    assert sampler.generate(PROMPTS, **OPTIONS, journal=journal) == rows
    with pytest.raises(UserError, match="/no/such/python: no such program"):
      sampler.generate(PROMPTS, **{**OPTIONS, "seed": 4}, journal=journal)
