"""Where metrics go."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs import tiny
from imm_jax.errors import UserError
from imm_jax.runs import metrics
from imm_jax.runs.metrics import StageMetrics


class Wandb:
  """In place of the module: what it was told, and the runs that it was asked for."""

  def __init__(self, monkeypatch: pytest.MonkeyPatch):
    self.inits: list[dict[str, Any]] = []
    self.calls: list[tuple[str, Any]] = []
    self.refuses = ""
    monkeypatch.setitem(sys.modules, "wandb", self)
    self.Settings = lambda **given: given

  def init(self, **given: Any) -> SimpleNamespace:
    if self.refuses:
      raise RuntimeError(f"{self.refuses}\nmore")
    self.inits.append(given)
    record = lambda name: lambda *args, **more: self.calls.append((name, *args, *more.items()))
    return SimpleNamespace(url="https://wandb.example/1", log=record("log"), finish=record("finish"),
                           define_metric=record("define"))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
  monkeypatch.delenv("WANDB_PROJECT", raising=False)
  return Wandb(monkeypatch)


def _steps(root: Path) -> list[tuple[str, int, float]]:
  rows = map(json.loads, (root / "metrics.jsonl").read_text().splitlines())
  return [(row["stage"], row["step"], row["loss"]) for row in rows]


def test_a_stage_that_goes_on_has_every_step_once(wandb: Wandb, tmp_path: Path):
  for stage in ("a", "b"):
    with StageMetrics(tmp_path, stage) as log:
      for step in range(3):
        log.write(step, loss=float(step))
  with StageMetrics(tmp_path, "a", from_step=2) as log:
    log.write(2, loss=9.0)
  assert _steps(tmp_path) == [*(("a", i, i) for i in range(2)), *(("b", i, i) for i in range(3)), ("a", 2, 9)]
  assert not wandb.inits


def test_all_starts_of_a_run_are_one_run_of_wandb(wandb: Wandb, tmp_path: Path, capsys: pytest.CaptureFixture):
  config = tiny.get_config()
  config.tracking = "wandb"
  metrics.check_tracking(config)
  root = tmp_path / "tiny"
  root.mkdir()
  for _ in range(2):
    metrics.start_tracking(config, root)
    assert "https://wandb.example/1" in capsys.readouterr().err
    with StageMetrics(root, "round_0/sft", tracking="wandb") as log:
      log.write(7, loss=0.5)
  assert len(wandb.inits) == 4
  assert {(given["id"], given["name"], given["project"], given["resume"], given["dir"]) for given in wandb.inits} == {
      (json.loads((root / "wandb.json").read_text())["id"], "tiny", "imm_jax", "allow", str(root))}
  assert wandb.inits[0]["config"]["merge"]["base_weight"] == 0.4
  stage = [("define", "round_0/sft/*", ("step_metric", "round_0/sft/step")),
           ("log", {"round_0/sft/step": 7, "round_0/sft/loss": 0.5}), ("finish",)]
  assert wandb.calls == [("finish",), *stage] * 2
  assert _steps(root) == [("round_0/sft", 7, 0.5)]


def test_wandb_is_needed_at_the_start_alone(wandb: Wandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture):
  """Without it or a login nothing begins, and later a run goes on."""
  config = tiny.get_config()
  config.tracking = "wandb"
  wandb.refuses = "no API key"
  with pytest.raises(UserError, match=r"Weights & Biases refuses \(no API key\); run `wandb login`"):
    metrics.start_tracking(config, tmp_path)
  with StageMetrics(tmp_path, "a", tracking="wandb") as log:
    log.write(0, loss=1.0)
  assert "warning: a: Weights & Biases does not take these metrics (no API key)" in capsys.readouterr().err
  assert _steps(tmp_path) == [("a", 0, 1)]
  (tmp_path / "wandb.json").write_text('{"id": "a", "name": 3}')
  with pytest.raises(UserError, match=r"wandb\.json: 'name' is missing or no text; put it right"):
    metrics.start_tracking(config, tmp_path)
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match="is not installed; pip install -e"):
    metrics.check_tracking(config)


def test_unclosable_writer_spares_the_others(tmp_path: Path, capsys: pytest.CaptureFixture):
  """A writer that cannot be closed leaves the others closed."""
  closed = []

  class Full:
    def __init__(self, name: str):
      self.name = name

    def close(self) -> None:
      closed.append(self.name)
      raise OSError(f"{self.name} is full")

  def fail(block: type[Exception] | None) -> None:
    with StageMetrics(tmp_path, "a") as log:
      log._writers += [Full("b"), Full("c")]
      if block:
        raise block

  with pytest.raises(OSError, match="b is full"):
    fail(None)
  with pytest.raises(ZeroDivisionError):
    fail(ZeroDivisionError)
  assert closed == ["b", "c"] * 2
  assert "warning: metrics were not written to the end (c is full)" in capsys.readouterr().err
