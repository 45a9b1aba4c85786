"""Makes the sections on analysis.json and drift.json: layer importance and weight change, diversity, and drift."""

from collections.abc import Mapping, Sequence
from typing import Any

from imm_jax.analysis import shares
from imm_jax.report import figures
from imm_jax.report.figures import MODELS, Curve, Panel
from imm_jax.report.markup import Plot, Section, Table
from imm_jax.report.results import Results

# Names in analysis.json of weight changes and of measures of diversity -> their labels.
CHANGES = {"sft": "by SFT", "merged": "from base to merged"}
DIVERSITY = {"distinct_answers": "distinct answers a question", "distinct_4grams": "share of distinct 4-grams",
             "token_entropy": "token entropy, nats"}
LAYERS = ("Importance is the sum of |gradient x weight| over a layer's matrices (eq. 3), weight change the sum of "
          "their Frobenius norms (eq. 4); each as a share of all layers. A negative correlation means that what moves "
          "most matters least.")
DRIFT = ("KL is that from the base to the model, over the whole vocabulary, on the tokens of worked answers to test "
         "questions, or of passages; loss is that of these tokens, entropy that of the next token's distribution, in "
         "nats a token. In domain the KL is said to predict forgetting (RL's Razor, arXiv 2509.04259); on other tasks "
         "it is our measure. Out of domain is the mean over the tasks, each counted once.")
WHERE = ("in domain", "out of domain")
DRIFT_AXES = {"x": "rounds done", "y": "KL, nats a token"}
# Maximum number of curves in a panel by layer.
_MAX_CURVES = 8
COLLAPSE = "Fewer distinct answers to a question from round to round are a sign of collapse."


def layers_section(results: Results) -> Section:
  """Makes the section on importance and weight change by layer, and their correlation by round."""
  importance = _analysis_part(results, "importance")
  weight_changes = _analysis_part(results, "weight_change")
  changes = {name: {t: by_name[name] for t, by_name in weight_changes.items() if name in by_name}
             for name in CHANGES}
  spearman = _analysis_part(results, "spearman")
  panels = []
  if importance:
    panels.append(_layer_panel("importance by layer",
                               {t: shares(scores["layers"]) for t, scores in importance.items()}))
  panels += [_layer_panel(f"weight change {label}", {t: change["share"] for t, change in changes[name].items()})
             for name, label in CHANGES.items() if changes[name]]
  if spearman:
    panels.append(Panel("Spearman of importance and change by SFT", "round", "rank correlation", (
        figures.round_line(spearman, "layers", figures.get_series_style(0)),), level=0.0, span=(-1.05, 1.05)))
  if not panels:
    return Section("layers", "Layers", [])
  return Section("layers", "Layers", [
      LAYERS,
      Plot("layers", "Share of importance and of weight change by layer, a curve each round, and their rank "
           "correlation by round; the tables below have the values", figures.draw, tuple(panels)),
      *_make_tables(results, importance, changes, spearman)])


def diversity_section(results: Results) -> Section:
  """Makes the section on distinct answers, distinct 4-grams and token entropy of the samples by round."""
  diversity = _analysis_part(results, "diversity")
  if not diversity:
    return Section("diversity", "Diversity of samples", [])
  panels = []
  for key, label in DIVERSITY.items():
    values = {t: d[key] for t, d in diversity.items() if d.get(key) is not None}
    if values:
      panels.append(Panel(label, "round", label, (figures.round_line(values, "samples", figures.get_series_style(0)),),
                          span=(0, 1.15 * max(values.values()) or 1)))
  rows = [[t, d.get("questions"), d.get("samples"), *(d.get(key) for key in DIVERSITY)] for t, d in diversity.items()]
  return Section("diversity", "Diversity of samples", [
      COLLAPSE,
      Plot("diversity", f"{', '.join(DIVERSITY.values())} of the samples by round; the table below has the values",
           figures.draw, tuple(panels)),
      Table("diversity", "Diversity of each round's samples", ["round", "questions", "samples", *DIVERSITY.values()],
            rows)])


def drift_section(results: Results) -> Section:
  """Makes the section on the drift of each round's models from the base, by task."""
  panels = []
  for where in WHERE:
    lines = tuple(figures.round_line(values, label, (color, marker))
                  for kind, (color, marker, label) in MODELS.items() if (values := mean_kl(results, kind, where)))
    if lines:
      highest = max(max(line.y) for line in lines)
      panels.append(Panel(where, lines=lines, span=(0, 1.1 * highest or 1), **DRIFT_AXES))
  rows = [[t, kind, text, base["tokens"], entry[text]["kl"], entry[text]["loss"], base["loss"], entry[text]["entropy"],
           base["entropy"]] for t, measured in results.drift.items() for kind, entry in measured["models"].items()
          for text, base in measured["texts"].items()]
  return Section("drift", "Drift from the base", [
      DRIFT,
      *([Plot("drift", "Mean KL to the base, in and out of domain, by round; the table below has the values",
              figures.draw, tuple(panels))] if panels else []),
      Table("drift", "Against the base, nats a token", ["round", "model", "text", "tokens", "KL", "loss", "base's loss",
                                                        "entropy", "base's entropy"], rows)] if rows else [])


def mean_kl(results: Results, kind: str, where: str) -> dict[int, float]:
  """Returns rounds done -> KL of a kind of model in domain, or its mean over the tasks out of domain that have one."""
  tasks, means = {"in domain": (results.id_task,), "out of domain": results.ood_tasks}[where], {}
  for t, measured in results.drift.items():
    values = [entry["kl"] for task, entry in measured["models"].get(kind, {}).items() if task in tasks]
    if values:
      means[t + 1] = sum(values) / len(values)
  return means


def get_nested(nested: Any, *path: str) -> Any:
  """Returns the value of nested mappings at a path of keys; None if one is missing.

  >>> get_nested({"diversity": {"token_entropy": 0.5}}, "diversity", "token_entropy"), get_nested({}, "importance")
  (0.5, None)
  """
  for key in path:
    nested = nested.get(key) if isinstance(nested, Mapping) else None
  return nested


def _analysis_part(results: Results, name: str) -> dict[int, Any]:
  return {t: analysis[name] for t, analysis in results.analysis.items() if name in analysis}


def _layer_panel(title: str, values: Mapping[int, Sequence[float]]) -> Panel:
  """Makes a panel with a curve for each round, or evenly spaced rounds if there are many."""
  rounds = list(values)
  if len(rounds) > _MAX_CURVES:
    rounds = [rounds[round(i * (len(rounds) - 1) / (_MAX_CURVES - 1))] for i in range(_MAX_CURVES)]
  lines = tuple(Curve(f"round {t}", *figures.get_series_style(i), "-", tuple(range(len(values[t]))),
                      tuple(100 * v for v in values[t])) for i, t in enumerate(rounds))
  highest = max(max(line.y) for line in lines)
  return Panel(title, "layer", "% of all layers", lines, span=(0, 1.1 * highest or 1))


def _make_tables(results: Results, importance: Mapping[int, Any], changes: Mapping[str, Mapping[int, Any]],
                 spearman: Mapping[int, float]) -> list[Table]:
  measures = {"importance": importance}
  measures |= {f"weight change {CHANGES[name]}": values for name, values in changes.items()}
  measures = {name: values for name, values in measures.items() if values}
  by_layer, by_module = [], []
  for t in results.analysis:
    measured = {name: values[t] for name, values in measures.items() if t in values}
    count = max((len(entry["layers"]) for entry in measured.values()), default=0)
    for layer in range(count):
      cells = [(measured[name]["layers"][layer], shares(measured[name]["layers"])[layer])
               if name in measured and layer < len(measured[name]["layers"]) else (None, None) for name in measures]
      by_layer.append([t, layer, *(value for pair in cells for value in pair)])
    modules = {name: entry.get("modules", {}) for name, entry in measured.items()}
    by_module += [[t, module, *(sum(modules[name][module]) if module in modules.get(name, {}) else None
                                for name in measures)]
                  for module in dict.fromkeys(module for entry in modules.values() for module in entry)]
  head = [part for name in measures for part in (name, "share")]
  tables = [Table("layers", "Importance and weight change by layer", ["round", "layer", *head], by_layer)]
  if by_module:
    tables.append(Table("modules", "By module, summed over layers", ["round", "module", *measures], by_module))
  if spearman:
    tables.append(Table("spearman", "Rank correlation of importance and change by SFT",
                        ["round", "Spearman"], [[t, value] for t, value in spearman.items()]))
  return tables
