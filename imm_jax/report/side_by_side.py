"""Makes the plots and tables of several runs; runs that differ only in their seed share a curve, their mean."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imm_jax.analysis import shares
from imm_jax.report import figures, groups, page
from imm_jax.report.figures import Bars, Panel
from imm_jax.report.groups import Group
from imm_jax.report.markup import Plot, Section, Table
from imm_jax.report.results import Results
from imm_jax.report.sections import differences, front, insides
from imm_jax.statistics.accuracy import Accuracy

# (name, caption) -> the runs' tables of that name, joined
Join = Callable[[str, str], list[Table]]
MeasureByRound = Callable[[Results], Mapping[int, Accuracy | float]]
# Times above this many seconds are given in hours.
_LONG_S = 3 * 3600
# Kind of stage -> stages of a round.
_STAGE_KINDS = {"sampling": ("samples.jsonl",), "SFT": ("sft",), "merging": ("sweep", "base_weight.json", "merged"),
                "evaluation": ("eval",), "importance and analysis": ("importance.json", "analysis.json", "drift.json")}


def make_sections(runs: Mapping[str, Results], join: Join) -> list[Section]:
  """Makes the sections of these runs; a section without parts has nothing to show."""
  grouped = groups.group_runs(runs)
  return [_accuracy_section(runs, grouped), front.runs_section(runs, grouped), _differences_section(runs, join),
          _sampled_section(grouped, join), _layers_section(grouped, join), _diversity_section(grouped, join),
          _drift_section(grouped, join), _data_section(grouped, join), _cost_section(runs, grouped, join)]


class GroupSummary(NamedTuple):
  """Holds the results of a group after its last round: means and standard errors over the runs that have finished it.

  Attributes:
    rounds: number of finished rounds.
    count: number of runs that have finished them and have scores of their base.
    in_domain: accuracy in domain.
    in_domain_change: its change from the base.
    out_of_domain: accuracy out of domain; None without such tasks.
    out_of_domain_change: its change from the base.
  """

  rounds: int
  count: int
  in_domain: tuple[float, float]
  in_domain_change: tuple[float, float]
  out_of_domain: tuple[float, float] | None
  out_of_domain_change: tuple[float, float] | None


def summarize_end(group: Group) -> GroupSummary | None:
  """Summarizes a group's results after its last round; None if no run has finished a round."""
  ends = [(run, models[0], models[-1]) for run in group.runs.values()
          if len(models := run.list_round_results()) > 1 and models[0].kind == "base"]
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
    means += [groups.mean_and_error([last for last, _ in values]),
              groups.mean_and_error([last - first for last, first in values])]
  return GroupSummary(furthest + 1, len(ends), *means)


def _make_plot(name: str, caption: str, grouped: Sequence[Group],
               measures: Mapping[str, tuple[MeasureByRound, dict[str, Any]]],
          ) -> list[Plot]:
  """Makes a plot with a panel for each measure (title -> curve, options) that any group has; empty without any."""
  panels = []
  for title, (measure, options) in measures.items():
    lines = tuple(line for group in grouped if (line := groups.make_curve(group, measure)))
    if lines:
      highest = max(max(line.high or line.y) for line in lines)
      span = None if options.get("shares") else (0, 1.1 * highest or 1)
      panels.append(Panel(title=title, lines=lines, named=True, **{"span": span} | options))
  return [Plot(name, f"{caption} of every run; the tables below have the values", figures.draw, tuple(panels))] * bool(
      panels)


def _accuracy_section(runs: Mapping[str, Results], grouped: Sequence[Group]) -> Section:
  tasks = list(dict.fromkeys(task for run in runs.values() for task in (run.id_task, *run.ood_tasks)))
  rows = [[name, groups.method_label(run), m.label, run.in_domain(m), run.out_of_domain(m) if run.ood_tasks else None,
           *(m.scores.get(task) for task in tasks)] for name, run in runs.items() for m in run.models]
  if not rows:
    return Section("accuracy", "Accuracy by round", [])
  in_domain = lambda run: {m.round + 1: run.in_domain(m) for m in run.list_round_results()}
  out_of_domain = lambda run: {m.round + 1: run.out_of_domain(m)
                               for m in run.list_round_results()} if run.ood_tasks else {}
  options = {"x": "rounds done", "y": "accuracy", "shares": True}
  several = any(len(group.runs) > 1 for group in grouped)
  notes = ["Each point is the model handed to the next round (merged, or tuned if nothing is merged), with 95 % "
           "intervals (Wilson). Each method has its color.",
           *(["Runs that differ only in their seed are one curve, their mean with its standard error (means over the "
              "runs that reached the round)."] * several),
           *(["The runs differ in their tasks, so their curves are over different questions."]
             * (len({(run.id_task, run.ood_tasks) for run in runs.values()}) > 1))]
  return Section("accuracy", "Accuracy by round", [
      " ".join(notes),
      *_make_plot("accuracy", "Accuracy in and out of domain by round", grouped,
                  {"in domain": (in_domain, options), "out of domain": (out_of_domain, options)}),
      *_means_table(grouped), *_last_round_table(runs),
      Table("accuracy", "Every model", ["run", "method", "model", "in domain", "out of domain", *tasks], rows)])


def _differences_section(runs: Mapping[str, Results], join: Join) -> Section:
  return Section("differences", "Which differences are significant", [
      *differences.compare_runs(runs),
      *join("differences", "Within each run, model less the other; * is significant at 5 %"),
      *join("tests", "The tests within each run")])


def _means_table(grouped: Sequence[Group]) -> list[Table]:
  """Makes a table of results by group, if a group has several runs."""
  rows = []
  for group in grouped:
    if summary := summarize_end(group):
      row: list[Any] = [group.label, summary.rounds, summary.count]
      for pair in (summary.in_domain, summary.in_domain_change, summary.out_of_domain, summary.out_of_domain_change):
        row += [pair and pair[0], pair[1] if pair and summary.count > 1 else None]
      rows.append(row)
  if all(len(group.runs) == 1 for group in grouped) or not rows:
    return []
  head = [name for measure in ("in domain", "change in domain", "out of domain", "change out of domain")
          for name in (measure, f"{measure}: s.e.")]
  return [Table("means", "After the last round, means over seeds with their standard errors", ["runs", "rounds", "n",
                                                                                               *head], rows)]


def _last_round_table(runs: Mapping[str, Results]) -> list[Table]:
  rows = []
  for name, run in runs.items():
    models = run.list_round_results()
    if models:
      scores = [run.in_domain, *([run.out_of_domain] if run.ood_tasks else [])]
      cells = [cell for score in scores for cell in (
          score(models[-1]),
          f"{score(models[-1]).value - score(models[0]).value:+.3f}" if models[0].kind == "base" else None)]
      rows.append([name, groups.method_label(run), models[-1].round + 1, *cells, *[None] * (4 - len(cells))])
  return [Table("last_round", "After the last round", [
      "run", "method", "rounds", "in domain", "change in domain", "out of domain", "change out of domain"], rows)]


def _last_rounds(grouped: Sequence[Group], rounds: Callable[[Results], Iterable[int]]) -> dict[Path, int]:
  """Returns folder of a run -> last round that any run of its group has, -1 for none."""
  return {run.root: max((t for other in group.runs.values() for t in rounds(other)), default=-1)
          for group in grouped for run in group.runs.values()}


def _sampled_section(grouped: Sequence[Group], join: Join) -> Section:
  last = _last_rounds(grouped, lambda run: [m.round for m in run.list_round_results()])
  curve = lambda run: {k: a for m in run.list_round_results() if m.round == last[run.root] >= 0
                       for k, a in page.get_pass_at_k(m, run.id_task).items()}
  tables = join("pass_at_k", "pass@k and majority vote")
  return Section("sampled", "Several samples a question", [
      page.PASS_AT_K, *_make_plot("pass_at_k", "pass@k over k", grouped, {"in domain, after the last round": (
          curve, {"x": "k (samples)", "y": "pass@k", "shares": True, "log2": True})}), *tables] if tables else [])


def _layers_section(grouped: Sequence[Group], join: Join) -> Section:
  """Makes the section on layers, with curves of the last analyzed round of each group."""
  furthest = _last_rounds(grouped, lambda run: run.analysis)

  def last(run: Results, *path: str) -> dict[int, float]:
    values = insides.get_nested(run.analysis.get(furthest[run.root]), *path) or []
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
      *_make_plot("layers", "Share of importance and of weight change by layer, and their rank correlation by round",
                  grouped, measures), *tables] if tables else [])


def _diversity_section(grouped: Sequence[Group], join: Join) -> Section:
  def by_round(key: str) -> MeasureByRound:
    return lambda run: {t: value for t, of in run.analysis.items()
                        if (value := insides.get_nested(of, "diversity", key)) is not None}
  measures = {label: (by_round(key), {"x": "round", "y": label}) for key, label in insides.DIVERSITY.items()}
  tables = join("diversity", "Diversity of each round's samples")
  return Section("diversity", "Diversity of samples", [
      insides.COLLAPSE, *_make_plot("diversity", f"{', '.join(measures)} of the samples by round", grouped, measures),
      *tables] if tables else [])


def _drift_section(grouped: Sequence[Group], join: Join) -> Section:
  """Makes the section on drift, with curves of the models that runs hand on."""
  last_kind = lambda run: models[-1].kind if (models := run.list_round_results()) else ""
  by_round = lambda run, where: insides.mean_kl(run, last_kind(run), where)
  measures = {f"{where}: KL to the base": (lambda run, where=where: by_round(run, where), insides.DRIFT_AXES)
              for where in insides.WHERE}
  tables = join("drift", "Against the base, nats a token")
  return Section("drift", "Drift from the base", [
      f"{insides.DRIFT} The curves are of the models that the next round starts from.",
      *_make_plot("drift", "Mean KL to the base, in and out of domain, by round", grouped, measures), *tables,
  ] if tables else [])


def _data_section(grouped: Sequence[Group], join: Join) -> Section:
  kept = lambda run: {row["round"]: row["kept"] for row in run.data if "kept" in row}
  right = lambda run: {row["round"]: 100 * row["correct"] / drawn for row in run.data
                       if (drawn := row.get("samples"))}
  return Section("data", "Answers kept and dropped", [
      *_make_plot("data", "Answers trained on, and the share of right ones among those sampled, by round", grouped, {
          "answers trained on": (kept, {"x": "round", "y": "answers"}),
          "right answers among those sampled": (right, {"x": "round", "y": "% of the samples"})}),
      *join("data", "Answers by round")])


def _cost_section(runs: Mapping[str, Results], grouped: Sequence[Group], join: Join) -> Section:
  if not any(run.stages for run in runs.values()):
    return Section("stages", "Time, tokens and memory", [])
  seconds_by_group = {}
  for group in grouped:
    most = max(len(run.stages) for run in group.runs.values())
    seconds_by_group[group.label] = [_seconds_by_kind(run) for run in group.runs.values() if len(run.stages) == most]
  in_hours = max(sum(of.values()) for of_group in seconds_by_group.values() for of in of_group) > _LONG_S
  parts = {kind: tuple(groups.mean_and_error([of[kind] for of in of_group])[0] / (3600 if in_hours else 60)
                       for of_group in seconds_by_group.values()) for kind in (*_STAGE_KINDS, "other")}
  nonzero = {kind: values for kind, values in parts.items() if any(values)}
  bars = Bars("hours" if in_hours else "minutes", tuple(seconds_by_group), nonzero)
  memory = any(run.memory for run in runs.values())
  rows = []
  for name, run in runs.items():
    tokens = {kind: sum(entry["facts"].get("tokens") or 0 for stage, entry in run.stages.items()
                        if re.fullmatch(rf"round_\d+/{name_}", stage))
              for kind, name_ in (("sampled", r"samples\.jsonl"), ("trained", "sft"))}
    most = [max(run.memory.values(), default=None)] if memory else []
    rows.append([name, page.total_seconds(run), tokens["sampled"], tokens["trained"], *most,
                 page.describe_devices(run)])
  return Section("stages", "Time, tokens and memory", [
      "Bars are means over the runs of a curve that finished the most stages." + f" {page.NO_MEMORY}" * (not memory),
      *([Plot("time", "Time of each run by kind of stage; the tables below have the values", figures.draw_bars,
              (bars,))] if bars.parts else []),
      Table("cost", "All stages of each run", ["run", "seconds", "tokens sampled", "tokens trained on",
                                               *["peak memory of a device, GiB"] * memory, "devices"], rows),
      *join("stages", "By stage; tokens are those sampled or trained on")])


def _seconds_by_kind(run: Results) -> dict[str, float]:
  """Sums the seconds of a run's stages by kind."""
  seconds = dict.fromkeys((*_STAGE_KINDS, "other"), 0.0)
  for stage, entry in run.stages.items():
    name = f"{stage}/".split("/")[1]  # `eval` for round_0/eval/sft
    kind = next((kind for kind, stages in _STAGE_KINDS.items() if name in stages), "other")
    seconds[kind] += entry.get("seconds", 0)
  return seconds
