"""What an evaluation and a sweep take over from an earlier one, and that it is what a new one would compute."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import pytest

from configs import common, tiny
from imm_jax import files
from imm_jax.runs.run import Checkpoint, Run
from imm_jax.sampling.native import NativeSampler
from imm_jax.scoring import Scorer
from imm_jax.stages import evaluate, merge, result_cache
from tests import TINY
from tests.merge_folders import write


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
  """The labels of what is sampled and scored."""
  labels: list[str] = []

  def count(counted: type, name: str) -> None:
    own = getattr(counted, name)

    def call(*args: Any, **options: Any) -> Any:
      labels.append(options["label"])
      return own(*args, **options)

    monkeypatch.setattr(counted, name, call)

  count(NativeSampler, "generate")
  count(Scorer, "score")
  return labels


@pytest.fixture
def measure(tmp_path: Path, computed: list[str]) -> Callable[..., list[str]]:
  """Evaluates in a run directory as a run does; returns what was computed, and checks against a fresh evaluation."""
  (tmp_path / "prose.txt").write_text("Tom has 3 apples.\n\n" * 9)
  fresh = iter(range(99))

  def run(root: Path, settings: ml_collections.ConfigDict, model: Path) -> dict[str, Any]:
    stage = evaluate.build_stage(Run(settings, root, Checkpoint(model, "base")), Checkpoint(model, "base"), "eval", 0)
    with files.write_atomically(root / "eval") as out:
      facts = stage.make(out, {})
    files.remove(Path(stage.scratch))
    return facts

  def evaluate_changed(model: Path = TINY, **changes: Any) -> list[str]:
    settings = tiny.get_config()
    settings.task.ood, settings.task.eval_questions, settings.eval.max_new_tokens = ("groups",), 3, 12
    settings.update_from_flattened_dict(changes)
    computed.clear()
    facts, new = run(tmp_path / "run", settings, model), computed.copy()
    other = tmp_path / f"fresh_{next(fresh)}"
    other.mkdir()
    assert json.dumps(facts) == json.dumps(run(other, settings, model))
    assert {p.name: p.read_bytes() for p in (tmp_path / "run/eval").iterdir()} == {
        p.name: p.read_bytes() for p in (other / "eval").iterdir()}
    return [label.removeprefix("eval: ") for label in new]

  (tmp_path / "run").mkdir()
  return evaluate_changed


@pytest.mark.full
def test_only_new_tasks_are_answered(measure: Callable[..., list[str]], tmp_path: Path) -> None:
  """Tasks are added, dropped, and asked again."""
  text = {"eval.texts": (f"prose=file:{tmp_path / 'prose.txt'}",)}
  assert measure() == ["stories", "groups"]
  assert measure() == []
  assert measure(**{"task.ood": ("groups", "price")}, **text) == ["price", "prose"]
  assert measure(**{"task.ood": ("price",)}) == []
  assert not (tmp_path / "run/eval/groups.jsonl").exists()
  assert measure(**{"task.ood": ("groups", "compare")}, **text) == ["compare"]
  assert measure(**{"eval.max_new_tokens": 11}) == ["stories", "groups"]
  assert measure() == []


@pytest.mark.full
def test_only_new_samples_are_drawn(measure: Callable[..., list[str]], tmp_path: Path) -> None:
  """pass@k is arithmetic on the samples, which the seed and the temperature determine."""
  samples, two = ["stories, samples", "groups, samples"], {"eval.num_samples": 2}
  assert measure() == ["stories", "groups"]
  assert measure(**two) == samples
  assert measure(**two, **{"eval.pass_at_k": (1,)}) == []
  assert measure(seed=1) == []
  assert not (tmp_path / "run/eval/groups_samples.jsonl").exists()
  assert measure(**two) == []
  assert measure(**two, seed=1) == samples
  assert measure(**two, **{"eval.temperature": 0.9}) == samples
  assert measure(**two) == []


def test_other_weights_are_evaluated_anew(measure: Callable[..., list[str]], tmp_path: Path) -> None:
  other = tmp_path / "model"
  other.mkdir()
  for path in TINY.iterdir():
    (other / path.name).write_bytes(path.read_bytes())
  assert measure() == ["stories", "groups"]
  assert measure(other) == []
  content = bytearray((other / "model.safetensors").read_bytes())
  content[-1] ^= 1
  (other / "model.safetensors").write_bytes(content)
  assert measure(other) == ["stories", "groups"]
  assert measure() == []  # those of the model before are still there


def test_damaged_answers_are_not_taken_over(measure: Callable[..., list[str]], tmp_path: Path) -> None:
  measure()
  stories, keys = (tmp_path / "run/eval" / name for name in ("stories.jsonl", result_cache.KEYS))
  stories.write_bytes(stories.read_bytes().replace(b"true", b"fals", 1).replace(b"false", b"true ", 1))
  assert measure() == ["stories"]
  keys.write_text(keys.read_text().replace('"facts": {}', '"facts": {"scores": 1}', 1))
  assert len(measure()) == 1
  keys.write_text("{")
  assert measure() == ["stories", "groups"]
  keys.unlink()  # as in runs of versions that recorded no keys
  assert measure() == ["stories", "groups"]


def test_only_new_weights_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """A sweep is extended, taken back, and its inputs change."""
  rng = np.random.default_rng(0)
  models = merge.MergeInputs(*(write(tmp_path / name, {"model.norm.weight": rng.normal(size=64).astype(np.float32)})
                               for name in ("base", "start")), [tmp_path / "tuned"], None)
  write(models.tuned[0], {"model.norm.weight": rng.normal(size=64).astype(np.float32)})
  merged: list[list[str]] = []
  own = merge._merge
  monkeypatch.setattr(merge, "_merge", lambda s, m, seeds, outs: (
      merged.append([out.name for _, out in outs]), own(s, m, seeds, outs)))

  def sweep(root: Path, weights: tuple[float, ...], inputs: dict[str, str]) -> dict[str, bytes]:
    config = common.get_config()
    config.merge.sweep = weights
    with files.write_atomically(root / "sweep") as out:
      merge.sweep(config, models, 0, root / "sweep", inputs, out)
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}

  for number, (weights, inputs, new) in enumerate((
      ((0.2, 0.8), {"tuned": "a"}, [["0.2", "0.8"]]), ((0.2, 0.5, 0.8), {"tuned": "a"}, [["0.5"]]),
      ((0.8,), {"tuned": "a"}, []), ((0.8,), {"tuned": "b"}, [["0.8"]]))):
    merged.clear()
    found, calls = sweep(tmp_path / "run", weights, inputs), merged.copy()
    assert calls == new
    assert found == sweep(tmp_path / f"fresh_{number}", weights, inputs)
  weights_file = next((tmp_path / "run/sweep/0.8").glob("*.safetensors"))
  content = weights_file.read_bytes()
  weights_file.unlink()
  weights_file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  merged.clear()
  sweep(tmp_path / "run", (0.8,), {"tuned": "b"})
  assert merged == [["0.8"]]
  assert weights_file.read_bytes() == content


def test_sweeps_are_copied_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Some file systems have none."""
  def refuse(*_: object) -> None:
    raise PermissionError("no links")

  monkeypatch.setattr(os, "link", refuse)
  former = tmp_path / "former/0.5"
  former.mkdir(parents=True)
  (former / "weights").write_bytes(b"w")
  result_cache.record(former.parent, {"0.5": "key"}, {})
  assert not result_cache.take_folder(former, tmp_path / "other", "another key")
  assert result_cache.take_folder(former, tmp_path / "out", "key")
  assert (tmp_path / "out/weights").read_bytes() == b"w"
