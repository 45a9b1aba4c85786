"""Compares runs with the paper's published figures, if a run's config is that of one of its tables.

`paper.json` holds the figures of tables 2 to 9, (kind of model, round, percent) for each task, and the settings that
identify the runs, which are those of `configs/paper.py`. The data of the paper's plots were not published.
"""

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from imm_jax.errors import join_items
from imm_jax.report.markup import Section, Table
from imm_jax.report.results import Results

# Settings that the paper's methods do not have.
_NOT_THERE = ("merge.method", "data.real_fraction", "sft.stop_share")


# Settings that the paper does not state, with the values of our plans.
_NOT_STATED = {"sft.grad_clip": 1.0}


def load() -> dict[str, Any]:
  """Loads paper.json."""
  return json.loads(importlib.resources.files(__package__).joinpath("paper.json").read_text(encoding="utf-8"))


def find_entries(config: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Finds the entries of paper.json to compare a run with, by the config in its config.json.

  >>> [entry["table"] for entry in find_entries({"model": "meta-llama/Meta-Llama-3-8B", "method": "imm", "teacher": "",
  ...                                    "task": {"name": "gsm8k"}, "sft": {"intervention": "none"}})]
  [9]
  """
  return [entry for entry in load()["tables"]
          if _same_model(config.get("model"), entry["model"]) and _same_model(config.get("teacher"), entry["teacher"])
          and config.get("method") in entry["methods"] and _get_setting(config, "task.name") in entry["id_tasks"]
          and _get_setting(config, "sft.intervention") == entry["intervention"]]


def make_sections(runs: Mapping[str, Results]) -> list[Section]:
  """Makes sections that compare each run with the paper, and a notice on runs that are not in the paper."""
  entries_by_run = {name: find_entries(run.config) for name, run in runs.items()}
  others = [(f"{name}: " if name else "") + f"model {run.config.get('model')}, task {run.id_task}, method {run.method}"
            for name, run in runs.items() if not entries_by_run[name]]
  notice = [Section("paper_none", "Comparison with the paper", [
      f"No table of the paper has this config ({join_items(others, '; ')}), so there are no published figures "
      "for it."])]
  made = [_make_section(run, name, entries_by_run[name]) for name, run in runs.items() if entries_by_run[name]]
  return made + notice * bool(others)


def _make_section(results: Results, label: str, entries: Sequence[Mapping[str, Any]]) -> Section:
  name = "paper" + "".join(c if c.isalnum() or c in "-_" else "_" for c in f"_{label}" * bool(label))
  models = {(m.kind, m.round): m for m in results.models}
  rows, missing = [], 0
  for entry in entries:
    for task, values in entry["figures"].items():
      for kind, round_, percent in values:
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
  others = list_differences(results.config)
  return Section(name, "Comparison with the paper" + f": {label}" * bool(label), [
      f"Published figures of table {tables}; the paper gives neither intervals nor the number of runs.", *notes,
      *([f"Settings that differ from the paper's: {'; '.join(others)}."] if others else []),
      *([f"{missing} figures of these tables are of tasks or models that this run has not evaluated."] * bool(missing)),
      *([Table(name, "The paper's figures and this run's", ["table", "task", "model", "paper", "this run", "difference",
                                                            "paper's figure, in this run's interval"], rows)]
        if rows else [])])


def list_differences(config: Mapping[str, Any]) -> list[str]:
  """Describes the settings of a run that differ from the paper's."""
  paper = load()
  wanted = dict(paper["settings"])
  if (task := _get_setting(config, "task.name")) in paper["num_samples"]:
    wanted["sample.num_samples"] = paper["num_samples"][task]
  wanted["task.eval_questions"] = wanted["task.questions_per_round"] = 0
  unmerged = config.get("method") == "star"
  return [f"{key} is {_get_setting(config, key)}, the paper's {value or 'all'}" for key, value in wanted.items()
          if _get_setting(config, key) != value and not (key.startswith("merge.") and unmerged)] + [
              f"{key} is {value}, of which the paper has none" for key in _NOT_THERE
              if (value := _get_setting(config, key))] + [
                  f"{key} is {value}, the paper states none and ours is {ours}" for key, ours in _NOT_STATED.items()
                  if (value := _get_setting(config, key)) not in (None, ours)]


def _same_model(model: Any, published: str) -> bool:
  """Returns whether a config's model is a published one; folders are compared by name."""
  return model == published or (isinstance(model, str) and published != "" and (
      PurePath(model).name == PurePath(published).name))


def _get_setting(config: Mapping[str, Any], key: str) -> Any:
  value: Any = config
  for part in key.split("."):
    value = value.get(part) if isinstance(value, Mapping) else None
  return value
