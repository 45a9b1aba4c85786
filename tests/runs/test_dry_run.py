"""What --dry_run prints, and that it reads nothing from the hub."""

import json
from pathlib import Path

import pytest

from configs import tiny
from imm_jax import config_checks, loop, tasks
from imm_jax.runs import record
from imm_jax.runs.run import Checkpoint, Run
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
