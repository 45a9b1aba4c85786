"""Which differences the report calls real, of a run and of several."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest

from imm_jax.report import comparison, page
from imm_jax.report.markup import Section, Table, to_csv
from imm_jax.report.results import Results
from imm_jax.report.sections import differences
from imm_jax.statistics import accuracy
from imm_jax.statistics.paired_tests import holm, mcnemar
from tests import report_runs

POOLED = differences.POOLED


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Nobody writes to it."""
  return report_runs.make(tmp_path_factory.mktemp("runs") / "imm", questions=40)


def verdicts(root: Path, name: str, tasks: tuple[str, ...]) -> list[bool]:
  return [json.loads(line)["correct"] for task in tasks
          for line in (root / name / f"{task}.jsonl").read_text().splitlines()]


def set_verdicts(root: Path, name: str, task: str, right: int) -> None:
  """Makes the first so many answers right, and the others wrong."""
  path = root / name / f"{task}.jsonl"
  rows = [json.loads(line) | {"correct": q < right} for q, line in enumerate(path.read_text().splitlines())]
  report_runs.write_rows(path, rows)
  score = accuracy.compute_accuracy(right, len(rows))._asdict()
  report_runs.change(lambda r: r["stages"][name]["facts"]["scores"][task].update(greedy=score))(root)


def tables(section: Section) -> dict[str, Table]:
  return {part.name: part for part in section.parts if isinstance(part, Table)}


def test_all_pairs_are_tested(root: Path):
  """Every pair of models is tested on every task."""
  found = tables(differences.make_section(Results.read(root)))
  rows = list(csv.DictReader(to_csv(found["tests"]).splitlines()))
  folders = {"base": "base/eval"} | {f"round {t} {kind}": f"round_{t}/eval/{kind}"
                                     for t in (0, 1) for kind in ("sft", "merged")}
  pairs = [(f"round {t} {kind}", other) for t in (0, 1)
           for kind, other in (("sft", "base"), ("merged", "base"), ("merged", f"round {t} sft"))]
  tasks = {"stories": ("stories",), POOLED: report_runs.OOD, "groups": ("groups",), "choice": ("choice",)}
  assert {(row["model"], row["against"], row["task"]) for row in rows} == {
      (*pair, task) for pair in pairs for task in tasks}
  for pair in pairs:
    of_pair = [row for row in rows if (row["model"], row["against"]) == pair]
    for row in of_pair:
      both = list(zip(*(verdicts(root, folders[name], tasks[row["task"]]) for name in pair), strict=True))
      wins, losses = both.count((True, False)), both.count((False, True))
      assert int(row["difference n"]) == len(both) == 40 * len(tasks[row["task"]])
      assert float(row["difference"]) == pytest.approx((wins - losses) / len(both))
      assert [int(row[f"only {which} right"]) for which in ("this", "other")] == [wins, losses]
      assert float(row["p"]) == mcnemar(wins, losses)
    assert [float(row["p (Holm)"]) for row in of_pair] == holm([float(row["p"]) for row in of_pair])
  assert list(found["differences"].head) == ["model", "against", *tasks]
  assert [tuple(row[:2]) for row in found["differences"].rows] == pairs


def test_real_differences_come_first(root: Path, tmp_path: Path):
  """They have a star, and are what the page says first."""
  run = tmp_path / "run"
  shutil.copytree(root, run)
  for name, counts in (("base/eval", (10, 40, 38)), ("round_1/eval/merged", (30, 39, 38))):
    for task, right in zip(("stories", *report_runs.OOD), counts, strict=True):
      set_verdicts(run, name, task, right)
  text = report_runs.quick(run)
  assert ("accuracy in domain (stories) rose from 0.250 to 0.750 and out of domain (2 tasks) went from 0.975 to 0.963 "
          "(this may be chance)") in text
  row = re.search(r"round 1 merged base (.+?) round 1 merged round 1 sft", text)[1]
  assert re.match(r"\+0\.500\* \[\+0\.350, \+0\.650\] -0\.013 \[-0\.037, \+0\.000\] -0\.025 ", row)
  set_verdicts(run, "round_1/eval/merged", "stories", 10)
  assert "in domain (stories) stayed at 0.250" in report_runs.quick(run)


def test_a_method_that_does_not_merge_and_one_task(tmp_path: Path):
  run = Results.read(report_runs.make(tmp_path / "star", method="star", ood=()))
  section = differences.make_section(run)
  assert [row[:2] for row in tables(section)["differences"].rows] == [
      ["round 0 sft", "base"], ["round 1 sft", "base"]]
  assert list(tables(section)["differences"].head)[2:] == ["stories"]
  assert "by Holm over the columns of the line" in section.parts[0]
  begun = run._replace(models=run.models[:1])
  assert "differences" not in [part.id for part in page.make_sections(begun, [])]


@pytest.mark.parametrize(("damage", "said"), [
    (lambda path: path.unlink(), "not compared: {path} cannot be read"),
    (lambda path: path.write_text("{\n"), "not compared: {path}:1: not a JSON object"),
    (lambda path: path.write_text(path.read_text().replace('"gold": "10"', '"gold": "11"')),
     "of 40 shared ids 1 have another question or another gold answer")], ids=["missing", "damaged", "another-gold"])
def test_incomparable_answers_are_named(root: Path, tmp_path: Path, damage, said: str):
  """They are left out."""
  run = tmp_path / "run"
  shutil.copytree(root, run)
  path = run / "round_1/eval/merged/groups.jsonl"
  damage(path)
  section = differences.make_section(Results.read(run))
  assert any(said.format(path=path) in part for part in section.parts if isinstance(part, str))
  assert len(tables(section)["differences"].rows) in (4, 6)  # other pairs stay
  assert "Config and versions" in report_runs.quick(run)


def test_runs_are_compared_with_the_first(root: Path, tmp_path: Path):
  runs = {"imm": Results.read(root), "star": Results.read(report_runs.make(tmp_path / "star", method="star", seed=5,
                                                                           questions=40)),
          "other": Results.read(report_runs.make(tmp_path / "other", task="svamp", ood=()))}
  section = next(part for part in comparison.make_sections(runs, {}, tmp_path) if part.id == "differences")
  found = tables(section)
  assert [row[:2] for row in found["runs_differences"].rows] == [["star: round 1 sft", "imm: round 1 merged"]]
  line = next(row for row in found["runs_tests"].rows if row[2] == "stories")
  ours, theirs = (verdicts(path, name, ("stories",)) for path, name in (
      (tmp_path / "star", "round_1/eval/sft"), (root, "round_1/eval/merged")))
  assert (line[4], line[5]) == (sum(ours) / 40, sum(theirs) / 40)
  assert any("no task has answers of both" in part for part in section.parts if isinstance(part, str))
  assert {row[0] for row in found["differences"].rows} == {"imm", "star", "other"}
