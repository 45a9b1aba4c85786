"""Runs that sample with vLLM: on remote servers, and on a local server that each stage starts."""

import json
from pathlib import Path

import ml_collections
import pytest

from configs import tiny
from imm_jax import loop
from imm_jax.model import hub
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.stages.round_questions import load_round
from imm_jax.stages.task_entries import get_tasks
from tests.fake_vllm import END, FakeVllm

TOKENIZER = load_tokenizer(hub.resolve("tiny"))


@pytest.fixture
def config() -> ml_collections.ConfigDict:
  result = tiny.get_config()
  result.update({"rounds": 2, "sampler": {"kind": "vllm", "vllm": {"concurrency": 4}}})
  result.task.update({"questions_per_round": 12, "eval_questions": 4, "ood": ("groups",)})
  result.sft.update({"epochs": 2, "global_batch": 4})
  result.analysis.update({"examples": 0, "drift": 0})
  return result


def _rows(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def _knows(config: ml_collections.ConfigDict, fake: FakeVllm) -> None:
  """Makes a server give the worked answer to each question of the run."""
  asked = [e for t in range(config.rounds) for e in load_round(get_tasks(config), t).round_questions]
  answers = {e.question: e.rationale
             for e in [*asked, *(e for es in get_tasks(config).load_tests().values() for e in es)]}

  def draw(prompt: list[int], seed: int, temperature: float, most: int) -> list[int]:
    text = TOKENIZER.decode(prompt)
    answer, = (a for question, a in answers.items() if question in text)
    tokens = TOKENIZER(answer)["input_ids"]
    assert len(tokens) < most
    return [*tokens, END]

  fake.draw = draw


@pytest.mark.full
def test_run_survives_a_dead_remote_server(
    config: ml_collections.ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
  """The other servers go on."""
  first, other = FakeVllm(hub.resolve("tiny")), FakeVllm(hub.resolve("tiny"))
  with first, other:
    for fake in (first, other):
      _knows(config, fake)
    in_round_0 = []

    def dies(number: int, body: dict) -> str:
      in_round_0.extend([number] if body["temperature"] else [])
      if len(in_round_0) == 6:
        first.kill()
        return "drop"
      return ""

    first.trouble = dies
    config.sampler.vllm.urls = (first.url, other.url)
    root = tmp_path / "run"
    loop.run(config, str(root))
  assert not [*root.rglob("*.sampling")]
  assert "is taken out" in capsys.readouterr().err
  for t in range(2):
    rows = _rows(root / f"round_{t}/samples.jsonl")
    asked = load_round(get_tasks(config), t).round_questions
    assert sorted((r["id"], r["sample"]) for r in rows) == sorted((e.id, s) for e in asked for s in range(3))
    rationales = {e.id: e.rationale for e in asked}
    assert all(r["text"].strip() == rationales[r["id"]].strip() and r["correct"] for r in rows)
    assert [r["temperature"] for r in rows[:3]] == [0.2, 0.4, 0.6]
    assert all(r["correct"] for kind in ("sft", "merged") for r in _rows(root / f"round_{t}/eval/{kind}/groups.jsonl"))
  # Each stage that samples starts with a reload of its model's folder.
  assert first.steps.count("/collective_rpc") == 2  # base/eval, samples
  assert other.steps.count("/collective_rpc") == 7
  assert other.folder == str(root / "round_1/merged")
  # Settings of vLLM may change within a run, but not the engine.
  config.sampler.vllm.concurrency = 9
  loop.run(config, str(root))
  assert "0 of 15 stages were run" in capsys.readouterr().out


@pytest.mark.slow
def test_local_servers_equal_the_native_run(
    config: ml_collections.ConfigDict, python: str, tmp_path: Path) -> None:
  config.update({"method": "real", "rounds": 1})
  config.sampler.vllm.update({"python": python, "args": ("--fake", "greedy")})
  loop.run(config, str(tmp_path / "vllm"))
  config.sampler.vllm.update({"python": "", "args": ()})
  config.sampler.kind = "native"
  loop.run(config, str(tmp_path / "native"))
  for name in ("base/eval", "round_0/eval/sft"):
    for task in ("stories", "groups"):
      rows = [_rows(tmp_path / kind / name / f"{task}.jsonl") for kind in ("vllm", "native")]
      assert rows[0] == rows[1]
  weights = [(tmp_path / kind / "round_0/sft/model.safetensors").read_bytes() for kind in ("vllm", "native")]
  assert weights[0] == weights[1]
