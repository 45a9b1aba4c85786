"""The paper's published figures beside a run's, where the run's config is one of the paper's tables.

`paper.json` holds the figures of tables 2 to 9: per task (kind of model, round, percent), and of which runs they are.
The runs themselves are those of `configs/paper.py`. What the paper's plots show was not published as numbers.
"""

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from imm_jax.errors import listed
from imm_jax.report.markup import Section, Table
from imm_jax.report.results import Results

# Settings that make another method of one of the paper's.
_NOT_THERE = ("merge.method", "data.real_fraction", "sft.stop_share")


def load() -> dict[str, Any]:
  """The content of paper.json."""
  return json.loads(importlib.resources.files("imm_jax.report").joinpath("paper.json").read_text(encoding="utf-8"))


def find(config: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The entries of paper.json that a run with this config (of config.json) is to be compared with.

  >>> [entry["table"] for entry in find({"model": "meta-llama/Meta-Llama-3-8B", "method": "imm", "teacher": "",
  ...                                    "task": {"name": "gsm8k"}, "sft": {"intervention": "none"}})]
  [9]
  """
  return [entry for entry in load()["tables"]
          if _same_model(config.get("model"), entry["model"]) and _same_model(config.get("teacher"), entry["teacher"])
          and config.get("method") in entry["methods"] and _value(config, "task.name") in entry["id_tasks"]
          and _value(config, "sft.intervention") == entry["intervention"]]


def sections(runs: Mapping[str, Results]) -> list[Section]:
  """The paper's figures beside those of each run, and a line on the runs that are none of the paper's."""
  found = {name: find(run.config) for name, run in runs.items()}
  others = [(f"{name}: " if name else "") + f"model {run.config.get('model')}, task {run.id_task}, method {run.method}"
            for name, run in runs.items() if not found[name]]
  none = [Section("paper_none", "Beside the paper", [
      f"No table of the paper has this config ({listed(others, '; ')}), so there are no published figures beside it."])]
  return [*(_section(run, name, found[name]) for name, run in runs.items() if found[name]), *none * bool(others)]


def _section(results: Results, label: str, entries: Sequence[Mapping[str, Any]]) -> Section:
  name = "paper" + "".join(c if c.isalnum() or c in "-_" else "_" for c in f"_{label}" * bool(label))
  models = {(m.kind, m.round): m for m in results.models}
  rows, missing = [], 0
  for entry in entries:
    for task, figures in entry["figures"].items():
      for kind, round_, percent in figures:
        model = models.get((kind, round_))
        if model is None or task not in model.scores:
          missing += 1
          continue
        score = model.scores[task]
        inside = score.low <= percent / 100 <= score.high
        rows.append([entry["table"], task, model.label, percent / 100, score, score.value - percent / 100,
                     "inside" if inside else "outside"])
  tables = ", ".join(str(t) for t in sorted({entry["table"] for entry in entries}))
  notes = list(dict.fromkeys(entry["note"] for entry in entries if "note" in entry))
  others = different(results.config)
  return Section(name, "Beside the paper" + f": {label}" * bool(label), [
      f"Published figures of table {tables}; the paper gives neither intervals nor the number of runs.", *notes,
      *([f"Settings that differ from the paper's: {'; '.join(others)}."] if others else []),
      *([f"{missing} figures of these tables are of tasks or models that this run has not evaluated."] * bool(missing)),
      *([Table(name, "The paper's figures and this run's", ["table", "task", "model", "paper", "this run", "difference",
                                                            "paper's figure, in this run's interval"], rows)]
        if rows else [])])


def different(config: Mapping[str, Any]) -> list[str]:
  """Settings of a run that are not the paper's, a phrase each."""
  paper = load()
  wanted = dict(paper["settings"])
  if (task := _value(config, "task.name")) in paper["num_samples"]:
    wanted["sample.num_samples"] = paper["num_samples"][task]
  wanted["task.eval_questions"] = wanted["task.questions_per_round"] = 0
  return [f"{key} is {_value(config, key)}, the paper's {value or 'all'}" for key, value in wanted.items()
          if _value(config, key) != value and not (key.startswith("merge.") and config.get("method") == "star")] + [
              f"{key} is {value}, of which the paper has none" for key in _NOT_THERE if (value := _value(config, key))]


def _same_model(given: Any, published: str) -> bool:
  """Whether a config's model is a published one; a folder counts by its name."""
  return given == published or (isinstance(given, str) and published != "" and (
      PurePath(given).name == PurePath(published).name))


def _value(config: Mapping[str, Any], key: str) -> Any:
  value: Any = config
  for part in key.split("."):
    value = value.get(part) if isinstance(value, Mapping) else None
  return value
