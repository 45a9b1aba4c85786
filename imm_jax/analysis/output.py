"""What an analysis leaves behind: analysis.json, layers.csv, figures, and a table for the terminal."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from imm_jax.analysis import MODULES, shares
from imm_jax.analysis.weight_change import spearman
from imm_jax.report import layers as figures, writer
from imm_jax.report.figures import short

Found = dict[str, Any]
# Table 1 and appendix B.9 of the paper speak of early, middle and late layers; thirds are ours.
_THIRDS = ("early", "middle", "late")
FILE, TABLE = "analysis.json", "layers.csv"


def together(importance: Mapping[str, Found], change: Mapping[str, Found]) -> Found:
  """Importance by task and weight change by model, with Spearman's rank correlation between each two of them."""
  pairs = {task: {name: spearman(scores["layers"], moved["layers"]) for name, moved in change.items()}
           for task, scores in importance.items()}
  return {"importance": dict(importance), "weight_change": dict(change), "spearman": pairs if change else {}}


def write(folder: Path, found: Found) -> None:
  """Writes all files into a new folder; `found` is what `together` gives, and what else analysis.json is to hold."""
  folder.mkdir()
  (folder / FILE).write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
  with (folder / TABLE).open("w", newline="", encoding="utf-8") as f:
    rows = csv.writer(f)
    rows.writerow(["measure", "order", "of", "layer", "value", "share", *MODULES])
    for measure, name, of in _measures(found):
      for layer, (value, share) in enumerate(zip(of["layers"], shares(of["layers"]), strict=True)):
        modules = [of["modules"][module][layer] for module in MODULES]
        rows.writerow([measure, of.get("order"), name, layer, value, share, *modules])
  draw(folder, found)


def draw(folder: Path, found: Found) -> None:
  """Writes the figures of what there is."""
  if found["importance"]:
    writer.save(figures.importance(found["importance"]), folder, "importance")
  if found["weight_change"]:
    writer.save(figures.weight_change(found["weight_change"]), folder, "weight_change")


def table(found: Found) -> str:
  """A line a layer, a column a measure with each layer's share of it; then sums of modules, of early, middle and late
  layers, and the correlations."""
  columns = list(_measures(found))
  preposition = {"importance": "importance on", "weight_change": "change to"}
  rows = [["", *(f"{preposition[measure]} {short(name)}" for measure, name, _ in columns)]]
  layers = [list(zip(of["layers"], shares(of["layers"]), strict=True)) for *_, of in columns]
  for layer, cells in enumerate(zip(*layers, strict=True)):
    rows.append([f"layer {layer}", *(f"{value:.4g} ({share:.1%})" for value, share in cells)])
  for module in MODULES:
    sums = [(sum(of["modules"][module]), sum(of["layers"])) for *_, of in columns]
    rows.append([module, *(f"{part:.4g} ({part / whole if whole else 0:.1%})" for part, whole in sums)])
  parts = np.array_split(np.arange(min(map(len, layers), default=0)), len(_THIRDS))
  for name, part in zip(_THIRDS, parts, strict=True):
    if len(part):
      sums = [(sum(of["layers"][layer] for layer in part), sum(of["layers"])) for *_, of in columns]
      rows.append([f"{name} ({part[0]} to {part[-1]})", *(
          f"{value:.4g} ({value / whole if whole else 0:.1%})" for value, whole in sums)])
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
  for task, of in found["importance"].items():
    left_out = f"; {of['dropped_long']} more do not fit in a row" if of["dropped_long"] else ""
    lines.append(f"importance on {short(task)}: order {of['order']}, {of['examples']} examples{left_out}")
  for task, pairs in found["spearman"].items():
    lines += [f"Spearman, importance on {short(task)} and change to {short(name)}: "
              + ("not defined" if rank is None else f"{rank:.3f}") for name, rank in pairs.items()]
  return "\n".join(lines)


def foreign(folder: Path) -> str:
  """Why a folder is no earlier output; "" where it is one."""
  figures = {f"{measure}.{kind}" for measure in ("importance", "weight_change") for kind in ("png", "svg")}
  if not (folder / FILE).is_file() or not (folder / TABLE).is_file():
    return f"is no earlier result (it has no {FILE} and {TABLE})"
  others = sorted({path.name for path in folder.iterdir()} - figures - {FILE, TABLE})
  return f"is no earlier result (it holds {others[0]})" if others else ""


def _measures(found: Found) -> Iterator[tuple[str, str, Found]]:
  for measure in ("importance", "weight_change"):
    for of, values in found[measure].items():
      yield measure, of, values
