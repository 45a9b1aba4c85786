"""The figures and tables of several runs; runs that differ in their seed alone are one curve, their mean."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imm_jax.analysis import shares
from imm_jax.evaluation import Accuracy
from imm_jax.report import differences, figures, front, groups, insides, page
from imm_jax.report.figures import Bars, Panel
from imm_jax.report.groups import Group
from imm_jax.report.markup import Plot, Section, Table
from imm_jax.report.reading import count
from imm_jax.report.results import Results

# (name, caption) -> the runs' tables of that name as one
Join = Callable[[str, str], list[Table]]
Curve = Callable[[Results], Mapping[int, Accuracy | float]]
# Seconds from which time is given in hours.
_LONG_S = 3 * 3600
# Parts of a run's time, and the stages of a round that take it.
_KINDS = {"sampling": ("samples.jsonl",), "SFT": ("sft",), "merging": ("sweep", "base_weight.json", "merged"),
          "evaluation": ("eval",), "importance and analysis": ("importance.json", "analysis.json", "drift.json")}


def sections(runs: Mapping[str, Results], join: Join) -> list[Section]:
  """What is shown of these runs, by name; a section without parts has nothing to show."""
  found = groups.group(runs)
  return [_accuracy(runs, found), front.of_runs(runs, found), _differences(runs, join), _sampled(found, join),
          _layers(found, join), _diversity(found, join), _drift(found, join), _data(found, join),
          _cost(runs, found, join)]


class End(NamedTuple):
  """What came out of a group after its last round: means and standard errors over the runs that have finished it and
  know their base's scores; None out of domain where there are no such tasks.

  Attributes:
    rounds: how many are done then.
    count: how many runs have come so far.
    into: accuracy in domain.
    into_change: against the base.
    out: accuracy out of domain.
    out_change: against the base.
  """

  rounds: int
  count: int
  into: tuple[float, float]
  into_change: tuple[float, float]
  out: tuple[float, float] | None
  out_change: tuple[float, float] | None


def end(group: Group) -> End | None:
  """What came out of a group; None where no run has finished a round."""
  ends = [(run, models[0], models[-1]) for run in group.runs.values()
          if len(models := run.handed_on()) > 1 and models[0].kind == "base"]
  if not ends:
    return None
  furthest = max(last.round for _, _, last in ends)
  ends = [(run, first, last) for run, first, last in ends if last.round == furthest]
  means: list[tuple[float, float] | None] = []
  for score in (Results.in_domain, Results.out_of_domain):
    if score is Results.out_of_domain and not ends[0][0].ood_tasks:
      means += [None, None]
      continue
    values = [(score(run, last).value, score(run, first).value) for run, first, last in ends]
    means += [groups.mean([last for last, _ in values]), groups.mean([last - first for last, first in values])]
  return End(furthest + 1, len(ends), *means)


def _plot(name: str, what: str, found: Sequence[Group], measures: Mapping[str, tuple[Curve, dict[str, Any]]],
          ) -> list[Plot]:
  """A plot with a panel for each measure, by its title, that any group has; none where none has any."""
  panels = []
  for title, (measure, options) in measures.items():
    lines = tuple(line for group in found if (line := groups.curve(group, measure)))
    if lines:
      highest = max(max(line.high or line.y) for line in lines)
      span = None if options.get("shares") else (0, 1.1 * highest or 1)
      panels.append(Panel(title=title, lines=lines, named=True, **{"span": span} | options))
  return [Plot(name, f"{what} of every run; the tables below have the values", figures.draw, tuple(panels))] * bool(
      panels)


def _accuracy(runs: Mapping[str, Results], found: Sequence[Group]) -> Section:
  tasks = list(dict.fromkeys(task for run in runs.values() for task in (run.id_task, *run.ood_tasks)))
  rows = [[name, groups.method(run), m.label, run.in_domain(m), run.out_of_domain(m) if run.ood_tasks else None,
           *(m.scores.get(task) for task in tasks)] for name, run in runs.items() for m in run.models]
  if not rows:
    return Section("accuracy", "Accuracy by round", [])
  into = lambda run: {m.round + 1: run.in_domain(m) for m in run.handed_on()}
  out = lambda run: {m.round + 1: run.out_of_domain(m) for m in run.handed_on()} if run.ood_tasks else {}
  options = {"x": "rounds done", "y": "accuracy", "shares": True}
  several = any(len(group.runs) > 1 for group in found)
  notes = ["Of each round the model that the next one starts from (merged, or tuned where nothing is merged), with "
           "95 % intervals (Wilson). Each method has a colour.",
           *(["Runs that differ in their seed alone are one curve, their mean with its standard error; where some have "
              "not come as far, of the others."] * several),
           *(["The runs differ in their tasks, so their curves are of different questions."]
             * (len({(run.id_task, run.ood_tasks) for run in runs.values()}) > 1))]
  return Section("accuracy", "Accuracy by round", [
      " ".join(notes),
      *_plot("accuracy", "Accuracy in and out of domain by round", found,
             {"in domain": (into, options), "out of domain": (out, options)}),
      *_means(found), *_ends(runs),
      Table("accuracy", "Every model", ["run", "method", "model", "in domain", "out of domain", *tasks], rows)])


def _differences(runs: Mapping[str, Results], join: Join) -> Section:
  return Section("differences", "Which differences are real", [
      *differences.of_runs(runs), *join("differences", "Within each run, model less the other; * is real"),
      *join("tests", "The tests within each run")])


def _means(found: Sequence[Group]) -> list[Table]:
  """What came out by group, where a group has several runs."""
  rows = []
  for group in found:
    if of := end(group):
      row: list[Any] = [group.label, of.rounds, of.count]
      for pair in (of.into, of.into_change, of.out, of.out_change):
        row += [pair and pair[0], pair[1] if pair and of.count > 1 else None]
      rows.append(row)
  if all(len(group.runs) == 1 for group in found) or not rows:
    return []
  head = [name for measure in ("in domain", "change in domain", "out of domain", "change out of domain")
          for name in (measure, f"{measure}: s.e.")]
  return [Table("means", "After the last round, means over seeds with their standard errors", ["runs", "rounds", "n",
                                                                                               *head], rows)]


def _ends(runs: Mapping[str, Results]) -> list[Table]:
  rows = []
  for name, run in runs.items():
    models = run.handed_on()
    if models:
      scores = [run.in_domain, *([run.out_of_domain] if run.ood_tasks else [])]
      cells = [cell for score in scores for cell in (
          score(models[-1]),
          f"{score(models[-1]).value - score(models[0]).value:+.3f}" if models[0].kind == "base" else None)]
      rows.append([name, groups.method(run), models[-1].round + 1, *cells, *[None] * (4 - len(cells))])
  return [Table("last_round", "After the last round", [
      "run", "method", "rounds", "in domain", "change in domain", "out of domain", "change out of domain"], rows)]


def _furthest(found: Sequence[Group], rounds: Callable[[Results], Iterable[int]]) -> dict[Path, int]:
  """By folder of a run, the last of the rounds that any run of its group has, -1 for none."""
  return {run.root: max((t for other in group.runs.values() for t in rounds(other)), default=-1)
          for group in found for run in group.runs.values()}


def _sampled(found: Sequence[Group], join: Join) -> Section:
  last = _furthest(found, lambda run: [m.round for m in run.handed_on()])
  curve = lambda run: {k: a for m in run.handed_on() if m.round == last[run.root] >= 0
                       for k, a in page.pass_at_k(m, run.id_task).items()}
  tables = join("pass_at_k", "pass@k and majority vote")
  return Section("sampled", "Several samples a question", [
      page.PASS_AT_K, *_plot("pass_at_k", "pass@k over k", found, {"in domain, after the last round": (
          curve, {"x": "k (samples)", "y": "pass@k", "shares": True, "log2": True})}), *tables] if tables else [])


def _layers(found: Sequence[Group], join: Join) -> Section:
  """By layer of the last round that was analysed of a group."""
  furthest = _furthest(found, lambda run: run.analysis)

  def last(run: Results, *path: str) -> dict[int, float]:
    values = insides.value(run.analysis.get(furthest[run.root]), *path) or []
    return {layer: 100 * share for layer, share in enumerate(shares(values))}

  rank = lambda run: {t: of["spearman"] for t, of in run.analysis.items() if "spearman" in of}
  by_layer = {"x": "layer", "y": "% of all layers"}
  measures = {"importance by layer": (lambda run: last(run, "importance", "layers"), by_layer)} | {
      f"weight change {label}": (lambda run, name=name: last(run, "weight_change", name, "layers"), by_layer)
      for name, label in insides.CHANGES.items()}
  measures["Spearman of importance and change by SFT"] = rank, {
      "x": "round", "y": "rank correlation", "level": 0.0, "span": (-1.05, 1.05)}
  tables = [*join("layers", "Importance and weight change by layer"), *join("modules", "By module, summed over layers"),
            *join("spearman", "Rank correlation of importance and change by SFT")]
  return Section("layers", "Layers", [
      f"{insides.LAYERS} The curves by layer are of the last round.",
      *_plot("layers", "Share of importance and of weight change by layer, and their rank correlation by round", found,
             measures), *tables] if tables else [])


def _diversity(found: Sequence[Group], join: Join) -> Section:
  def by_round(key: str) -> Curve:
    return lambda run: {t: value for t, of in run.analysis.items()
                        if (value := insides.value(of, "diversity", key)) is not None}
  measures = {label: (by_round(key), {"x": "round", "y": label}) for key, label in insides.DIVERSITY.items()}
  tables = join("diversity", "Diversity of each round's samples")
  return Section("diversity", "Diversity of samples", [
      insides.COLLAPSE, *_plot("diversity", f"{', '.join(measures)} of the samples by round", found, measures), *tables,
  ] if tables else [])


def _drift(found: Sequence[Group], join: Join) -> Section:
  """Of the models that runs hand on."""
  by_round = lambda run, where: insides.mean_kl(run, run.handed_on()[-1].kind if run.handed_on() else "", where)
  measures = {f"{where}: KL to the base": (lambda run, where=where: by_round(run, where), insides.DRIFT_AXES)
              for where in insides.WHERE}
  tables = join("drift", "Against the base, nats a token")
  return Section("drift", "Drift from the base", [
      f"{insides.DRIFT} The curves are of the models that the next round starts from.",
      *_plot("drift", "Mean KL to the base, in and out of domain, by round", found, measures), *tables,
  ] if tables else [])


def _data(found: Sequence[Group], join: Join) -> Section:
  kept = lambda run: {row["round"]: count(row, "kept") for row in run.data if "kept" in row}
  right = lambda run: {row["round"]: 100 * count(row, "correct") / drawn for row in run.data
                       if (drawn := count(row, "samples"))}
  return Section("data", "Answers kept and dropped", [
      *_plot("data", "Answers trained on, and the share of right ones among those sampled, by round", found, {
          "answers trained on": (kept, {"x": "round", "y": "answers"}),
          "right answers among those sampled": (right, {"x": "round", "y": "% of the samples"})}),
      *join("data", "Answers by round")])


def _cost(runs: Mapping[str, Results], found: Sequence[Group], join: Join) -> Section:
  if not any(run.stages for run in runs.values()):
    return Section("stages", "Time, tokens and memory", [])
  took = {}
  for group in found:
    most = max(len(run.stages) for run in group.runs.values())
    took[group.label] = [_took(run) for run in group.runs.values() if len(run.stages) == most]
  long = max(sum(of.values()) for of_group in took.values() for of in of_group) > _LONG_S
  parts = {kind: tuple(groups.mean([of[kind] for of in of_group])[0] / (3600 if long else 60)
                       for of_group in took.values()) for kind in (*_KINDS, "other")}
  bars = Bars("hours" if long else "minutes", tuple(took), {kind: of for kind, of in parts.items() if any(of)})
  memory = any(run.memory for run in runs.values())
  rows = []
  for name, run in runs.items():
    tokens = {kind: sum(count(entry["facts"], "tokens") for stage, entry in run.stages.items()
                        if re.fullmatch(rf"round_\d+/{name_}", stage))
              for kind, name_ in (("sampled", r"samples\.jsonl"), ("trained", "sft"))}
    most = [max(run.memory.values(), default=None)] if memory else []
    rows.append([name, page.seconds(run), tokens["sampled"], tokens["trained"], *most, page.devices(run)])
  return Section("stages", "Time, tokens and memory", [
      "A bar is the mean of the runs of one curve that have come furthest." + f" {page.NO_MEMORY}" * (not memory),
      *([Plot("time", "Time of each run by kind of stage; the tables below have the values", figures.bars, (bars,))]
        if bars.parts else []),
      Table("cost", "All stages of each run", ["run", "seconds", "tokens sampled", "tokens trained on",
                                               *["most memory of a device, GiB"] * memory, "devices"], rows),
      *join("stages", "By stage; tokens are those sampled or trained on")])


def _took(run: Results) -> dict[str, float]:
  """Seconds of a run's stages, by their kind."""
  found = dict.fromkeys((*_KINDS, "other"), 0.0)
  for stage, entry in run.stages.items():
    what = f"{stage}/".split("/")[1]  # of round_0/eval/sft it is eval
    found[next((kind for kind, stages in _KINDS.items() if what in stages), "other")] += page.seconds_of(entry)
  return found
