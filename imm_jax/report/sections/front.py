"""Pareto fronts of accuracy in and out of domain, and measures of runs based on them."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imm_jax.report import figures, groups
from imm_jax.report.figures import MODELS, Curve, Panel
from imm_jax.report.groups import Group
from imm_jax.report.markup import Plot, Section, Table
from imm_jax.report.reading import is_number
from imm_jax.report.results import EvaluatedModel, Results

# (accuracy in domain, accuracy out of domain)
Point = tuple[float, float]
_SWEEP = ("#56B4E9", "v", "merged at other weights")
_LINE = ("#666666", "none", "--")
_ID, _TITLE = "front", "Accuracy trade-off in and out of domain"
_AXES = {"x": "accuracy in domain", "y": "accuracy out of domain", "named": True, "counts": False}
_NOTE = ("Each point is a model; the line is the Pareto front, the models for which no other is as good in both and "
         "better in one. Hypervolume is the area that a run's models dominate above a reference point: its base (only "
         "models that are better in both count), or the base's accuracy in domain and 0 out of domain (the gain in "
         "domain times the accuracy left out of domain). ")
_MEASURES = ("hypervolume above the base", "hypervolume above (base in domain, 0)", "out of domain at equal ID")


def pareto_front(points: Sequence[Point]) -> list[Point]:
  """Returns the distinct points that no other dominates (as good in both, better in one), from left to right.

  >>> pareto_front([(0.2, 0.9), (0.5, 0.7), (0.4, 0.6), (0.5, 0.7), (0.5, 0.5)])
  [(0.2, 0.9), (0.5, 0.7)]
  """
  nondominated: list[Point] = []
  for x, y in sorted(set(points), reverse=True):
    if not nondominated or y > nondominated[-1][1]:
      nondominated.append((x, y))
  return nondominated[::-1]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
  """Computes the area that points dominate above a reference point (Zitzler & Thiele 1999), exactly in 2D.

  >>> hypervolume([(2, 1), (1, 3), (1, 2), (5, -1)], (0, 0)), hypervolume([(-1, 3)], (0, 0))
  (4.0, 0.0)
  """
  area, (left, low) = 0.0, reference
  for x, y in reversed(pareto_front(points)):
    if x > left and y > low:
      area, low = area + (x - left) * (y - low), y
  return area


def interpolate_out(path: Sequence[Point], equal_id: float) -> float | None:
  """Interpolates linearly the accuracy out of domain at which a path has a given accuracy in domain.

  Returns the largest if there are several, and None if the path never has that accuracy in domain.

  >>> interpolate_out([(0.2, 0.8), (0.6, 0.4), (0.3, 0.1)], 0.4), interpolate_out([(0.2, 0.8)], 0.4)
  (0.6, None)
  """
  values = [y for x, y in path if x == equal_id]
  values += [y + (equal_id - x) / (u - x) * (v - y) for (x, y), (u, v) in itertools.pairwise(path)
             if min(x, u) < equal_id < max(x, u)]
  return max(values, default=None)


def choose_equal_id(runs: Sequence[Results]) -> tuple[float, str] | None:
  """Chooses the accuracy in domain at which runs are compared; returns it and a description, or None without models.

  It is the base's plus half of star's gain by its last round (the mean over its runs), or without such a gain the
  median of all models except the base.
  """
  gains = [(run.in_domain(models[0]).value, run.in_domain(models[-1]).value) for run in runs
           if groups.method_label(run) == "star" and len(models := run.list_round_results()) > 1
           and models[0].kind == "base"]
  base, last = np.mean(gains, axis=0) if gains else (0.0, 0.0)
  if last > base:
    return float((base + last) / 2), "the base's plus half of star's gain"
  values = [run.in_domain(m).value for run in runs for m in run.models if m.kind != "base"]
  return (float(np.median(values)), "the median of all models") if values else None


def run_section(run: Results) -> Section:
  """Makes the section of one run."""
  if not _has_pareto_front(run):
    return Section(_ID, _TITLE, [])
  by_kind: dict[str, list[EvaluatedModel]] = {}
  for m in run.models:
    by_kind.setdefault(m.kind.partition(" ")[0] + " at" * (" " in m.kind), []).append(m)
  lines = [_make_line(run, by_kind[kind], label, (color, marker)) for kind, (color, marker, label) in
           (MODELS | {"merged at": _SWEEP}).items() if kind in by_kind]
  equal_id, description = choose_equal_id([run])
  return Section(_ID, _TITLE, [
      _explanation(equal_id, description), *_plot(lines, [run]),
      Table("front", "Hypervolume and matched accuracy", ["equal ID", *_MEASURES],
            [[equal_id, *_measure(run, equal_id)]]),
      _nondominated_table({"": run}, [])])


def runs_section(runs: Mapping[str, Results], grouped: Sequence[Group]) -> Section:
  """Makes the section of several runs, which is empty unless they have the same tasks."""
  eligible = {name: run for name, run in runs.items() if _has_pareto_front(run)}
  if not eligible or len({(run.id_task, run.ood_tasks) for run in eligible.values()}) > 1:
    return Section(_ID, _TITLE, [])
  equal_id, description = choose_equal_id(list(eligible.values()))
  members_by_group = [(group, [run for name, run in group.runs.items() if name in eligible]) for group in grouped]
  base = [_point(run, run.models[0]) for run in eligible.values()]
  lines = [Curve(MODELS["base"][2], *MODELS["base"][:2], "none", *zip(*dict.fromkeys(base), strict=True))]
  for group, members in members_by_group:
    points = [_point(run, m) for run in members for m in run.models if m.kind != "base"]
    if points:
      # Other plots distinguish the settings of a method by line styles; here there are only markers.
      styles = [(group.style[0], figures.next_marker(group.style[1], i)) for i in range(len(figures.SERIES))]
      used = {(line.color, line.marker) for line in lines}
      style = next((candidate for candidate in styles if candidate not in used), group.style)
      lines.append(Curve(group.label, *style, "none", *zip(*points, strict=True)))
  measures = {name: _measure(run, equal_id) for name, run in eligible.items()}
  rows = [[name, groups.method_label(run), equal_id, *measures[name]] for name, run in eligible.items()]
  means = []
  for group, _ in members_by_group:
    by_run = [measures[name] for name in group.runs if name in measures]
    by_measure = [[value for value in column if value is not None] for column in zip(*by_run, strict=True)]
    if by_measure:
      means.append([group.label, len(by_run), equal_id, *(
          cell for values in by_measure for cell in _tabulate_mean(values))])
  several = any(len(group.runs) > 1 for group in grouped)
  head = [name for measure in _MEASURES for name in (measure, f"{measure}: s.e.")]
  return Section(_ID, _TITLE, [
      _explanation(equal_id, description), *_plot(lines, list(eligible.values())),
      *([Table("front_means", "Hypervolume and matched accuracy, means over seeds with standard errors (at equal ID "
               "over the runs that reach it)", ["runs", "n", "equal ID", *head], means)] if several else []),
      Table("front", "Hypervolume and matched accuracy by run", ["run", "method", "equal ID", *_MEASURES], rows),
      _nondominated_table(eligible, ["run"])])


def _tabulate_mean(values: Sequence[float]) -> tuple[float | None, float | None]:
  """Returns the cells of the mean and its standard error, empty where there is none."""
  mean, error = groups.mean_and_error(values) if values else (None, None)
  return mean, error if len(values) > 1 else None


def _has_pareto_front(run: Results) -> bool:
  """Returns whether a run has its base, another model, and tasks out of domain."""
  return bool(run.ood_tasks) and len(run.models) > 1 and run.models[0].kind == "base"


def _explanation(equal_id: float, description: str) -> str:
  return (f"{_NOTE}Equal ID is {equal_id:.3f} in domain, {description}. A run's accuracy out of domain there is "
          "interpolated linearly between the models handed on, round by round, and within each round from the base "
          "through merged models, by their weight, to the tuned one; of several values the highest. Points on these "
          "lines are interpolations, not models.")


def _point(run: Results, model: EvaluatedModel) -> Point:
  return run.in_domain(model).value, run.out_of_domain(model).value


def _make_line(run: Results, models: Sequence[EvaluatedModel], label: str, style: tuple[str, str]) -> Curve:
  return Curve(label, *style, "none", *zip(*(_point(run, m) for m in models), strict=True))


def _plot(lines: Sequence[Curve], runs: Sequence[Results]) -> list[Plot]:
  best = pareto_front([_point(run, m) for run in runs for m in run.models])
  line = Curve("Pareto front", *_LINE, *zip(*best, strict=True))
  return [Plot("front", "Accuracy out of domain over accuracy in domain of every model, and a line through the Pareto "
               "front; the tables below have the values", figures.draw,
               (Panel("every model", lines=(*lines, line), **_AXES),))]


def _measure(run: Results, equal_id: float) -> list[float | None]:
  """Computes the measures of `_MEASURES` for a run."""
  points = [_point(run, m) for m in run.models]
  paths = ([_point(run, m) for m in path] for path in _model_paths(run))
  out_values = [out for path in paths if (out := interpolate_out(path, equal_id)) is not None]
  return [hypervolume(points, points[0]), hypervolume(points, (points[0][0], 0.0)), max(out_values, default=None)]


def _model_paths(run: Results) -> list[Sequence[EvaluatedModel]]:
  """Lists paths of models: those handed on from round to round, and in each round from base to tuned by weight."""
  paths: list[Sequence[EvaluatedModel]] = [run.list_round_results()]
  for t in dict.fromkeys(m.round for m in run.models[1:]):
    tuned = [m for m in run.models if (m.kind, m.round) == ("sft", t)]
    weighed = [(weight, m) for m in run.models if m.round == t and (weight := _base_weight(run, m)) is not None]
    if tuned and weighed:
      paths.append([run.models[0], *(m for _, m in sorted(weighed, key=lambda pair: -pair[0])), *tuned])
  return paths


def _base_weight(run: Results, model: EvaluatedModel) -> float | None:
  """Returns the weight of the base in a merged model, if it is a single number."""
  kind, _, weight = model.kind.partition(" ")
  try:
    if weight:
      return float(weight)
  except ValueError:  # a name instead of a number
    return None
  facts: Mapping[str, Any] = run.stages.get(f"round_{model.round}/merged", {}).get("facts", {})
  value = facts.get("base_weight")
  return float(value) if kind == "merged" and is_number(value) else None


def _nondominated_table(runs: Mapping[str, Results], head: list[str]) -> Table:
  """Makes a table of the models on the Pareto front; `head` names the column of runs, or is empty."""
  best = pareto_front([_point(run, m) for run in runs.values() for m in run.models])
  rows = [[*[name] * len(head), m.label, run.in_domain(m), run.out_of_domain(m)] for name, run in runs.items()
          for m in run.models if _point(run, m) in best]
  return Table("nondominated", "Models on the Pareto front", [*head, "model", "in domain", "out of domain"],
               sorted(rows, key=lambda row: row[-2].value))
