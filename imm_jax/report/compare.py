"""The page of several runs side by side."""

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from imm_jax import files
from imm_jax.evaluation import Accuracy
from imm_jax.report import figures, markup, page, writer
from imm_jax.report.figures import Panel
from imm_jax.report.markup import Plot, Section, Table
from imm_jax.report.results import Model, Results, count


def write(runs: Sequence[Results], out: Path, *, extra: Callable[[Mapping[str, Results]], list[Section]] | None = None,
          ) -> None:
  """Writes index.html, figures and tables of the runs into a folder, which is replaced.

  Args:
    runs: two or more.
    out: the folder.
    extra: makes further sections of the runs, by name.
  """
  named = dict(zip(names([run.root for run in runs]), runs, strict=True))
  parts = [*sections(named), *(extra(named) if extra else [])]
  drawn = writer.Plots().svg(parts)
  problems = "".join(f"<li>{html.escape(f'{name}: {p}')}</li>" for name, run in named.items() for p in run.problems)
  top = [f"<h1>{len(runs)} runs</h1>", f'<p class="sentence">{html.escape(_sentence(named))}</p>']
  if problems:
    top.append(f'<div class="problems" role="note"><strong>Missing or left out</strong><ul>{problems}</ul></div>')
  text = markup.page(f"{len(runs)} runs", "".join(top), [markup.section(part, drawn) for part in parts],
                     [(part.id, part.title) for part in parts])
  with files.committed(out) as folder:
    writer.write(folder, text, parts)


def names(roots: Sequence[Path]) -> list[str]:
  """The shortest ends of the paths that tell them apart.

  >>> names([Path("/a/x/run"), Path("/a/y/run")]), names([Path("/a/imm"), Path("/a/star")])
  (['x/run', 'y/run'], ['imm', 'star'])
  """
  full = [root.resolve().parts for root in roots]
  for length in range(1, max(map(len, full)) + 1):
    found = ["/".join(parts[-length:]) for parts in full]
    if len(set(found)) == len(found):
      return found
  return [f"{name} ({i})" for i, name in enumerate(found, 1)]


def sections(runs: Mapping[str, Results]) -> list[Section]:
  """What stands on the page of these runs."""
  found = [_accuracy(runs), _sampled(runs), _by_round(runs), _cost(runs), _settings(runs)]
  return [part for part in found if part.parts]


def _sentence(runs: Mapping[str, Results]) -> str:
  ends = {name: run.handed_on() for name, run in runs.items()}
  changes = [(name, run.in_domain(ends[name][-1]).value, _change(run.out_of_domain, ends[name]))
             for name, run in runs.items() if len(ends[name]) > 1 and ends[name][0].kind == "base" and run.ood_tasks]
  if not changes:
    return "No run has finished a round with scores in and out of domain yet."
  best, kept = max(changes, key=lambda c: c[1]), max(changes, key=lambda c: c[2])
  return (f"After its last round {best[0]} is highest in domain ({best[1]:.3f}; out of domain {best[2]:+.3f} against "
          f"its base); {kept[0]} keeps most out of domain ({kept[2]:+.3f}; in domain {kept[1]:.3f}).")


def _change(score: Callable[[Model], Accuracy], models: Sequence[Model]) -> float:
  return score(models[-1]).value - score(models[0]).value


def _label(run: Results) -> str:
  """The method, and the intervention in SFT where there is one."""
  return run.method if _intervention(run) == "none" else f"{run.method}, {_intervention(run)}"


def _intervention(run: Results) -> str:
  sft = run.config.get("sft")
  return str(sft.get("intervention", "none")) if isinstance(sft, dict) else "none"


def _styles(runs: Mapping[str, Results]) -> dict[str, tuple[str, tuple[str, str], str]]:
  """What a run is called in a legend, its colour and marker (its method's), and its line."""
  seen: dict[str, int] = {}
  styles = {}
  for name, run in runs.items():
    i = seen[run.method] = seen.get(run.method, -1) + 1
    label = _label(run)
    told = label in name or run.method in name
    style = figures.method_style(run.method, _intervention(run))
    styles[name] = name if told else f"{name} ({label})", style, figures.dash(i)
  return styles


def _accuracy(runs: Mapping[str, Results]) -> Section:
  styles, panels = _styles(runs), []
  for where, score in (("in domain", Results.in_domain), ("out of domain", Results.out_of_domain)):
    lines = []
    for name, run in runs.items():
      models = run.handed_on() if where == "in domain" or run.ood_tasks else ()
      if models:
        label, style, dash = styles[name]
        lines.append(figures.scores(label, style, [m.round + 1 for m in models], [score(run, m) for m in models], dash))
    if lines:
      panels.append(Panel(where, "rounds done", "accuracy", tuple(lines), shares=True))
  tasks = list(dict.fromkeys(task for run in runs.values() for task in (run.id_task, *run.ood_tasks)))
  rows = [[name, _label(run), m.label, run.in_domain(m), run.out_of_domain(m) if run.ood_tasks else None,
           *(m.scores.get(task) for task in tasks)] for name, run in runs.items() for m in run.models]
  if not rows:
    return Section("accuracy", "Accuracy by round", [])
  different = len({(run.id_task, run.ood_tasks) for run in runs.values()}) > 1
  warning = ["The runs differ in their tasks, so their curves are of different questions."] if different else []
  return Section("accuracy", "Accuracy by round", [
      "Of each round the model that the next one starts from (merged, or tuned where nothing is merged); 95 % "
      "intervals (Wilson). Runs of one method have one colour.", *warning,
      Plot("accuracy", "Accuracy in and out of domain by round of every run; the tables below have the values",
           figures.draw, tuple(panels)),
      _ends(runs), Table("accuracy", "Every model", ["run", "method", "model", "in domain", "out of domain", *tasks],
                         rows)])


def _ends(runs: Mapping[str, Results]) -> Table:
  rows = []
  for name, run in runs.items():
    models = run.handed_on()
    if not models:
      continue
    last, scores = models[-1], [run.in_domain, *([run.out_of_domain] if run.ood_tasks else [])]
    cells: list[Any] = []
    for score in scores:
      cells += [score(last), f"{_change(score, models):+.3f}" if models[0].kind == "base" else None]
    rows.append([name, _label(run), last.round + 1, *cells, *[None] * (4 - len(cells))])
  return Table("last_round", "After the last round", [
      "run", "method", "rounds", "in domain", "change in domain", "out of domain", "change out of domain"], rows)


def _sampled(runs: Mapping[str, Results]) -> Section:
  styles, lines, rows = _styles(runs), [], []
  for name, run in runs.items():
    for m in run.handed_on()[-1:]:
      curve = {int(k[5:]): a for k, a in m.sampled.get(run.id_task, {}).items() if k.startswith("pass@")}
      if curve:
        label, style, dash = styles[name]
        lines.append(figures.scores(label, style, list(curve), list(curve.values()), dash))
        rows += [[name, m.label, run.id_task, k, a] for k, a in curve.items()]
  panel = Panel("in domain, after the last round", "k (samples)", "pass@k", tuple(lines), log2=True, shares=True)
  return Section("sampled", "Several samples a question", [
      Plot("pass_at_k", "pass@k over k of every run; the table below has the values", figures.draw, (panel,)),
      Table("pass_at_k", "pass@k in domain", ["run", "model", "task", "k", "pass@k"], rows)] if rows else [])


def _by_round(runs: Mapping[str, Results]) -> Section:
  """What analysis.json and the training data say by round."""
  measures: dict[str, Callable[[Results], dict[int, Any]]] = {
      "answers trained on": lambda r: {row["round"]: count(row, "kept") for row in r.data if "kept" in row},
      "distinct answers a question": lambda r: {t: a["diversity"]["distinct_answers"] for t, a in r.analysis.items()
                                                if "diversity" in a},
      "Spearman of importance and weight change": lambda r: {t: a["spearman"] for t, a in r.analysis.items()
                                                             if "spearman" in a}}
  styles, panels, values = _styles(runs), [], {}
  for title, measure in measures.items():
    values[title] = {name: found for name, run in runs.items() if (found := measure(run))}
    lines = []
    for name, found in values[title].items():
      label, style, dash = styles[name]
      lines.append(figures.over_rounds(found, label, style, dash))
    if lines:
      panels.append(Panel(title, "round", title.partition(" ")[0], tuple(lines)))
  known = [title for title in measures if values[title]]
  rows = [[name, t, *(values[title].get(name, {}).get(t) for title in known)] for name, run in runs.items()
          for t in sorted({t for title in known for t in values[title].get(name, {})})]
  return Section("rounds", "Samples and layers by round", [
      Plot("rounds", f"{', '.join(known)} by round of every run; the table below has the values", figures.draw,
           tuple(panels)), Table("rounds", "By round", ["run", "round", *known], rows)] if rows else [])


def _cost(runs: Mapping[str, Results]) -> Section:
  rows = []
  for name, run in runs.items():
    tokens = {kind: sum(count(entry["facts"], "tokens") for stage, entry in run.stages.items() if stage.endswith(end))
              for kind, end in (("sampled", "/samples.jsonl"), ("trained", "/sft"))}
    rows.append([name, page.seconds(run), tokens["sampled"], tokens["trained"], max(run.memory.values(), default=None),
                 page.devices(run), str(_versions(run).get("imm_jax", "unknown"))])
  return Section("cost", "Time, tokens and memory", [Table(
      "cost", "All stages of each run", ["run", "seconds", "tokens sampled", "tokens trained on", "memory, GiB",
                                         "devices", "imm_jax"], rows)])


def _versions(run: Results) -> dict[str, Any]:
  return found if isinstance(found := run.facts.get("versions"), dict) else {}


def _settings(runs: Mapping[str, Results]) -> Section:
  """Settings in which the runs differ."""
  flat = {name: dict(_flat(run.config)) for name, run in runs.items()}
  keys = sorted({key for config in flat.values() for key in config})
  rows = [[key, *(str(config.get(key, "")) for config in flat.values())] for key in keys
          if len({repr(config.get(key)) for config in flat.values()}) > 1]
  return Section("settings", "Settings that differ", [Table("settings", "Settings", ["key", *runs], rows)]
                 if rows else ["The runs have the same settings."])


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
  found = []
  for key, value in config.items():
    found += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
  return found
