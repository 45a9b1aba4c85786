"""The report of a run directory of which something is missing or damaged: a page that says what."""

import fcntl
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from imm_jax.report import live, results
from tests.report_runs import change, quick


def drop(*names: str):
  def damage(root: Path) -> None:
    for name in names:
      (shutil.rmtree if (root / name).is_dir() else os.remove)(root / name)
  return damage


def put(name: str, text: str):
  return lambda root: (root / name).write_text(text)


def cut_samples(root: Path) -> None:
  path = root / "round_1/samples.jsonl"
  path.write_bytes(path.read_bytes()[:-40])


def cut_a_line(root: Path) -> None:
  path = root / "round_1/samples.jsonl"
  path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def turn_a_verdict(root: Path) -> None:
  """Leaves the file as long as it was."""
  path = root / "round_0/samples.jsonl"
  path.write_text(path.read_text().replace('"correct": true, "', '"correct": false,"', 1))


@pytest.mark.parametrize(("damage", "said"), [
    (drop("round_0/samples.jsonl"), "round_0/samples.jsonl: missing"),
    (cut_samples, "round_1/samples.jsonl: lines that are no JSON object were left out: 18"),
    (drop("round_1/eval/sft"), "round_1/eval/sft: missing"),
    (drop("base/eval/groups.jsonl"), "base/eval/groups.jsonl: missing"),
    (drop("metrics.jsonl"), "metrics.jsonl: missing"),
    (put("metrics.jsonl", '{"stage": "round_0/sft", "memory_gib": 1}\n{"sta\n[]\n'), "metrics.jsonl: 2 lines"),
    (put("round_0/analysis.json", "{"), "round_0/analysis.json: damaged"),
    (put("round_0/analysis.json", '{"importance": {"layers": "many"}, "spearman": NaN, "diversity": {}}'),
     "round_0/analysis.json: damaged (importance.layers is 'many'); run `imm verify "),
    (put("round_0/drift.json", '{"texts": {"stories": {"tokens": 3, "loss": 1, "entropy": NaN}}, "models": {}}'),
     "round_0/drift.json: damaged"),
    (drop("config.json"), "config.json: missing"),
    (put("config.json", "[1"), "config.json: damaged"),
    (drop("run.json"), "run.json: missing"),
    (put("run.json", '{"stages": {"ba'), "run.json: damaged"),
    (change(lambda r: r.pop("stages")), "run.json: damaged (stages is None)"),
    (change(lambda r: r.update(stages=[])), "run.json: damaged (stages is [])"),
    (change(lambda r: r["stages"].update({"round_0/sft": 3})), "run.json: damaged (stages.round_0/sft is 3)"),
    (change(lambda r: r["stages"]["round_0/eval/sft"]["facts"].update(scores={"stories": 1})),
     "run.json: damaged (stages.round_0/eval/sft.facts.scores.stories is 1)"),
    (change(lambda r: r["stages"]["base/eval"]["facts"]["scores"].pop("stories")),
     "run.json: damaged (stages.base/eval.facts.scores.stories is None)"),
    (change(lambda r: r["stages"]["base/eval"]["facts"]["scores"]["stories"].pop("greedy")),
     "run.json: damaged (stages.base/eval.facts.scores.stories is {"),
    (change(lambda r: r.pop("versions")), "run.json: damaged (versions is None)"),
    (change(lambda r: r.pop("tasks")), "run.json: damaged (KeyError('tasks')"),
    (change(lambda r: r["stages"]["round_0/train.jsonl"]["facts"].update(kept="many")),
     "run.json: damaged (stages.round_0/train.jsonl.facts.kept is 'many')"),
    (change(lambda r: r["stages"]["round_0/sft"].pop("seconds")),
     "run.json: damaged (stages.round_0/sft.seconds is None)"),
    (put("config.json", '{"model": "tiny", "method": "imm", "sft": 3}'), "config.json: damaged (task is None)"),
    (cut_a_line, "round_1/samples.jsonl: has "),
    (turn_a_verdict, "round_0/samples.jsonl: 18 answers, "),
    (change(lambda r: r["stages"]["round_1/eval/merged"].update(facts={})),
     "run.json: damaged (stages.round_1/eval/merged.facts.scores is None)"),
    (change(lambda r: r.update(stages={})), "does not say that they were finished: base/eval, round_0/analysis.json"),
    (change(lambda r: r["stages"].pop("round_1/eval/merged")),
     "left out, for run.json does not say that they were finished: round_1/eval/merged"),
    (change(lambda r: r["stages"]["round_0/train.jsonl"]["facts"].pop("dropped_duplicate")),
     "run.json: damaged (stages.round_0/train.jsonl.facts.dropped_duplicate is None)"),
    (change(lambda r: r["stages"]["base/eval"]["facts"]["scores"]["stories"]["greedy"].update(n=True)),
     "run.json: damaged (stages.base/eval.facts.scores.stories is {"),
    (put("round_0/merged/model.safetensors", "half a mod"), "round_0/merged: has 10 bytes, and had 0 when it was made"),
    (put("base/eval/groups.jsonl", '{"id": "a", "question": "b", "gold": 3}\n'),
     "base/eval/groups.jsonl: lines in which one of id, question, gold"),
])
def test_missing_parts_are_named(run: Path, tmp_path: Path, damage, said: str):
  """A broken run directory gives a page that says what is missing."""
  root = tmp_path / "run"
  shutil.copytree(run, root)
  damage(root)
  assert said in quick(root)


def test_what_a_run_that_goes_on_is_at_is_no_damage(run: Path, tmp_path: Path):
  root = tmp_path / "run"
  shutil.copytree(run, root)
  change(lambda r: r["stages"].pop("round_1/eval/merged"))(root)
  with (root / "metrics.jsonl").open("a") as f:
    f.write('{"stage": "round_1/s')
  assert "left out, for run.json does not say" in quick(root)
  with (root / ".lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert "Missing or left out" not in quick(root)


def places(value: object, path: tuple = ()) -> list[tuple]:
  """Where everything in a JSON value stands."""
  inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  return [found for key, part in inner for found in [(*path, key), *places(part, (*path, key))]]


@pytest.mark.parametrize("name", ["run.json", "config.json", "round_0/analysis.json", "round_0/drift.json"])
def test_wrong_values_still_give_a_page(run: Path, tmp_path: Path, name: str):
  """No wrong value in a file keeps the page away."""
  root = tmp_path / "run"
  shutil.copytree(run, root)
  text, rng = (root / name).read_text(), random.Random(name)
  for wrong in ("null", "-1", "1e300", "NaN", '""', '"\\ud800"', "[]", "{}", "[[1]]", '{"a": 1}', "true", "9" * 400):
    for _ in range(6):
      found = json.loads(text)
      *path, last = rng.choice(places(found))
      holder = found
      for key in path:
        holder = holder[key]
      holder[last] = json.loads(wrong)
      (root / name).write_text(json.dumps(found))
      assert "Config and versions" in quick(root), (path, last, wrong)


@pytest.mark.full
@pytest.mark.parametrize(("name", "passed_over"), [
    ("run.json", {"inputs", "base_weight", "long_prompts"}),  # the page shows the first two nowhere
    ("round_0/analysis.json", set()), ("round_0/samples.jsonl", {"temperature"})], ids=["run", "analysis", "samples"])
def test_wrong_kinds_are_noticed(run: Path, tmp_path: Path, name: str, passed_over: set[str]):
  """A value of a wrong kind is named on the page, but for keys that change nothing on it."""
  root = tmp_path / "run"
  shutil.copytree(run, root)
  text, sound = (root / name).read_text(), quick(root)
  first, *others = text.splitlines()
  found = places(json.loads(first))
  found = random.Random(0).sample(found, min(60, len(found)))
  assert len(found) > 10
  unnamed = set()
  for *path, last in found:
    for wrong in (None, "x", [], {}, True, "deleted"):
      value = json.loads(first)
      holder = value
      for key in path:
        holder = holder[key]
      # null is what was not measured; pass@k is of as many k as were asked for.
      free = (wrong is None and name == "round_0/analysis.json") or (wrong == "deleted" and "@" in str(last))
      if type(holder[last]) is type(wrong) or free or holder[last] is None:
        continue
      holder[last] = wrong
      if wrong == "deleted":
        del holder[last]
      (root / name).write_text("\n".join([json.dumps(value), *others]) + "\n")
      now = quick(root)
      if "Missing or left out" not in now:
        assert now == sound, (path, last, wrong)
        unnamed.add(last)
  assert unnamed == passed_over


def test_a_run_that_has_just_begun_has_a_page(run: Path, tmp_path: Path):
  (tmp_path / "run").mkdir()
  shutil.copy(run / "config.json", tmp_path / "run")
  assert "No model was evaluated yet" in quick(tmp_path / "run")


@pytest.mark.parametrize("name", ["pass@x", "pass@0", "best"])
def test_unknown_figures_still_give_a_page(run: Path, tmp_path: Path, name: str):
  """A figure without a known name keeps nothing away."""
  root = tmp_path / "run"
  shutil.copytree(run, root)
  change(lambda r: r["stages"]["base/eval"]["facts"]["scores"]["stories"].update(
      {name: r["stages"]["base/eval"]["facts"]["scores"]["stories"]["greedy"]}))(root)
  live.write(root, tmp_path / "out")
  assert name not in results.Results.read(root).models[0].sampled.get("stories", {})
