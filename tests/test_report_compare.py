"""Several runs side by side, and the paper's figures beside a run's."""

import csv
import json
import re
from pathlib import Path

import pytest
import report_runs

from configs import paper as plans
from imm_jax.report import compare, paper
from imm_jax.report.results import Results

QWEN = "Qwen/Qwen2.5-1.5B-Instruct"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
  root = tmp_path_factory.mktemp("runs")
  return [Results.of(report_runs.make(root / name, method=name.partition("_")[0], seed=seed, rounds=3))
          for seed, name in enumerate(("imm_0", "imm_1", "star_0"))]


def test_runs_side_by_side(runs: list[Results], tmp_path: Path):
  compare.write(runs, tmp_path / "out")
  with (tmp_path / "out/last_round.csv").open(newline="") as f:
    rows = list(csv.DictReader(f))
  assert [(row["run"], row["method"]) for row in rows] == [("imm_0", "imm"), ("imm_1", "imm"), ("star_0", "star")]
  for row, run in zip(rows, runs, strict=True):
    scores = report_runs.read_record(run.root)["stages"]
    last = scores["round_2/eval/sft" if run.method == "star" else "round_2/eval/merged"]["facts"]["scores"]
    assert float(row["in domain"]) == last["stories"]["greedy"]["value"]
    before = scores["base/eval"]["facts"]["scores"]["stories"]["greedy"]["value"]
    assert float(row["change in domain"]) == pytest.approx(float(row["in domain"]) - before, abs=6e-4)
  text = (tmp_path / "out/index.html").read_text()
  for name in ("imm_0", "star_0", "Settings that differ", "distinct answers a question"):
    assert name in text
  with (tmp_path / "out/settings.csv").open(newline="") as f:
    assert {row["key"]: row["imm_1"] for row in csv.DictReader(f)} == {"method": "imm", "seed": "1"}


def test_a_method_has_one_colour(runs: list[Results]):
  section = next(part for part in compare.sections({run.root.name: run for run in runs}) if part.id == "accuracy")
  panel = next(part for part in section.parts if hasattr(part, "draw")).data[0]
  imm_0, imm_1, star = panel.lines
  assert imm_0.colour == imm_1.colour != star.colour
  assert imm_0.dash != imm_1.dash
  assert imm_0.marker != star.marker


def test_runs_of_other_tasks_are_told_apart(runs: list[Results], tmp_path: Path):
  other = Results.of(report_runs.make(tmp_path / "other", task="gsm8k", ood=()))
  section = next(part for part in compare.sections({"a": runs[0], "b": other}) if part.id == "accuracy")
  assert any("differ in their tasks" in part for part in section.parts if isinstance(part, str))


def test_every_run_of_the_papers_tables_is_set_beside_its_table_and_has_its_settings():
  for table in plans.TABLES:
    for name, config in plans.get_config(f"table={table}").runs.items():
      settings = json.loads(json.dumps(config.to_dict()))
      assert int(table) in [entry["table"] for entry in paper.find(settings)], (table, name)
      assert paper.different(settings) == [], (table, name)


def test_every_figure_of_the_paper_is_of_a_task_that_a_run_of_its_table_evaluates():
  for entry in paper.load()["tables"]:
    runs = plans.get_config(f"table={entry['table']}").runs.values()
    tasks = {task for run in runs for task in (run.task.name, *run.task.ood)}
    assert set(entry["figures"]) <= tasks, entry["table"]
    for figures in entry["figures"].values():
      assert all(re.fullmatch(r"base|sft|merged( 0\.\d)?", kind) and 0 < percent < 100 for kind, _, percent in figures)


@pytest.mark.parametrize(("table", "index", "task", "place", "percent"), [
    (2, 1, "mawps", ["merged", 0], 76.6), (3, 0, "math", ["merged 0.9", 0], 3.7), (3, 0, "gsm8k", ["merged", 0], 38.8),
    (4, 1, "mathqa", ["sft", 2], 12.8), (5, 3, "sat_math", ["sft", 0], 56.2), (7, 2, "mawps", ["merged", 0], 65.3),
    (8, 0, "svamp", ["sft", 0], 54.1), (9, 0, "math", ["merged", 0], 19.5)])
def test_figures_are_those_of_the_paper(table: int, index: int, task: str, place: list, percent: float):
  entry = [entry for entry in paper.load()["tables"] if entry["table"] == table][index]
  assert [*place, percent] in entry["figures"][task]


def test_the_papers_figures_stand_beside_a_run(tmp_path: Path):
  root = report_runs.make(tmp_path / "run", model="/models/Qwen2.5-1.5B-Instruct", task="gsm8k",
                          ood=("sat_math", "mawps"), rounds=1)
  run = Results.of(root)
  section, = paper.sections({"": run})
  table = section.parts[-1]
  ours = report_runs.read_record(root)["stages"]["round_0/eval/merged"]["facts"]["scores"]["gsm8k"]["greedy"]
  row = next(row for row in table.rows if row[:3] == [5, "gsm8k", "round 0 merged"])
  assert row[3] == pytest.approx(0.693)
  assert row[4].value == ours["value"]
  assert row[6] == ("inside" if ours["low"] <= 0.693 <= ours["high"] else "outside")
  assert any("sft.learning_rate is None, the paper's 2e-05" in part for part in section.parts if isinstance(part, str))


@pytest.mark.parametrize("changes", [{"model": "tiny"}, {"method": "data_mixture"}, {"teacher": "some/model"},
                                     {"intervention": "weight_masking"}, {"task": "asdiv"}])
def test_a_config_that_is_none_of_the_papers_is_said_in_one_line(tmp_path: Path, changes: dict[str, str]):
  settings = {"model": QWEN, "task": "gsm8k", "rounds": 1} | changes
  section, = paper.sections({"": Results.of(report_runs.make(tmp_path / "run", **settings))})
  assert len(section.parts) == 1
  assert section.parts[0].startswith("No table of the paper has this config")
