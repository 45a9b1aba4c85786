"""Benchmarks and examples use names that exist; those of the sampler run at their smallest size and show errors."""

import ast
import copy
import importlib
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from imm_jax import files
from tests import REPO, report_runs


def _run(file: str, *flags: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
      [sys.executable, f"benchmarks/{file}", *flags], cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)},
      capture_output=True, text=True, check=False)


_PROGRAMS = sorted([*(REPO / "benchmarks").rglob("*.py"), *(REPO / "examples").glob("*.py")])


@pytest.mark.parametrize("path", _PROGRAMS, ids=[path.stem for path in _PROGRAMS])
def test_names_of_the_package_exist(path: Path) -> None:
  tree = ast.parse(path.read_text())
  modules = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("imm_jax"):
      for name in node.names:
        home = importlib.import_module(node.module)
        value = getattr(home, name.name, None) or importlib.import_module(f"{node.module}.{name.name}")
        if isinstance(value, types.ModuleType):
          modules[name.asname or name.name] = value
    if isinstance(node, ast.Import):
      modules |= {name.asname or name.name: importlib.import_module(name.name) for name in node.names
                  if name.name == "imm_jax"}
  used = [(node.value.id, node.attr) for node in ast.walk(tree)
          if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules]
  assert [f"{module}.{name}" for module, name in used if not hasattr(modules[module], name)] == []


@pytest.mark.slow
def test_smallest_shape_runs() -> None:
  """A failure is shown."""
  pytest.importorskip("torch")
  flags = ("sampling.py", "--workloads=stories", "--questions=3", "--max_new_tokens=8", "--rows=2", "--peer_rows=2")
  done = _run(*flags, "--transformers_questions=2")
  assert done.returncode == 0, done.stderr
  native, other = (line for line in done.stdout.splitlines() if line.startswith("| stories"))
  assert native.startswith("| stories | native | 3 | ")
  assert native.endswith(" | 3 of 3 |")
  assert other.startswith("| stories | transformers | 2 | ")
  assert other.endswith(" | 2 of 2 |")
  failed = _run(*flags, "--dtype=int8", "--transformers_questions=0")
  assert failed.returncode == 1
  assert "compute_dtype='int8': expected one of" in failed.stderr


@pytest.mark.full
def test_greedy_texts_are_those_of_transformers() -> None:
  pytest.importorskip("torch")
  done = _run("greedy_texts.py", "--model=tiny", "--task=stories", "--questions=3", "--max_new_tokens=8",
              "--batch_size=2")
  assert done.returncode == 0, done.stderr
  assert "native and transformers: 3 of 3 texts are equal in every character" in done.stdout


def test_a_study_is_collected_as_far_as_it_has_come(tmp_path: Path) -> None:
  for seed in range(2):
    report_runs.make(tmp_path / f"runs/star_{seed}", method="star", rounds=2, seed=seed)
  report_runs.make(tmp_path / "runs/imm_0", rounds=1)  # not as far as the others
  report_runs.make(tmp_path / "runs/kl_0.part", method="kl")
  (tmp_path / "runs/compiled").mkdir()
  printed = _collect_study(tmp_path)
  last, by_round, differences, samples, costs = printed.split("\n\n")
  head, _, base, star = last.splitlines()
  assert head == "|  | seeds | stories | out of domain | groups | choice | KL in domain |"
  scores = json.loads((tmp_path / "scores.json").read_text())
  assert sorted(scores) == ["imm_0", "star_0", "star_1"]
  assert [run["finished"] for run in scores.values()] == [False] * 3  # no status.json says so
  ends = [scores[f"star_{seed}"]["models"]["round 1 sft"]["in_domain"] for seed in range(2)]
  starts = [scores[f"star_{seed}"]["models"]["base"]["in_domain"] for seed in range(2)]
  assert base.split(" | ")[1:3] == ["1", f"{scores['star_0']['models']['base']['in_domain']:.3f}"]
  assert star.startswith(f"| `star` | 2 | {sum(ends) / 2:.3f} ± {abs(ends[0] - ends[1]) / 2:.3f} | ")
  assert by_round.splitlines()[2].startswith(f"| `star` | {sum(starts) / 2:.3f} | ")
  assert differences.splitlines()[2].startswith(f"| `star` less base | 2 | {(sum(ends) - sum(starts)) / 2:+.3f} [")
  rows = [json.loads(line) for line in (tmp_path / "runs/star_0/base/eval/stories.jsonl").read_text().splitlines()]
  bits = "".join(str(int(row["correct"])) for row in sorted(rows, key=lambda row: row["id"]))
  assert int(scores["star_0"]["models"]["base"]["correct"]["stories"], 16) == int(bits, 2)
  kept = [scores[f"star_{seed}"]["data"][0]["kept"] for seed in range(2)]
  assert samples.splitlines()[2].split(" | ")[3] == f"{sum(kept) / 2:.0f}"
  assert costs.splitlines()[-1] == "| peak memory of a run, GiB | 2.50 |"
  assert (tmp_path / "report/index.html").exists()
  (tmp_path / "scores.json").rename(tmp_path / "earlier.json")
  (tmp_path / "runs").rename(tmp_path / "elsewhere")  # all was done on another machine
  assert _collect_study(tmp_path, tmp_path / "earlier.json") == printed
  assert json.loads((tmp_path / "scores.json").read_text()) == scores


def _collect_study(root: Path, earlier: Path | None = None) -> str:
  done = _run("smollm2.py", f"--workdir={root}", "--methods=", *([f"--scores={earlier}"] if earlier else []))
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_any_part_of_a_study_is_collected(tmp_path: Path) -> None:
  """A method alone, a run between two stages, and one that is done elsewhere and has begun here."""
  scores = json.loads((REPO / "benchmarks/smollm2.json").read_text())
  begun = copy.deepcopy(scores["star_1"]) | {"finished": False}
  del begun["analysis"]["2"]
  parts = {"alone": {"kl_0": scores["star_0"]}, "unanalyzed": {"star_0": scores["star_0"], "star_1": begun},
           "sampling": {"star_0": scores["star_0"] | {"data": [{}] * 4}, "imm_0": scores["imm_0"]}}
  for name, part in parts.items():
    files.write_json(tmp_path / f"{name}.json", part)
    last, *others = _collect_study(tmp_path / name, tmp_path / f"{name}.json").split("\n\n")
    assert len(others) == 4
    assert last.splitlines()[3].split(" | ")[1] == str(len(part) if name == "unanalyzed" else 1)
  report_runs.make(tmp_path / "gold/runs/real_0", method="real", rounds=1)
  analysis = tmp_path / "gold/runs/real_0/round_0/analysis.json"
  files.write_json(analysis, json.loads(analysis.read_text()) | {"diversity": None})  # nothing is sampled
  assert "| `real` |" in _collect_study(tmp_path / "gold")
  report_runs.make(tmp_path / "here/runs/star_0", method="star", rounds=1)
  files.write_json(tmp_path / "there.json", {"star_0": scores["star_0"]})
  _collect_study(tmp_path / "here", tmp_path / "there.json")
  assert json.loads((tmp_path / "here/scores.json").read_text()) == {"star_0": scores["star_0"]}


def test_wrong_scores_and_methods_are_one_line(tmp_path: Path) -> None:
  run = json.loads((REPO / "benchmarks/smollm2.json").read_text())["star_0"]
  changed = copy.deepcopy(run)
  changed["models"]["base"]["correct"]["svamp"] = "ff"
  for text, said in (('{"star_0": {', "JSONDecodeError"), ("[]", "no file of scores"),
                     (json.dumps({"star_0": changed}), "star_0, base, svamp: the answers do not add up to the score")):
    (tmp_path / "bad.json").write_text(text)
    done = _run("smollm2.py", f"--workdir={tmp_path}", f"--scores={tmp_path / 'bad.json'}", "--methods=")
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
  assert "did you mean star?" in _run("smollm2.py", f"--workdir={tmp_path}", "--methods=sta").stderr


def test_documented_results_are_those_of_the_scores(tmp_path: Path) -> None:
  scores = json.loads((REPO / "benchmarks/seeds.json").read_text())
  seeds = len(scores["star"]["ID"])
  printed = _run("seeds.py", f"--workdir={tmp_path}", "--scores=benchmarks/seeds.json", f"--seeds={seeds}",
                 f"--methods={','.join(scores)}").stdout
  tables = [block.strip() for block in printed.split("\n\n") if block.strip().startswith("|")]
  assert len(tables) == 5
  results = (REPO / "docs/results.md").read_text()
  assert [table.splitlines()[0] for table in tables if table not in results] == []
  after = {row.split("`")[1]: row.split(" | ")[1:3] for row in tables[0].splitlines()[3:]}
  embedded, _, _ = (REPO / "README.md").read_text().partition("### A pretrained model")
  shown = re.findall(r"^\| `(\w+)`: .* \| (.+) \| (.+) \|$", embedded, re.M)
  assert {name: cells for name, *cells in shown} == {name: after[name] for name in ("star", "imm", "iimm")}


def test_documented_study_is_that_of_the_scores(tmp_path: Path) -> None:
  printed = _run("smollm2.py", f"--workdir={tmp_path}", "--scores=benchmarks/smollm2.json", "--methods=").stdout
  tables = [block.strip() for block in printed.split("\n\n") if block.strip().startswith("|")]
  page = (REPO / "docs/smollm2.md").read_text()
  assert len(tables) == 5
  assert [table.splitlines()[0] for table in tables if table not in page] == []
  _, _, pretrained = (REPO / "README.md").read_text().partition("### A pretrained model")
  head, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in tables[0].splitlines())
  columns = [head.index(name) for name in ("mawps_one_step", "out of domain", "tiny_shakespeare, nats a token")]
  last = {row[0]: [row[i] for i in columns] for row in rows}
  shown = re.findall(r"^\| (base|`\w+`)(?:: .*?)? \| (.+) \| (.+) \| (.+) \|$", pretrained, re.M)
  assert {name: cells for name, *cells in shown} == {name: last[name] for name, *_ in shown}
  assert len(shown) == 4
  scores = json.loads((REPO / "benchmarks/smollm2.json").read_text())
  last_nats = lambda run: run["models"][run["handed_on"][-1]]["nats_per_token"]["tiny_shakespeare"]
  before = scores["star_0"]["models"]["base"]["nats_per_token"]["tiny_shakespeare"]
  for method in ("star", "imm"):  # as the sentence below the table has it
    runs = [run for name, run in scores.items() if name.rpartition("_")[0] == method]
    assert f"{sum(map(last_nats, runs)) / len(runs) - before:.3f}" in pretrained


def test_what_methods_share_is_copied_from_star(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
  monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
  side_by_side = importlib.import_module("side_by_side")
  calls: list[tuple[str, list[str]]] = []

  def run(flags: list[str], workdir: Path, *, compiled: Path, core: int | None) -> None:
    assert compiled == tmp_path / "compiled"
    calls.append((workdir.name, flags))
    workdir.mkdir(exist_ok=True)
    (workdir / "samples.jsonl").touch()

  monkeypatch.setattr(side_by_side, "run", run)
  methods = {"imm": ["--config.method=imm"], "star": ["--config.method=star"], "kl": []}
  start = lambda names: side_by_side.run_all(
      {name: methods[name] for name in names}, {"imm": 2, "star": 2, "kl": 1}, tmp_path, ["--config=X"], processes=1)
  start(["kl"])  # nothing to copy yet
  assert calls == [("kl_0", ["--config=X", "--config.seed=0"])]
  calls.clear()
  start(methods)
  assert [name for name, _ in calls] == ["star_0", "star_1", "imm_0", "kl_0", "imm_1"]
  assert calls[2][1] == ["--config=X", "--config.seed=0", "--config.method=imm", "--rerun"]
  assert "--rerun" not in calls[0][1]
  assert (tmp_path / "imm_1" / "samples.jsonl").exists()
  calls.clear()
  side_by_side.run_all(methods, {"imm": 2, "star": 2, "kl": 0}, tmp_path, [], done=("star_0", "imm_1"), processes=1)
  assert [name for name, _ in calls] == ["star_1", "imm_0"]
