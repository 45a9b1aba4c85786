"""Reads the files of a run directory, tolerating missing and damaged data.

Functions append a line to the list `problems` for everything that they leave out.
"""

import collections
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from imm_jax import files
from imm_jax.analysis import MODULES
from imm_jax.errors import UserError, join_items
from imm_jax.runs import status

# Settings that a report needs.
_SETTINGS = {"method": str, "model": str, "task": dict, "sft": dict, "eval": dict}
# Counts of a round's data, in the order of a round -> their labels.
COUNTS = {"samples": "sampled", "correct": "right", "dropped_wrong": "dropped: wrong answer",
          "dropped_unfinished": "dropped: cut off", "dropped_duplicate": "dropped: repeated", "kept": "trained on",
          "real": "of these real", "of_earlier_rounds": "of these of earlier rounds",
          "dropped_long": "dropped in SFT: too long", "no_answer": "without an answer",
          "unfinished": "cut at max_new_tokens", "long_prompts": "questions too long to ask",
          "tokens": "tokens sampled"}
# Suffix of a stage's name -> counts that it always has.
_REQUIRED_COUNTS = {"/samples.jsonl": ("samples", "correct", "tokens"),
                    "/train.jsonl": ("kept", "real", "of_earlier_rounds")}
# Counts of the selection among samples.
_SELECTION_COUNTS = ("dropped_wrong", "dropped_duplicate", "dropped_unfinished")
# Outputs of stages.
_OUTPUTS = ("few_shot.jsonl", "base/eval", *(f"round_*/{name}" for name in (
    "samples.jsonl", "train.jsonl", "sft", "importance.json", "sweep", "base_weight.json", "merged", "eval/*",
    "analysis.json", "drift.json")))


def read_config(path: Path, problems: list[str]) -> dict[str, Any]:
  """Reads config.json."""
  config = read_json_object(path, problems)
  damaged_keys = [key for key, kind in _SETTINGS.items() if not isinstance(config.get(key), kind)]
  problems += [f"{path.name}: damaged or missing in it: {join_items(damaged_keys)}"] * bool(config and damaged_keys)
  return config


def read_record(path: Path, problems: list[str]) -> dict[str, Any]:
  """Reads run.json."""
  record = read_json_object(path, problems)
  tasks = record.get("tasks") if isinstance(record.get("tasks"), dict) else {}
  names = lambda values: isinstance(values, list) and all(isinstance(value, str) for value in values)
  right = {"method": isinstance(record.get("method"), str), "versions": isinstance(record.get("versions"), dict),
           "devices": names(record.get("devices")), "tasks": names(tasks.get("ood")) and names([tasks.get("id")])}
  damaged_keys = [key for key, is_right in right.items() if not is_right]
  problems += [f"{path.name}: damaged or missing in it: {join_items(damaged_keys)}"] * bool(record and damaged_keys)
  return record


def read_json_object(path: Path, problems: list[str]) -> dict[str, Any]:
  """Reads a JSON object; returns an empty one if it is missing or damaged."""
  if not path.is_file():
    problems.append(f"{path.name}: missing")
    return {}
  try:
    return files.read_json(path)
  except UserError as e:
    problems.append(f"{path.name}: damaged ({e})")
    return {}


def read_stages(root: Path, record: Mapping[str, Any], problems: list[str]) -> dict[str, dict[str, Any]]:
  """Returns name -> entry of the finished stages in run.json; without these, of stages whose answers exist."""
  entries = record.get("stages")
  outputs = sorted(str(path.relative_to(root)) for pattern in _OUTPUTS for path in root.glob(pattern)
                   if not path.name.startswith("."))  # outputs of unfinished stages are hidden
  if not isinstance(entries, dict):
    problems += ["run.json: has no list of stages"] * bool(record)
    return {name: {"facts": {}} for name in outputs
            if name == "base/eval" or "samples.jsonl" in name or "/eval/" in name}
  valid = {name: entry for name, entry in entries.items() if isinstance(entry, dict)
           and isinstance(entry.get("facts"), dict)}
  damaged_names = [name for name in entries if name not in valid]
  problems += [f"run.json: damaged entries of {join_items(damaged_names)}"] * bool(damaged_names)
  # A running run may have outputs that are not recorded yet.
  is_live = status.is_running(root)
  unknown = [name for name in outputs if name not in entries and not is_live]
  problems += [f"left out, for run.json does not say that they were finished: {join_items(unknown)}"] * bool(unknown)
  for name, entry in valid.items():
    damaged_keys = [key for key in ("bytes", "seconds") if not (is_number(entry.get(key)) and entry[key] >= 0)]
    counts = [*_REQUIRED_COUNTS.get(name[name.rfind("/"):], ()), *COUNTS.keys() & entry["facts"].keys()]
    if name.endswith("/train.jsonl") and name.replace("train", "samples") in valid:
      counts += _SELECTION_COUNTS
    if not name.partition("/")[2].startswith("eval"):  # in evaluations, long_prompts is a dict by task
      damaged_keys += sorted({key for key in counts if not _is_count(entry["facts"].get(key))})
    problems += [f"run.json: damaged or missing of {name}: {join_items(damaged_keys)}"] * bool(damaged_keys)
    if not (root / name).exists():
      problems.append(f"{name}: missing, though run.json says that it was made")
    elif "bytes" not in damaged_keys and not is_live and (size := files.count_bytes(root / name)) != entry["bytes"]:
      problems.append(f"{name}: has {size:,} bytes, and had {entry['bytes']:,} when it was made")
  return valid


def read_memory(root: Path, trained: bool, problems: list[str]) -> dict[str, float]:
  """Reads stage -> peak GiB of a device from metrics.jsonl, which must exist if the run has `trained`."""
  path = root / "metrics.jsonl"
  peak: dict[str, float] = collections.defaultdict(float)
  if not path.is_file():
    problems += ["metrics.jsonl: missing, so the memory that the devices used is unknown"] * trained
    return peak
  damaged = 0
  with path.open(encoding="utf-8", errors="replace") as f:
    for line in f:
      if not line.endswith("\n"):
        continue  # still being written, or truncated as a process was killed
      try:
        row = json.loads(line)
        stage, value = row["stage"], row.get("memory_gib", 0)
        if not (isinstance(stage, str) and is_number(value)):
          raise ValueError(f"{row} has no name of a stage, or memory that is no number")
        if value > peak.get(stage, 0):
          peak[stage] = value
      except (AttributeError, KeyError, TypeError, ValueError):
        damaged += 1
  problems += [f"metrics.jsonl: {damaged} line{'s' * (damaged > 1)} cannot be read"] * bool(damaged)
  return peak


def read_analysis(path: Path, problems: list[str]) -> dict[str, Any]:
  """Reads the valid parts of analysis.json that were measured."""
  name = f"{path.parent.name}/{path.name}"
  try:
    analysis = files.read_json(path)
  except UserError as e:
    problems.append(f"{name}: damaged ({e})")
    return {}
  valid = {}
  for part, check in _PART_CHECKS.items():
    try:
      if analysis[part] is not None:  # null was not measured
        if not check(analysis[part]):
          raise ValueError("numbers that cannot be")
        valid[part] = analysis[part]
    except (AttributeError, KeyError, TypeError, ValueError) as e:
      problems.append(f"{name}: {part} is damaged or missing ({e!r})")
  return valid


def read_drift(path: Path, problems: list[str]) -> dict[str, Any]:
  """Reads drift.json; returns an empty dict if it is not valid."""
  try:
    drift = files.read_json(path)
    texts, models = drift["texts"], drift["models"]
    right = all(_is_count(entry["tokens"]) and _all_numbers(entry, "loss", "entropy") for entry in texts.values())
    right = right and all(
        entry.keys() == texts.keys() and all(_all_numbers(one, "kl", "loss", "entropy") for one in entry.values())
        for entry in models.values())
    if not (right and texts and models):
      raise ValueError("numbers that cannot be")
    return drift
  except (UserError, AttributeError, KeyError, TypeError, ValueError) as e:
    problems.append(f"{path.parent.name}/{path.name}: damaged ({e!r})")
    return {}


def _all_numbers(values: Mapping[str, Any], *keys: str) -> bool:
  return all(is_number(values[key]) for key in keys)


def is_number(value: Any) -> bool:
  """Returns whether a value is a number that can be displayed and plotted: not NaN, infinite or huge."""
  return isinstance(value, int | float) and not isinstance(value, bool) and -1e100 < value < 1e100


def get_count(facts: Mapping[str, Any], key: str) -> int:
  """Returns a count among facts, 0 if there is none."""
  return facts[key] if _is_count(facts.get(key)) else 0


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and is_number(value) and value >= 0


def _are_sizes(values: Any) -> bool:
  return isinstance(values, list) and bool(values) and all(is_number(value) and value >= 0 for value in values)


def _is_layer_scores(scores: Mapping[str, Any]) -> bool:
  """Returns whether a mapping has scores by layer in total and for each module."""
  values = [scores["layers"], *(scores["modules"][module] for module in MODULES)]
  return all(map(_are_sizes, values)) and len({len(entry) for entry in values}) == 1


def _is_diversity(diversity: Mapping[str, Any]) -> bool:
  measured = [diversity[key] for key in ("distinct_4grams", "token_entropy") if diversity[key] is not None]
  counts = diversity["questions"], diversity["samples"]
  return _are_sizes([diversity["distinct_answers"], *measured]) and all(map(_is_count, counts))


_PART_CHECKS: dict[str, Callable[[Any], bool]] = {
    "importance": _is_layer_scores,
    "weight_change": lambda changes: "sft" in changes and all(
        _is_layer_scores(change) and _are_sizes(change["share"]) for change in changes.values()),
    "spearman": lambda rank: is_number(rank) and -1 <= rank <= 1,
    "diversity": _is_diversity}
