"""What makes each method another one, seen in whole runs of the embedded model."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs import tiny
from imm_jax.analysis.weight_change import spearman
from imm_jax.errors import UserError
from imm_jax.stages import analyze
from tests import TINY
from tests.runs.helpers import start, weights


@pytest.fixture(scope="module")
def run(environment, tmp_path_factory):
  """A run with these overrides; the same ones run once."""
  done: dict[tuple[str, ...], Path] = {}

  def of(*overrides: str) -> Path:
    if overrides not in done:
      workdir = tmp_path_factory.mktemp("runs") / "run"
      ended = start(workdir, environment, "--config.task.eval_questions=4", *overrides)
      assert ended.returncode == 0, ended.stderr
      done[overrides] = workdir
    return done[overrides]

  return of


def facts(workdir: Path, stage: str) -> dict:
  return json.loads((workdir / "run.json").read_text())["stages"][stage]["facts"]


@pytest.mark.slow
def test_imm_without_base_or_drops_is_star(run):
  """IMM that gives the base no weight and drops nothing."""
  imm, star = run("--config.merge.base_weight=0", "--config.merge.drop_rate=0"), run("--config.method=star")
  for t in (0, 1):
    tuned = (star / f"round_{t}/sft/model.safetensors").read_bytes()
    assert (imm / f"round_{t}/sft/model.safetensors").read_bytes() == tuned
    assert (imm / f"round_{t}/merged/model.safetensors").read_bytes() == tuned
    assert (imm / f"round_{t}/samples.jsonl").read_bytes() == (star / f"round_{t}/samples.jsonl").read_bytes()


@pytest.mark.full
def test_iimm_scales_each_layer_by_its_importance(run):
  workdir = run("--config.rounds=1", "--config.method=iimm", "--config.merge.base_weight=0.5",
                "--config.merge.drop_rate=0", "--config.analysis.drift=2")
  importance = json.loads((workdir / "round_0/importance.json").read_text())
  layers = np.array(importance["layers"])
  np.testing.assert_allclose(sum(np.array(v) for v in importance["modules"].values()), layers)
  shares = len(layers) * layers / layers.sum()
  base, tuned, merged = (weights(f) for f in (TINY, workdir / "round_0/sft", workdir / "round_0/merged"))
  for name in base:
    share = shares[int(name.split(".")[2])] if ".layers." in name else 1.0
    wanted = base[name] + 0.5 * share * (tuned[name] - base[name])
    np.testing.assert_allclose(merged[name], wanted, rtol=2**-8, atol=1e-6)


@pytest.mark.full
def test_the_analysis_of_a_round(run, tmp_path):
  """Of what the run left behind, and once more with importance and entropy measured."""
  workdir = run("--config.rounds=1", "--config.method=iimm", "--config.merge.base_weight=0.5",
                "--config.merge.drop_rate=0", "--config.analysis.drift=2")
  read = lambda name: json.loads((workdir / name).read_text())
  found = read("round_0/analysis.json")
  assert found["importance"] == read("round_0/importance.json")
  base, tuned, merged = (weights(f) for f in (TINY, workdir / "round_0/sft", workdir / "round_0/merged"))
  for of, model in (("sft", tuned), ("merged", merged)):
    for module, layers in found["weight_change"][of]["modules"].items():
      wanted = [np.linalg.norm(model[name] - base[name]) for name in sorted(base) if f".{module}.weight" in name]
      np.testing.assert_allclose(layers, wanted, rtol=1e-12)
    change = found["weight_change"][of]
    np.testing.assert_allclose(np.array(change["layers"]) / sum(change["layers"]), change["share"])
  assert found["spearman"] == spearman(found["importance"]["layers"], found["weight_change"]["sft"]["layers"])
  assert (found["diversity"]["questions"], found["diversity"]["samples"]) == (24, 72)
  assert found["diversity"]["token_entropy"] is None
  assert facts(workdir, "round_0/analysis.json").keys() == {"spearman", "distinct_answers"}
  drift = read("round_0/drift.json")
  assert {task: of["examples"] for task, of in drift["texts"].items()} == {"stories": 2, "groups": 2}
  in_domain = {kind: of["stories"]["kl"] for kind, of in drift["models"].items()}
  assert facts(workdir, "round_0/drift.json")["kl"] == in_domain
  assert 0 < in_domain["merged"] < in_domain["sft"] < 1

  config = tiny.get_config()
  config.analysis.examples = 6
  here = shutil.copytree(workdir / "round_0", tmp_path / "round_0")
  (here / "importance.json").unlink()
  round_ = analyze.Round(0, here, TINY, TINY, TINY, True)
  said = analyze.analyze_round(config, round_, tmp_path / "analysis.json")
  again = json.loads((tmp_path / "analysis.json").read_text())
  assert again["weight_change"] == found["weight_change"]
  assert (again["importance"]["examples"], again["importance"]["order"]) == (6, 1)
  assert 0.3 < sum(again["importance"]["layers"]) / sum(found["importance"]["layers"]) < 3
  assert 0.01 < again["diversity"]["token_entropy"] < 1
  assert said["token_entropy"] == pytest.approx(again["diversity"]["token_entropy"], abs=1e-6)
  assert analyze.analyze_round(config, round_, tmp_path / "third.json") == said

  (here / "train.jsonl").write_text("{}\n")
  with pytest.raises(UserError, match=r"train\.jsonl:1: 'question' is missing"):
    analyze.analyze_round(config, round_, tmp_path / "fourth.json")


@pytest.mark.slow
def test_interventions_hold_back_what_they_say(run):
  """Decay: the first layers move less; masking: a share of each matrix alone. (Clipping: test_interventions.)"""
  decay, masking = (run("--config.rounds=1", "--config.method=star", *more) for more in (
      ("--config.sft.intervention=gradient_decay", "--config.sft.gradient_decay=0.5"),
      ("--config.sft.intervention=weight_masking", "--config.sft.top_share=0.25")))
  base = weights(TINY)
  decayed, masked, moved = ({name: value - base[name] for name, value in weights(w / "round_0/sft").items()}
                            for w in (decay, masking, run("--config.method=star")))
  size = lambda change, layer: sum(np.abs(v).sum() for n, v in change.items() if f".layers.{layer}." in n)
  for layer in range(4):
    assert size(decayed, layer) / size(moved, layer) == pytest.approx(0.5 ** (3 - layer), rel=0.35)
  matrices = [name for name, value in base.items() if value.ndim == 2]
  assert max((masked[name] != 0).mean() for name in matrices) <= 0.251
  assert np.mean([(moved[name] != 0).mean() for name in matrices]) > 0.4


@pytest.mark.slow
def test_accumulation_starts_in_round_two(run):
  """It differs from star from the second round on."""
  star, both = run("--config.method=star"), run("--config.method=data_accumulation")
  assert (both / "round_0/sft/model.safetensors").read_bytes() == (star / "round_0/sft/model.safetensors").read_bytes()
  assert facts(both, "round_1/train.jsonl")["of_earlier_rounds"] == facts(both, "round_0/train.jsonl")["kept"]
  assert (both / "round_1/sft/model.safetensors").read_bytes() != (star / "round_1/sft/model.safetensors").read_bytes()


@pytest.mark.slow
def test_teacher_samples_and_student_trains(run):
  """They do so in every round."""
  star = run("--config.method=star")
  taught = run("--config.rounds=1", "--config.method=star", f"--config.teacher={star / 'round_1/sft'}")
  assert (taught / "round_0/samples.jsonl").read_bytes() != (star / "round_0/samples.jsonl").read_bytes()
  record = json.loads((taught / "run.json").read_text())["stages"]
  assert record["round_0/samples.jsonl"]["inputs"].keys() == {"teacher", "settings", "train questions"}
  assert record["round_0/sft"]["inputs"].keys() == {"base", "round_0/train.jsonl", "settings"}
  assert (taught / "round_0/sft/model.safetensors").read_bytes() != (TINY / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_auto_base_weight(run):
  """The base weight that is chosen is the best of those tried, and is used."""
  workdir = run("--config.rounds=1", "--config.merge.base_weight=auto", "--config.merge.auto.questions=12",
                "--config.merge.auto.weights=(0.25, 1.0)", "--config.merge.auto.groups=2",
                "--config.merge.auto.general=('compare',)", "--config.merge.drop_rate=0",
                "--config.merge.sweep=(0.25,)", "--config.eval.num_samples=3", "--config.eval.pass_at_k=(1,3,5)",
                "--config.prompt.few_shot=2")
  choice = json.loads((workdir / "round_0/base_weight.json").read_text())
  assert [t["base_weight"] for t in choice["tried"][:2]] == [0.25, 1.0]
  for tried in choice["tried"]:
    assert tried["score"] == pytest.approx((tried["in_domain"]["value"] + tried["general"]["value"]) / 2)
    assert tried["in_domain"]["n"] == tried["general"]["n"] == 12
  assert choice["score"] == max(t["score"] for t in choice["tried"])
  assert not (workdir / "round_0/trial").exists()
  base, tuned = weights(TINY), weights(workdir / "round_0/sft")
  for folder, chosen in (("merged", choice["base_weight"]), ("sweep/0.25", 0.25)):
    merged = weights(workdir / "round_0" / folder)
    for name in base:
      by_layer = chosen if isinstance(chosen, dict) else {".*": chosen}
      weight = next(w for pattern, w in by_layer.items() if re.search(pattern, name))
      np.testing.assert_allclose(merged[name], weight * base[name] + (1 - weight) * tuned[name], rtol=2**-7, atol=1e-6)
  scores = facts(workdir, "round_0/eval/sweep_0.25")["scores"]["stories"]
  assert scores.keys() == {"greedy", "pass@1", "pass@3", "majority@3"}
  lines = (workdir / "round_0/eval/merged/stories_samples.jsonl").read_text().splitlines()
  samples = [json.loads(line) for line in lines]
  assert [s["sample"] for s in samples] == [0, 1, 2] * 4
  shots = {json.loads(line)["question"] for line in (workdir / "few_shot.jsonl").read_text().splitlines()}
  asked = {json.loads(line)["question"] for line in (workdir / "round_0/samples.jsonl").read_text().splitlines()}
  assert len(shots) == 2
  assert not shots & asked
