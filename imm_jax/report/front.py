"""In and out of domain at once: the models that no other beats in both, and what a run is worth by that."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imm_jax.report import figures, groups
from imm_jax.report.figures import MODELS, Line, Panel
from imm_jax.report.groups import Group
from imm_jax.report.markup import Plot, Section, Table
from imm_jax.report.reading import is_number
from imm_jax.report.results import Model, Results

# Accuracy in domain, and out of domain.
Point = tuple[float, float]
_SWEEP = ("#56B4E9", "v", "merged at other weights")
_LINE = ("#666666", "none", "--")
_ID, _TITLE = "front", "In and out of domain at once"
_AXES = {"x": "accuracy in domain", "y": "accuracy out of domain", "named": True, "counts": False}
_HOW = ("A point is a model; the line joins those that no other beats in both. Hypervolume is the area that a run's "
        "models dominate above a reference point: its base (only what is better than the base in both counts), or the "
        "base's accuracy in domain and 0 out of it (what is gained in domain, times what is left out of domain). ")
_MEASURES = ("hypervolume above the base", "hypervolume above (base in domain, 0)", "out of domain at equal ID")


def front(points: Sequence[Point]) -> list[Point]:
  """The points that no other dominates (as good in both, better in one), from left to right; equal ones once.

  >>> front([(0.2, 0.9), (0.5, 0.7), (0.4, 0.6), (0.5, 0.7), (0.5, 0.5)])
  [(0.2, 0.9), (0.5, 0.7)]
  """
  found: list[Point] = []
  for x, y in sorted(set(points), reverse=True):
    if not found or y > found[-1][1]:
      found.append((x, y))
  return found[::-1]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
  """The area that the points dominate above a reference point (Zitzler & Thiele 1999), exact in two dimensions.

  >>> hypervolume([(2, 1), (1, 3), (1, 2), (5, -1)], (0, 0)), hypervolume([(-1, 3)], (0, 0))
  (4.0, 0.0)
  """
  area, (left, low) = 0.0, reference
  for x, y in reversed(front(points)):
    if x > left and y > low:
      area, low = area + (x - left) * (y - low), y
  return area


def out_at(path: Sequence[Point], into: float) -> float | None:
  """The accuracy out of domain where a path has this one in domain, by straight lines between its points.

  Where the path comes there several times, the highest; None where it never does.

  >>> out_at([(0.2, 0.8), (0.6, 0.4), (0.3, 0.1)], 0.4), out_at([(0.2, 0.8)], 0.2), out_at([(0.2, 0.8)], 0.4)
  (0.6, 0.8, None)
  """
  found = [y for x, y in path if x == into]
  found += [y + (into - x) / (u - x) * (v - y) for (x, y), (u, v) in itertools.pairwise(path)
            if min(x, u) < into < max(x, u)]
  return max(found, default=None)


def equal_into(runs: Sequence[Results]) -> tuple[float, str] | None:
  """The accuracy in domain at which runs are compared, and what it is; None where they have no model but the base.

  It is the base's plus half of what star gains by its last round (the mean over runs of star), or without such a gain
  the median of all models.
  """
  gains = [(run.in_domain(models[0]).value, run.in_domain(models[-1]).value) for run in runs
           if groups.method(run) == "star" and len(models := run.handed_on()) > 1 and models[0].kind == "base"]
  base, last = np.mean(gains, axis=0) if gains else (0.0, 0.0)
  if last > base:
    return float((base + last) / 2), "the base's plus half of star's gain"
  values = [run.in_domain(m).value for run in runs for m in run.models if m.kind != "base"]
  return (float(np.median(values)), "the median of all models") if values else None


def of_run(run: Results) -> Section:
  """The models of one run."""
  if not _has_front(run):
    return Section(_ID, _TITLE, [])
  by_kind: dict[str, list[Model]] = {}
  for m in run.models:
    by_kind.setdefault(m.kind.partition(" ")[0] + " at" * (" " in m.kind), []).append(m)
  lines = [_marks(run, by_kind[kind], label, (colour, marker)) for kind, (colour, marker, label) in
           (MODELS | {"merged at": _SWEEP}).items() if kind in by_kind]
  into, what = equal_into([run])
  return Section(_ID, _TITLE, [
      _explain(into, what), *_plot(lines, [run]),
      Table("front", "What the models are worth together", ["equal ID", *_MEASURES], [[into, *_worth(run, into)]]),
      _nondominated({"": run}, [])])


def of_runs(runs: Mapping[str, Results], found: Sequence[Group]) -> Section:
  """The models of several runs, which have the same tasks; of others nothing."""
  having = {name: run for name, run in runs.items() if _has_front(run)}
  if not having or len({(run.id_task, run.ood_tasks) for run in having.values()}) > 1:
    return Section(_ID, _TITLE, [])
  into, what = equal_into(list(having.values()))
  every = [(group, [run for name, run in group.runs.items() if name in having]) for group in found]
  base = [_point(run, run.models[0]) for run in having.values()]
  lines = [Line(MODELS["base"][2], *MODELS["base"][:2], "none", *zip(*dict.fromkeys(base), strict=True))]
  for group, members in every:
    points = [_point(run, m) for run in members for m in run.models if m.kind != "base"]
    if points:
      # Elsewhere kinds of line tell the settings of a method apart.
      looks = [(group.style[0], figures.another_marker(group.style[1], i)) for i in range(len(figures.SERIES))]
      taken = {(line.colour, line.marker) for line in lines}
      style = next((look for look in looks if look not in taken), group.style)
      lines.append(Line(group.label, *style, "none", *zip(*points, strict=True)))
  worth = {name: _worth(run, into) for name, run in having.items()}
  rows = [[name, groups.method(run), into, *worth[name]] for name, run in having.items()]
  means = []
  for group, _ in every:
    columns = zip(*(worth[name] for name in group.runs if name in worth), strict=True)
    of = [[value for value in column if value is not None] for column in columns]
    if of:
      means.append([group.label, len([name for name in group.runs if name in worth]), into, *(
          cell for values in of for cell in (groups.mean(values) if values else (None, None)))])
  several = any(len(group.runs) > 1 for group in found)
  head = [name for measure in _MEASURES for name in (measure, f"{measure}: s.e.")]
  return Section(_ID, _TITLE, [
      _explain(into, what), *_plot(lines, list(having.values())),
      *([Table("front_means", "What each is worth, means over seeds with their standard errors; at equal ID over those "
               "that come there", ["runs", "n", "equal ID", *head], means)] if several else []),
      Table("front", "What the models of each run are worth together", ["run", "method", "equal ID", *_MEASURES], rows),
      _nondominated(having, ["run"])])


def _has_front(run: Results) -> bool:
  """Whether there is a base and another model, and something out of domain."""
  return bool(run.ood_tasks) and len(run.models) > 1 and run.models[0].kind == "base"


def _explain(into: float, what: str) -> str:
  return (f"{_HOW}Equal ID is {into:.3f} in domain, {what}: there a run has what straight lines between its models "
          "give, from round to round of those that are handed on, and in each round from the base over merged models, "
          "by their weight, to the tuned one; of several the highest. What lies on such a line is no model.")


def _point(run: Results, model: Model) -> Point:
  return run.in_domain(model).value, run.out_of_domain(model).value


def _marks(run: Results, models: Sequence[Model], label: str, style: tuple[str, str]) -> Line:
  return Line(label, *style, "none", *zip(*(_point(run, m) for m in models), strict=True))


def _plot(lines: Sequence[Line], runs: Sequence[Results]) -> list[Plot]:
  best = front([_point(run, m) for run in runs for m in run.models])
  line = Line("no other is better in both", *_LINE, *zip(*best, strict=True))
  return [Plot("front", "Accuracy out of domain over accuracy in domain of every model, and a line through those that "
               "no other beats in both; the tables below have the values", figures.draw,
               (Panel("every model", lines=(*lines, line), **_AXES),))]


def _worth(run: Results, into: float) -> list[float | None]:
  """The measures of `_MEASURES`."""
  points = [_point(run, m) for m in run.models]
  reached = [out for path in _paths(run) if (out := out_at([_point(run, m) for m in path], into)) is not None]
  return [hypervolume(points, points[0]), hypervolume(points, (points[0][0], 0.0)), max(reached, default=None)]


def _paths(run: Results) -> list[Sequence[Model]]:
  """The models that are handed on, by round; and in each round those from the base to the tuned one, by weight."""
  paths: list[Sequence[Model]] = [run.handed_on()]
  for t in dict.fromkeys(m.round for m in run.models[1:]):
    tuned = [m for m in run.models if (m.kind, m.round) == ("sft", t)]
    weighed = [(weight, m) for m in run.models if m.round == t and (weight := _base_weight(run, m)) is not None]
    if tuned and weighed:
      paths.append([run.models[0], *(m for _, m in sorted(weighed, key=lambda of: -of[0])), *tuned])
  return paths


def _base_weight(run: Results, model: Model) -> float | None:
  """The weight of the base in a merged model, where it is one number."""
  kind, _, weight = model.kind.partition(" ")
  try:
    if weight:
      return float(weight)
  except ValueError:  # the name of a folder
    return None
  facts: Mapping[str, Any] = run.stages.get(f"round_{model.round}/merged", {}).get("facts", {})
  value = facts.get("base_weight")
  return float(value) if kind == "merged" and is_number(value) else None


def _nondominated(runs: Mapping[str, Results], head: list[str]) -> Table:
  """The models on the front; `head` is that of the column of runs, empty without one."""
  best = front([_point(run, m) for run in runs.values() for m in run.models])
  rows = [[*[name] * len(head), m.label, run.in_domain(m), run.out_of_domain(m)] for name, run in runs.items()
          for m in run.models if _point(run, m) in best]
  return Table("nondominated", "Models that no other beats in both", [*head, "model", "in domain", "out of domain"],
               sorted(rows, key=lambda row: row[-2].value))
