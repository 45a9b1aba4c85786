"""The front in and out of domain, against brute force, and what the pages say of it."""

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest

from imm_jax.methods import METHODS
from imm_jax.report import comparison, figures, groups
from imm_jax.report.figures import Panel
from imm_jax.report.markup import Plot, Section, Table
from imm_jax.report.results import EvaluatedModel, Results
from imm_jax.report.sections import front
from imm_jax.statistics.accuracy import Accuracy
from tests import report_runs


def drawn(seed: int, count: int) -> list[tuple[float, float]]:
  return [tuple(p) for p in (np.random.default_rng(seed).integers(0, 41, (count, 2)) / 40).tolist()]


@pytest.mark.parametrize("seed", range(5))
def test_front_and_volume_equal_brute_force(seed: int):
  points = drawn(seed, 12)
  beats = lambda p, q: p != q and p[0] >= q[0] and p[1] >= q[1]
  assert front.pareto_front(points) == sorted({q for q in points if not any(beats(p, q) for p in points)})
  # Cells of a grid on whose lines all points lie.
  for reference in ((0.0, 0.0), (0.25, 0.5), (0.9, -0.5)):
    x, y = np.meshgrid(np.arange(-40, 40) / 40 + 1 / 80, np.arange(-40, 40) / 40 + 1 / 80)
    above = (x > reference[0]) & (y > reference[1])
    dominated = np.logical_or.reduce([(x < p[0]) & (y < p[1]) for p in points])
    assert front.hypervolume(points, reference) == pytest.approx((above & dominated).sum() / 1600)


@pytest.mark.parametrize("seed", range(3))
def test_interpolated_ood_equals_a_fine_walk(seed: int):
  """Accuracy out of domain at an accuracy in domain is that of a walk in small steps."""
  path = drawn(seed, 5)
  walk = np.concatenate([np.linspace(p, q, 20_001) for p, q in itertools.pairwise(path)])
  for into in (0.1, 0.35, 0.62, 0.9):
    near = walk[abs(walk[:, 0] - into) < 1e-4]
    got = front.interpolate_out(path, into)
    assert (got is None) == (len(near) == 0)
    if got is not None:
      assert got == pytest.approx(near[:, 1].max(), abs=5e-3)


def score(value: float) -> Accuracy:
  return Accuracy(value, 100, max(0, value - 0.1), min(1, value + 0.1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return report_runs.make(tmp_path_factory.mktemp("runs") / "any", rounds=1)


def run(made: Path, method: str, *models: tuple[str, int, float, float], name: str = "run", **facts: float) -> Results:
  """A run of these models: kind, round, accuracy in domain, and of each task out of it."""
  found = Results.read(made)
  return found._replace(
      root=Path(name), method=method, config=found.config | {"method": method}, models=tuple(
          EvaluatedModel(kind, t, {"stories": score(a), "groups": score(b), "choice": score(b)}, {}, {})
          for kind, t, a, b in models),
      stages={"round_0/merged": {"facts": facts}})


STAR = (("base", -1, 0.2, 0.8), ("sft", 0, 0.5, 0.6), ("sft", 1, 0.6, 0.4))
IMM = (("base", -1, 0.2, 0.8), ("sft", 0, 0.6, 0.5), ("merged 0.7", 0, 0.3, 0.85), ("merged", 0, 0.5, 0.7))


def table(section: Section, name: str) -> list[dict]:
  found, = (part for part in section.parts if isinstance(part, Table) and part.name == name)
  return [dict(zip(found.head, row, strict=True)) for row in found.rows]


def test_runs_are_compared_at_equal_gain(made: Path):
  """They are compared at the accuracy that star gains half way."""
  runs = {"star": run(made, "star", *STAR), "imm": run(made, "imm", *IMM, base_weight=0.4)}
  section = front.runs_section(runs, groups.group_runs(runs))
  star, imm = table(section, "front")
  assert star["equal ID"] == imm["equal ID"] == pytest.approx(0.2 + (0.6 - 0.2) / 2)
  assert star["out of domain at equal ID"] == pytest.approx(0.8 - 0.2 * 2 / 3)
  # From the base to the merged 0.7, to the merged 0.4, to the tuned one: half way between the merged ones.
  assert imm["out of domain at equal ID"] == pytest.approx((0.85 + 0.7) / 2)
  assert star["hypervolume above the base"] == 0
  assert imm["hypervolume above the base"] == pytest.approx(0.1 * 0.05)
  assert imm["hypervolume above (base in domain, 0)"] == pytest.approx(0.1 * 0.85 + 0.2 * 0.7 + 0.1 * 0.5)
  assert [(row["run"], row["model"]) for row in table(section, "nondominated")] == [
      ("imm", "round 0 merged 0.7"), ("imm", "round 0 merged"), ("imm", "round 0 sft")]
  panel = next(part for part in section.parts if isinstance(part, Plot)).data[0]
  assert isinstance(panel, Panel)
  base, *_, line = panel.lines
  assert (base.label, base.x, base.y) == ("base model", (0.2,), (0.8,))
  assert (line.x, line.y) == ((0.3, 0.5, 0.6), (0.85, 0.7, 0.5))
  alone = front.run_section(runs["imm"])
  assert "Equal ID is 0.500 in domain, the median of all models" in alone.parts[0]
  assert table(alone, "front")[0]["out of domain at equal ID"] == pytest.approx(0.7)


def test_seeds_mean_at_the_equal_accuracy(made: Path):
  """It is taken over those that come to the equal accuracy."""
  later = run(made, "star", *STAR)
  runs = {"a": later, "b": later._replace(config=later.config | {"seed": 1}, models=later.models[:2]),
          "c": run(made, "imm", ("base", -1, 0.2, 0.8), ("sft", 0, 0.3, 0.8))}
  first, other = table(front.runs_section(runs, groups.group_runs(runs)), "front_means")
  assert first["equal ID"] == pytest.approx(0.2 + (0.4 + 0.3) / 2 / 2)
  assert (first["n"], first["out of domain at equal ID: s.e."]) == (2, pytest.approx(0))
  assert other["out of domain at equal ID"] is None
  assert (other["n"], other["hypervolume above the base: s.e."]) == (1, None)


def test_settings_have_their_own_markers(made: Path):
  """Runs of one method with other settings are told apart."""
  imm = run(made, "imm", *IMM)
  runs = {str(w): imm._replace(config=imm.config | {"merge": {"base_weight": w}}) for w in range(5)}
  parts = front.runs_section(runs, groups.group_runs(runs)).parts
  panel = next(part for part in parts if isinstance(part, Plot)).data[0]
  assert len({(line.color, line.marker) for line in panel.lines[1:-1]}) == 5


def test_each_method_has_a_look_of_its_own():
  assert METHODS.keys() == figures.METHODS.keys()
  assert len({*figures.METHODS.values()}) == len(METHODS)


def test_runs_of_different_tasks_have_no_front(made: Path):
  star = run(made, "star", *STAR)
  runs = {"a": star, "b": star._replace(ood_tasks=("groups",))}
  assert front.runs_section(runs, groups.group_runs(runs)).parts == []
  assert front.run_section(star._replace(ood_tasks=())).parts == []
  assert front.run_section(star._replace(models=star.models[:1])).parts == []


def test_page_of_runs_has_front_and_drift(tmp_path: Path):
  """It is the page of several runs."""
  runs = [Results.read(report_runs.make(tmp_path / name, method=name, rounds=1)) for name in ("imm", "star")]
  comparison.write(runs, tmp_path / "out")
  for name in ("front.png", "drift.png", "nondominated.csv"):
    assert (tmp_path / "out" / name).exists()
  with (tmp_path / "out/front.csv").open(newline="") as f:
    assert [row["run"] for row in csv.DictReader(f)] == ["imm", "star"]
