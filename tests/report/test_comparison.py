"""Several runs side by side, and the paper's figures beside a run's."""

import base64
import csv
import gzip
import io
import json
import os
import re
import shutil
import urllib.parse
from pathlib import Path

import numpy as np
import pytest

from configs import paper as plans
from imm_jax.errors import UserError
from imm_jax.report import comparison, figures, groups, live, page, results, samples, side_by_side
from imm_jax.report.figures import Panel
from imm_jax.report.markup import Plot, Table, to_csv
from imm_jax.report.results import Results
from imm_jax.report.sections import paper
from imm_jax.statistics.accuracy import Accuracy, compute_accuracy
from tests import report_runs

QWEN = "Qwen/Qwen2.5-1.5B-Instruct"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
  root = tmp_path_factory.mktemp("runs")
  return [Results.read(report_runs.make(root / name, method=name.partition("_")[0], seed=seed, rounds=3))
          for seed, name in enumerate(("imm_0", "imm_1", "star_0"))]


@pytest.fixture(scope="module")
def compared(runs: list[Results], tmp_path_factory: pytest.TempPathFactory) -> Path:
  out = tmp_path_factory.mktemp("reports") / "out"
  comparison.write(runs, out)
  return out


def test_runs_side_by_side(runs: list[Results], compared: Path):
  with (compared / "last_round.csv").open(newline="") as f:
    rows = list(csv.DictReader(f))
  assert [(row["run"], row["method"]) for row in rows] == [("imm_0", "imm"), ("imm_1", "imm"), ("star_0", "star")]
  for row, run in zip(rows, runs, strict=True):
    scores = report_runs.read_record(run.root)["stages"]
    last = scores["round_2/eval/sft" if run.method == "star" else "round_2/eval/merged"]["facts"]["scores"]
    assert float(row["in domain"]) == last["stories"]["greedy"]["value"]
    before = scores["base/eval"]["facts"]["scores"]["stories"]["greedy"]["value"]
    assert float(row["change in domain"]) == pytest.approx(float(row["in domain"]) - before, abs=6e-4)
  text = (compared / "index.html").read_text()
  for name in ("imm_0", "star_0", "Settings that differ", "distinct answers a question"):
    assert name in text
  with (compared / "settings.csv").open(newline="") as f:
    assert {row["key"]: row["imm_1"] for row in csv.DictReader(f)} == {"method": "imm", "seed": "1"}


def panels(runs: dict[str, Results], id_: str = "accuracy") -> list[Panel]:
  section = next(part for part in comparison.make_sections(runs, {}, Path("out")) if part.id == id_)
  return list(next(part for part in section.parts if isinstance(part, Plot)).data)


def test_seeds_are_one_curve(runs: list[Results], compared: Path):
  """It is their mean with its standard error."""
  into, _ = panels({run.root.name: run for run in runs})
  imm, star = into.lines
  assert (imm.label, star.label) == ("imm (2 seeds)", "star_0")
  scores = np.array([[run.in_domain(m).value for m in run.list_round_results()] for run in runs[:2]])
  error = np.abs(scores[0] - scores[1]) / 2  # of two values s / sqrt 2
  np.testing.assert_allclose(imm.y, scores.mean(0))
  np.testing.assert_allclose(imm.high, scores.mean(0) + error)
  np.testing.assert_allclose(imm.low, scores.mean(0) - error)
  assert star.low == tuple(runs[2].in_domain(m).low for m in runs[2].list_round_results())
  with (compared / "means.csv").open(newline="") as f:
    rows = list(csv.DictReader(f))
  assert [(row["runs"], row["n"]) for row in rows] == [("imm (2 seeds)", "2"), ("star_0", "1")]
  assert float(rows[0]["in domain"]) == pytest.approx(scores[:, -1].mean())
  assert float(rows[0]["in domain: s.e."]) == pytest.approx(error[-1])
  assert float(rows[0]["change in domain"]) == pytest.approx((scores[:, -1] - scores[:, 0]).mean())


def test_curves_look_different(runs: list[Results], tmp_path: Path):
  """Also with more settings than there are kinds of line, and as many runs as nobody could read a legend of."""
  others = {f"{method}_{rounds}_{seed}": Results.read(report_runs.make(
      tmp_path / f"{method}_{rounds}_{seed}", method=method, rounds=rounds, seed=seed, questions=2))
      for method, most in (("imm", 7), ("star", 2)) for rounds in range(1, most) for seed in range(3)}
  lines = panels(others)[0].lines
  assert len(lines) == 7
  assert len({(line.color, line.marker, line.dash) for line in lines}) == 7
  assert len({line.color for line in lines}) == 2
  assert [line.label for line in lines][:2] == ["imm, rounds=1 (3 seeds)", "imm, rounds=2 (3 seeds)"]
  assert lines[-1].label == "star (3 seeds)"


def test_late_seeds_are_left_out_of_the_mean(runs: list[Results]):
  """Seeds that have not come as far leave it to the others."""
  begun = runs[0]._replace(models=runs[0].models[:1], analysis={})
  into, _ = panels({"a": begun, "b": runs[1], "c": runs[2]})
  line = into.lines[0]
  assert line.label == "imm (2 seeds)"
  assert line.x == (0, 1, 2, 3)
  assert line.y[1:] == tuple(runs[1].in_domain(m).value for m in runs[1].list_round_results()[1:])
  importance = panels({"a": begun, "b": runs[1]._replace(analysis={}), "c": runs[2]}, "layers")[0]
  assert len(importance.lines) == 1
  pass_at_k, = panels({"a": begun, "b": runs[1]}, "sampled")
  last = runs[1].list_round_results()[-1]
  assert pass_at_k.lines[0].y == tuple(a.value for a in page.get_pass_at_k(last, "stories").values())
  half = runs[0]._replace(models=runs[0].models[:3])  # one round, sft and merged
  of = side_by_side.summarize_end(groups.group_runs({"a": half, "b": runs[1]})[0])
  assert (of.rounds, of.count, of.in_domain[0]) == (3, 1, line.y[-1])
  apart = [run._replace(analysis={t: run.analysis[t]}) for t, run in enumerate(runs[:2])]
  *_, rank = panels({"a": apart[0], "b": apart[1], "c": runs[2]}, "layers")
  assert rank.lines[0].x == (0, 1)


def test_labels_are_short_and_no_two_are_equal(runs: list[Results], tmp_path: Path):
  def run(method: str, seed: int, **settings: object) -> Results:
    found = runs[0] if method == "imm" else runs[2]
    return found._replace(config=found.config | {"seed": seed} | settings)

  models = [f"/data/models/{letter}{'long' * 20}" for letter in "ab"]
  many = {f"{method}{i}{j}": run(method, j, model=model, ood=["svamp", "asdiv", "mawps"], rate=rate)
          for i, (model, rate) in enumerate(zip([*models, models[0]], (1, 1, 2), strict=True))
          for method in ("imm", "star") for j in range(2)}
  many |= {f"{letter}_the_same_long_end_of_two_names_of_runs": run("imm", 7, other=letter) for letter in "xy"}
  found = [group.label for group in groups.group_runs(many)]
  assert len(set(found)) == len(found) == 8
  assert max(map(len, found)) < 60
  comparison.write([run._replace(root=tmp_path / name) for name, run in many.items()], tmp_path / "out")
  assert (tmp_path / "out/time.png").exists()


def test_equal_figures_have_no_single_leader():
  assert comparison._describe_leaders({"a": "+0.000", "b": "+0.000"}, "is", "are", {}, "", "") == "a and b are (+0.000)"


def test_a_name_tells_its_method_in_a_whole_word(runs: list[Results]):
  lost = lambda run: run._replace(config={})
  named = {"imm_0": runs[0], "iimm_0": lost(runs[0]), "star_3": runs[2], "start": lost(runs[2])}
  assert [group.label for group in groups.group_runs(named)] == ["imm_0", "iimm_0 (imm)", "star_3", "start (star)"]


def test_who_leads(runs: list[Results], tmp_path: Path):
  sentence = lambda named: comparison._summarize(groups.group_runs(named))
  values = {"a": 0.5, "b": 0.75, "c": 0.75}
  score = lambda value: compute_accuracy(round(4 * value), 4)
  named = {name: runs[2]._replace(config={}, models=(
      runs[2].models[0], runs[2].models[1]._replace(scores={task: score(value if task == "stories" else 0.5)
                                                            for task in runs[2].models[1].scores})))
           for name, value in values.items()}
  before = named["a"].out_of_domain(named["a"].models[0]).value
  change = f"{0.5 - before:+.3f}"
  assert sentence(named) == ("After the last round b (star) and c (star) are highest in domain (0.750); a (star) and "
                             f"b (star) and c (star) keep most out of domain ({change}).")
  two = {name: named[name] for name in "ab"}
  assert sentence(two).startswith("After the last round b (star) is highest in domain (0.750; out of domain "
                                  f"{change} against its base); ")
  other = Results.read(report_runs.make(tmp_path / "other", task="gsm8k", ood=()))
  assert "none leads" in sentence({"a": runs[0], "b": other})
  alone = {name: run._replace(ood_tasks=()) for name, run in named.items()}
  assert sentence(alone) == "After the last round b (star) and c (star) are highest in domain (0.750)."


def test_an_axis_of_one_round_counts_in_rounds():
  figure = figures.draw(Panel("t", "round", "y", (figures.round_line({2: 0.5}, "a", figures.get_series_style(0)),)))
  axes, = figure.axes
  low, high = axes.get_xlim()
  assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [2]


@pytest.mark.parametrize(("highest", "top"), [(0.04, 0.1), (0.31, 0.4), (0.5, 0.5), (0.51, 1.0), (1.0, 1.0)])
def test_an_axis_of_small_shares_is_short(highest: float, top: float):
  """It begins at 0 all the same."""
  curve = figures.accuracy_line("a", figures.get_series_style(0), [0, 1], [Accuracy(0.0, 9, 0.0, highest)] * 2)
  low, high = figures.draw(Panel("t", "round", "accuracy", (curve,), shares=True)).axes[0].get_ylim()
  assert low < 0
  assert high == pytest.approx(1.02 * top)


def test_repeated_runs_are_refused(runs: list[Results]):
  """No run may be named twice, and no name may be empty."""
  root = str(runs[0].root)
  for given, said in (([root, f"{root}/."], "is given twice"), ([str(runs[0].root.parent), root], "is given twice"),
                      ([root, "", root], "one of the names is empty")):
    with pytest.raises(UserError, match=said):
      results.find_runs(given)


def test_inert_settings_keep_seeds_together(runs: list[Results]):
  """Settings that change nothing do not keep seeds apart."""
  other = runs[1]._replace(config=runs[1].config | {"mesh": {"data": 8}})
  assert [len(group.runs) for group in groups.group_runs({"a": runs[0], "b": other, "c": runs[2]})] == [2, 1]
  lost = runs[1]._replace(config={})
  assert len(groups.group_runs({"a": lost, "b": lost})) == 2


@pytest.mark.parametrize("name", ["data", "layers", "modules", "spearman", "diversity", "drift", "stages",
                                  "versions", "pass_at_k"])
def test_each_table_of_a_run_is_in_the_comparison(runs: list[Results], compared: Path, name: str):
  with (compared / f"{name}.csv").open(newline="") as f:
    joined = list(csv.DictReader(f))
  for run in runs:
    table = next(part for section in page.make_sections(run, samples.Packer().chunks(run)[0]) for part in section.parts
                 if isinstance(part, Table) and part.name == name)
    own = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert own
    mine = [{key: value for key, value in row.items() if key in own[0]} for row in joined
            if row["run"] == run.root.name]
    assert mine == own


def test_last_layers_and_diversity_are_drawn(runs: list[Results]):
  """They are those of the last round."""
  importance, sft, merged, rank = panels({"a": runs[0], "b": runs[2]}, "layers")
  want = np.array(runs[0].analysis[2]["importance"]["layers"])
  np.testing.assert_allclose(importance.lines[0].y, 100 * want / want.sum())
  np.testing.assert_allclose(sft.lines[1].y, 100 * np.array(runs[2].analysis[2]["weight_change"]["sft"]["share"]))
  assert len(merged.lines) == 1
  assert rank.lines[0].y == (-0.4, -0.4, -0.4)
  assert [panel.title for panel in panels({"a": runs[0], "b": runs[2]}, "diversity")] == [
      "distinct answers a question", "share of distinct 4-grams"]


def test_answers_of_runs_share_the_room(runs: list[Results], compared: Path, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch):
  """The answers of all runs are there."""
  unpack = lambda text: [json.loads(gzip.decompress(base64.b64decode(chunk)))
                         for chunk in re.findall(r'class="chunk">([^<]+)<', text)]
  found = unpack((compared / "index.html").read_text())
  assert {chunk["run"] for chunk in found} == {"imm_0", "imm_1", "star_0"}
  count = sum(len(path.read_text().splitlines()) for run in runs for path in run.root.rglob("*.jsonl")
              if path.name not in ("metrics.jsonl", "train.jsonl"))
  assert sum(len(chunk["rows"]) for chunk in found) == count
  size = (runs[0].root / "round_0/samples.jsonl").stat().st_size
  monkeypatch.setattr(comparison, "MAX_BYTES", 3 * size + 600)
  comparison.write(runs, tmp_path / "small")
  text = (tmp_path / "small/index.html").read_text()
  assert {chunk["run"] for chunk in unpack(text)} == {"imm_0", "imm_1", "star_0"}
  assert "star_0: round_2/samples.jsonl: not in the browser of samples" in report_runs.text_of(text)


def test_page_links_to_its_runs(runs: list[Results], tmp_path: Path):
  """It says where they stand."""
  root = report_runs.make(tmp_path / "a run", rounds=1)
  live.write(root, root / "report")
  comparison.write([runs[0], Results.read(root)], tmp_path / "pages/out")
  text = (tmp_path / "pages/out/index.html").read_text()
  link, = re.findall(r'<a href="([^"#]+)">a run</a>', text)
  assert (tmp_path / "pages/out" / urllib.parse.unquote(link)).resolve() == (root / "report/index.html").resolve()
  assert ">imm_0<" in text  # has no page


def test_runs_of_other_tasks_are_told_apart(runs: list[Results], tmp_path: Path):
  other = Results.read(report_runs.make(tmp_path / "other", task="gsm8k", ood=()))
  sections = comparison.make_sections({"a": runs[0], "b": other}, {}, tmp_path)
  section = next(part for part in sections if part.id == "accuracy")
  assert any("differ in their tasks" in part for part in section.parts if isinstance(part, str))


@pytest.mark.full
@pytest.mark.parametrize("missing", ["base/eval", "run.json", "round_0", "config.json"])
def test_a_broken_run_does_not_keep_the_others_away(runs: list[Results], tmp_path: Path, missing: str):
  root = report_runs.make(tmp_path / "broken", rounds=1)
  (shutil.rmtree if (root / missing).is_dir() else os.remove)(root / missing)
  comparison.write([runs[0], Results.read(root)], tmp_path / "out")
  text = report_runs.text_of((tmp_path / "out/index.html").read_text())
  assert f"broken: {missing}" in text
  assert "imm_0" in text


def test_paper_runs_match_tables():
  """Every run of the paper's tables is set beside its table and has its settings."""
  for table in plans.TABLES[1:]:  # the first holds words
    for name, config in plans.get_config(f"table={table}").runs.items():
      settings = json.loads(json.dumps(config.to_dict()))
      assert int(table) in [entry["table"] for entry in paper.find_entries(settings)], (table, name)
      clip = ["sft.grad_clip is 0.0, the paper states none and ours is 1.0"] if name.startswith("unclipped") else []
      assert paper.list_differences(settings) == clip, (table, name)
      settings["merge"]["method"], settings["sft"]["stop_share"] = "ties", 0.1
      assert paper.list_differences(settings) == ["merge.method is ties, of which the paper has none",
                                           "sft.stop_share is 0.1, of which the paper has none", *clip]


def test_paper_tasks_are_evaluated():
  """Every figure of the paper is of a task that a run of its table evaluates."""
  for entry in paper.load()["tables"]:
    runs = plans.get_config(f"table={entry['table']}").runs.values()
    tasks = {task for run in runs for task in (run.task.name, *run.task.ood)}
    assert set(entry["figures"]) <= tasks, entry["table"]
    for of_task in entry["figures"].values():
      assert all(re.fullmatch(r"base|sft|merged( 0\.\d)?", kind) and 0 < percent < 100 for kind, _, percent in of_task)


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
  run = Results.read(root)
  section, = paper.make_sections({"": run})
  table = section.parts[-1]
  ours = report_runs.read_record(root)["stages"]["round_0/eval/merged"]["facts"]["scores"]["gsm8k"]["greedy"]
  row = next(row for row in table.rows if row[:3] == [5, "gsm8k", "round 0 merged"])
  assert row[3] == pytest.approx(0.693)
  assert row[4].value == ours["value"]
  assert row[6] == ("inside" if ours["low"] <= 0.693 <= ours["high"] else "outside")
  assert any("sft.learning_rate is None, the paper's 2e-05" in part for part in section.parts if isinstance(part, str))


@pytest.mark.parametrize("changes", [{"model": "tiny"}, {"method": "data_mixture"}, {"teacher": "some/model"},
                                     {"intervention": "weight_masking"}, {"task": "asdiv"}])
def test_foreign_config_is_refused(tmp_path: Path, changes: dict[str, str]):
  """A config that is none of the paper's is named in one line."""
  settings = {"model": QWEN, "task": "gsm8k", "rounds": 1} | changes
  section, = paper.make_sections({"": Results.read(report_runs.make(tmp_path / "run", **settings))})
  assert len(section.parts) == 1
  assert section.parts[0].startswith("No table of the paper has this config")
