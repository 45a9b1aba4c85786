"""Writes the results of an analysis: analysis.json, layers.csv and figures; formats a table for the terminal."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from imm_jax import files
from imm_jax.analysis import shares
from imm_jax.analysis.weight_change import spearman
from imm_jax.model.config import PROJECTIONS
from imm_jax.report import analysis_figures as figures, writer
from imm_jax.report.figures import shorten

Results = dict[str, Any]
# Table 1 and appendix B.9 of the paper mention early, middle and late layers; the division into thirds is ours.
_THIRDS = ("early", "middle", "late")
FILE, TABLE = "analysis.json", "layers.csv"


def combine(importance: Mapping[str, Results], change: Mapping[str, Results]) -> Results:
  """Combines importance by task and weight change by model with Spearman's rank correlation of every pair."""
  pairs = {task: {name: spearman(scores["layers"], moved["layers"]) for name, moved in change.items()}
           for task, scores in importance.items()}
  return {"importance": dict(importance), "weight_change": dict(change), "spearman": pairs if change else {}}


def write(folder: Path, results: Results) -> None:
  """Writes all files into a new folder; `results` are those of `combine` with any additions for analysis.json."""
  folder.mkdir()
  files.write_json(folder / FILE, results, allow_nan=False)
  with (folder / TABLE).open("w", newline="", encoding="utf-8") as f:
    rows = csv.writer(f)
    rows.writerow(["measure", "order", "of", "layer", "value", "share", *PROJECTIONS])
    for measure, name, values in _iterate_measures(results):
      for layer, (value, share) in enumerate(zip(values["layers"], shares(values["layers"]), strict=True)):
        modules = [values["modules"][module][layer] for module in PROJECTIONS]
        rows.writerow([measure, values.get("order"), name, layer, value, share, *modules])
  write_figures(folder, results)


def write_figures(folder: Path, results: Results) -> None:
  """Writes the figures of the available measures."""
  if results["importance"]:
    writer.save(figures.plot_importance(results["importance"]), folder, "importance")
  if results["weight_change"]:
    writer.save(figures.plot_weight_change(results["weight_change"]), folder, "weight_change")


def format_table(results: Results) -> str:
  """Formats a table with a line for each layer and a column for each measure with the layer's share of it, followed by
  sums over modules and over early, middle and late layers, and the correlations."""
  columns = list(_iterate_measures(results))
  preposition = {"importance": "importance on", "weight_change": "change to"}
  rows = [["", *(f"{preposition[measure]} {shorten(name)}" for measure, name, _ in columns)]]
  layers = [list(zip(values["layers"], shares(values["layers"]), strict=True)) for *_, values in columns]
  for layer, cells in enumerate(zip(*layers, strict=True)):
    rows.append([f"layer {layer}", *(f"{value:.4g} ({share:.1%})" for value, share in cells)])
  for module in PROJECTIONS:
    sums = [(sum(values["modules"][module]), sum(values["layers"])) for *_, values in columns]
    rows.append([module, *(f"{part:.4g} ({part / whole if whole else 0:.1%})" for part, whole in sums)])
  parts = np.array_split(np.arange(min(map(len, layers), default=0)), len(_THIRDS))
  for name, part in zip(_THIRDS, parts, strict=True):
    if len(part):
      sums = [(sum(values["layers"][layer] for layer in part), sum(values["layers"])) for *_, values in columns]
      rows.append([f"{name} ({part[0]} to {part[-1]})", *(
          f"{value:.4g} ({value / whole if whole else 0:.1%})" for value, whole in sums)])
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
  for task, values in results["importance"].items():
    dropped = f"; {values['dropped_long']} more do not fit in a row" if values["dropped_long"] else ""
    lines.append(f"importance on {shorten(task)}: order {values['order']}, {values['examples']} examples{dropped}")
  for task, pairs in results["spearman"].items():
    lines += [f"Spearman, importance on {shorten(task)} and change to {shorten(name)}: "
              + ("not defined" if rank is None else f"{rank:.3f}") for name, rank in pairs.items()]
  return "\n".join(lines)


def explain_foreign(folder: Path) -> str:
  """Returns the reason why a folder is not an earlier output, or "" if it is."""
  figures = {f"{measure}.{kind}" for measure in ("importance", "weight_change") for kind in ("png", "svg")}
  if not (folder / FILE).is_file() or not (folder / TABLE).is_file():
    return f"is no earlier result (it has no {FILE} and {TABLE})"
  others = sorted({path.name for path in folder.iterdir()} - figures - {FILE, TABLE})
  return f"is no earlier result (it holds {others[0]})" if others else ""


def _iterate_measures(results: Results) -> Iterator[tuple[str, str, Results]]:
  for measure in ("importance", "weight_change"):
    for name, scores in results[measure].items():
      yield measure, name, scores
