"""The settings that each stage of a run counts among its inputs."""

import json
from pathlib import Path

import pytest

from configs import tiny
from imm_jax import loop
from imm_jax.estimates import cost
from imm_jax.methods import ANCHORS, METHODS
from imm_jax.runs.run import Checkpoint, Run
from imm_jax.training.additions import Additions, get_additions


def _settings(**changes: object) -> list[dict[str, object]]:
  """Of the stages that sample and train, in two rounds, as they are compared."""
  config = tiny.get_config()
  config.rounds = 2
  config.update_from_flattened_dict(changes)
  value = Run(config, Path("run"), Checkpoint(Path("base"), "base"))
  found = [stage for stage in loop.plan(value) if stage.name.endswith(("samples.jsonl", "/sft"))]
  assert [stage.name for stage in found if "eval" not in stage.name] == [
      f"round_{t}/{name}" for t in range(2) for name in ("samples.jsonl", "sft")]
  return [json.loads(json.dumps(stage.settings)) for stage in found if "eval" not in stage.name]


def test_unused_settings_do_not_count():
  """Which keeps runs that were made before there was such a key."""
  star = _settings(method="star")
  assert star == _settings(**{"method": "star", "sft.lora_rank": 3, "sft.kl_weight": 9.0, "sft.ema_decay": 0.5})
  for method, key, value in (("kl", "kl_weight", 9.0), ("l2_sp", "l2_sp_weight", 9.0), ("lora", "lora_rank", 3),
                             ("ema", "ema_decay", 0.5), ("star", "stop_share", 0.5), ("star", "ema", True)):
    plain, changed = _settings(method=method), _settings(**{"method": method, f"sft.{key}": value})
    assert [a == b for a, b in zip(plain, changed, strict=True)] == [True, False, True, False], key
  trained = [_settings(method=method)[1] for method in ("star", "kl", "l2_sp", "lora", "ema")]
  assert all(a != b for i, a in enumerate(trained) for b in trained[:i])


def test_a_rounds_temperatures_are_its_own():
  of = lambda *given: _settings(**{"sample.temperatures": given})
  plain = of(0.2, 0.4)
  changed = of((0.2, 0.4), (0.9,))
  assert [a == b for a, b in zip(plain, changed, strict=True)] == [True, True, False, True]
  assert plain == of((0.2, 0.4))  # the last stands for later rounds
  assert changed[2]["sample"]["temperatures"] == [0.9]


@pytest.mark.parametrize("method", METHODS)
def test_the_method_decides_what_anchors_sft(method: str):
  config = tiny.get_config()
  config.update_from_flattened_dict({"method": method, "sft.l2_sp_weight": 0.25, "sft.kl_weight": 0.5})
  additions = get_additions(config)
  assert (additions.l2_sp, additions.kl) == {"l2_sp": (0.25, 0.0), "kl": (0.0, 0.5)}.get(method, (0.0, 0.0))
  assert additions.anchored == bool(METHODS[method].anchor)
  assert {*ANCHORS} <= {*Additions._fields}


def test_only_the_kl_costs_a_pass_of_the_base():
  def count(method: str) -> float:
    config = tiny.get_config()
    config.update_from_flattened_dict({"method": method, "analysis.examples": 0})
    return cost.count_tokens(config, {"stages": {}}).trained

  assert count("kl") == pytest.approx(count("star") * 4 / 3)
  assert count("l2_sp") == count("star") == count("imm")
  assert count("iimm") == pytest.approx(count("imm") * 4 / 3)  # importance takes one pass more than the three epochs


@pytest.mark.parametrize(("method", "stage", "folder"), [
    ("imm", "round_0/merged", "round_0/merged"), ("star", "round_0/sft", "round_0/sft"),
    ("wise_ft", "round_0/sft", "round_0/sft"), ("ema", "round_0/sft", "round_0/sft/ema")])
def test_what_a_round_hands_on(method: str, stage: str, folder: str):
  config = tiny.get_config()
  config.method = method
  run = Run(config, Path("run"), Checkpoint(Path("base"), "base"))
  assert run.get_next_start(0) == (Path("run", folder), stage)
  assert {s.name: s for s in loop.plan(run)}["round_1/samples.jsonl"].needs[0] == stage
