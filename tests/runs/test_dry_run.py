"""What --dry_run prints, and that it reads nothing from the hub."""

import json
from pathlib import Path

import ml_collections
import pytest

from configs import paper, qwen, tiny
from imm_jax import config_checks, loop, tasks
from imm_jax.runs import record
from imm_jax.runs.run import Checkpoint, Run
from imm_jax.runs.rundir import RunDir
from imm_jax.stages.round_questions import compute_digests
from imm_jax.stages.task_entries import get_tasks


@pytest.mark.full
def test_a_dry_run_reads_no_text_of_the_hub(monkeypatch, tmp_path, capsys):
  def load_text(*_, **__):
    raise AssertionError("read")

  monkeypatch.setattr(tasks, "load_text", load_text)
  config = tiny.get_config()
  for texts in (("tiny_shakespeare",), ("prose=hf:SOME/prose",)):
    config.eval.texts = texts
    config_checks.validate(config, downloads=False)
    loop.dry_run(config, str(tmp_path / "run"))
    assert f"{texts[0].partition('=')[0]} up to 200 passages" in capsys.readouterr().out


def test_dry_run_trusts_hub_models(tmp_path, capsys):
  """It takes a model of the hub as unchanged."""
  config, root = tiny.get_config(), tmp_path / "run"
  config.model = "HuggingFaceTB/SmolLM2-135M"
  stage = loop.plan(Run(config, root, Checkpoint(Path(config.model), "base")))[0]
  inputs = record.collect_inputs(stage, {"stages": {}}, {"base": "digest", **compute_digests(get_tasks(config))})
  (root / stage.name).mkdir(parents=True)
  for name, content in {"config": config.to_dict(), "run": {"stages": {stage.name: {
      "inputs": inputs, "output": "digest", "bytes": 0, "facts": {}}}}}.items():
    (root / f"{name}.json").write_text(json.dumps(content))
  loop.dry_run(config, str(root))
  assert f"\n{stage.name:<24}done" in capsys.readouterr().out


def _plans(config: ml_collections.ConfigDict) -> dict[str, str]:
  teacher = Checkpoint(Path(config.teacher), "teacher") if config.teacher else None
  return {stage.name: stage.plan for stage in loop.plan(
      Run(config, Path("run"), Checkpoint(Path(config.model), "base"), teacher))}


@pytest.mark.parametrize(("changes", "added"), [
    ({}, ""), ({"grad_clip": 0.0}, ", gradients not clipped"), ({"grad_clip": 0.5}, ", gradients clipped at 0.5"),
    ({"intervention": "gradient_decay"}, ", gradient_decay 0.9"),
    ({"intervention": "gradient_clipping", "grad_clip": 0.0}, ", gradient_clipping 2"),
    ({"intervention": "weight_masking", "top_share": 0.25}, ", weight_masking 0.25")])
def test_plan_names_what_changes_sft(changes: dict, added: str):
  config = tiny.get_config()
  config.sft.update(changes)
  assert _plans(config)["round_0/sft"] == f"3 epochs, 20 answers a step{added}"


def test_runs_of_a_table_read_differently():
  """Interventions, clipping and methods can be told apart in the plans of table 5."""
  runs = [config for name, config in paper.get_config("table=5").runs.items() if name.endswith("gsm8k")]
  assert len({json.dumps(_plans(config)) for config in runs}) == len(runs) == 6


@pytest.mark.parametrize(("task", "questions"), [("gsm8k", 7473 - 8), ("math", 7495 - 8)])
def test_paper_scale_prints_the_questions_of_a_round(task: str, questions: int):
  """Of the published train splits (MATH without five answers that cannot be judged), less the 8 worked examples."""
  config = qwen.get_config(f"1.5b,task={task}")
  config.teacher = qwen.MODELS["7b"]
  each = {"gsm8k": 3, "math": 6}[task]
  assert _plans(config)["round_0/samples.jsonl"].startswith(
      f"all {questions} questions x {each} = {questions * each} answers by Qwen/Qwen2.5-7B-Instruct, up to ")


def test_unknown_sizes_are_not_guessed():
  config = tiny.get_config()
  config.update_from_flattened_dict({"task.name": "custom", "task.source": "hf:SOME/questions",
                                     "task.questions_per_round": 0})
  assert _plans(config)["round_0/samples.jsonl"] == "3 answers to every train question"


def test_files_of_questions_are_counted(tmp_path: Path):
  config = tiny.get_config()
  for split, numbers in (("train", range(11)), ("test", range(11, 14))):
    rows = [{"question": f"1 + {i}?", "answer": str(i + 1)} for i in numbers]
    (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  config.update_from_flattened_dict({
      "task.name": "custom", "task.source": f"file:{tmp_path}", "task.fields.question": "question",
      "task.fields.answer": "answer", "task.questions_per_round": 0})
  assert _plans(config)["round_0/samples.jsonl"].startswith("all 11 questions x 3 = 33 answers, up to")


def test_only_what_the_bits_depend_on_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture):
  facts = {"versions": {"jax": "1"}, "devices": ["cpu"], "method": "imm", "tasks": {"id": "stories", "ood": []}}
  with RunDir(tmp_path / "run", tiny.get_config()) as directory:
    directory.record_facts(**facts)
    directory.record_facts(**facts | {"method": "star", "tasks": {"id": "stories", "ood": ["groups"]}})
    assert capsys.readouterr().err == ""
    directory.record_facts(devices=["gpu"])
    assert "warning: devices was ['cpu'] and is ['gpu'] now" in capsys.readouterr().err
