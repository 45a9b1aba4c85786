"""What stands in the files of a run directory; what is missing or damaged is left out and named.

Each function takes `problems`, a list that it adds a line to for all that it leaves out.
"""

import collections
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from imm_jax import files, status
from imm_jax.analysis import MODULES
from imm_jax.errors import UserError, listed

# Settings that a report needs.
_SETTINGS = {"method": str, "model": str, "task": dict, "sft": dict, "eval": dict}
# Facts of a round's data, in the order of a round, and what they count.
COUNTS = {"samples": "sampled", "correct": "right", "dropped_wrong": "dropped: wrong answer",
          "dropped_unfinished": "dropped: cut off", "dropped_duplicate": "dropped: repeated", "kept": "trained on",
          "real": "of these real", "of_earlier_rounds": "of these of earlier rounds",
          "dropped_long": "dropped in SFT: too long", "no_answer": "without an answer",
          "unfinished": "cut at max_new_tokens", "long_prompts": "questions too long to ask",
          "tokens": "tokens sampled"}
# Those that a stage has in any case, by how its name ends.
_ALWAYS = {"/samples.jsonl": ("samples", "correct", "tokens"), "/train.jsonl": ("kept", "real", "of_earlier_rounds")}
# And where there are samples to choose from.
_CHOSEN = ("dropped_wrong", "dropped_duplicate", "dropped_unfinished")
# Where stages leave what they make.
_OUTPUTS = ("few_shot.jsonl", "base/eval", *(f"round_*/{name}" for name in (
    "samples.jsonl", "train.jsonl", "sft", "importance.json", "sweep", "base_weight.json", "merged", "eval/*",
    "analysis.json", "drift.json")))


def config(path: Path, problems: list[str]) -> dict[str, Any]:
  """The content of config.json."""
  found = json_object(path, problems)
  wrong = [key for key, kind in _SETTINGS.items() if not isinstance(found.get(key), kind)]
  problems += [f"{path.name}: damaged or missing in it: {listed(wrong)}"] * bool(found and wrong)
  return found


def record(path: Path, problems: list[str]) -> dict[str, Any]:
  """The content of run.json."""
  found = json_object(path, problems)
  tasks = found.get("tasks") if isinstance(found.get("tasks"), dict) else {}
  names = lambda values: isinstance(values, list) and all(isinstance(value, str) for value in values)
  right = {"method": isinstance(found.get("method"), str), "versions": isinstance(found.get("versions"), dict),
           "devices": names(found.get("devices")), "tasks": names(tasks.get("ood")) and names([tasks.get("id")])}
  wrong = [key for key, is_right in right.items() if not is_right]
  problems += [f"{path.name}: damaged or missing in it: {listed(wrong)}"] * bool(found and wrong)
  return found


def json_object(path: Path, problems: list[str]) -> dict[str, Any]:
  """A JSON object; empty where there is none."""
  if not path.is_file():
    problems.append(f"{path.name}: missing")
    return {}
  try:
    return files.read_json(path)
  except UserError as e:
    problems.append(f"{path.name}: damaged ({e})")
    return {}


def stages(root: Path, record: Mapping[str, Any], problems: list[str]) -> dict[str, dict[str, Any]]:
  """The entries of run.json's finished stages, by name; where it has none, stages whose answers are there."""
  found = record.get("stages")
  there = sorted(str(path.relative_to(root)) for pattern in _OUTPUTS for path in root.glob(pattern)
                 if not path.name.startswith("."))  # which is what a stage is still at
  if not isinstance(found, dict):
    problems += ["run.json: has no list of stages"] * bool(record)
    return {name: {"facts": {}} for name in there if name == "base/eval" or "samples.jsonl" in name or "/eval/" in name}
  good = {name: entry for name, entry in found.items() if isinstance(entry, dict)
          and isinstance(entry.get("facts"), dict)}
  bad = [name for name in found if name not in good]
  problems += [f"run.json: damaged entries of {listed(bad)}"] * bool(bad)
  # A run that goes on has outputs that it has not recorded yet.
  goes_on = status.is_running(root)
  unknown = [name for name in there if name not in found and not goes_on]
  problems += [f"left out, for run.json does not say that they were finished: {listed(unknown)}"] * bool(unknown)
  for name, entry in good.items():
    wrong = [key for key in ("bytes", "seconds") if not (is_number(entry.get(key)) and entry[key] >= 0)]
    counts = [*_ALWAYS.get(name[name.rfind("/"):], ()), *COUNTS.keys() & entry["facts"].keys()]
    if name.endswith("/train.jsonl") and name.replace("train", "samples") in good:
      counts += _CHOSEN
    if not name.partition("/")[2].startswith("eval"):  # where long_prompts are counted by task
      wrong += sorted({key for key in counts if not _is_count(entry["facts"].get(key))})
    problems += [f"run.json: damaged or missing of {name}: {listed(wrong)}"] * bool(wrong)
    if not (root / name).exists():
      problems.append(f"{name}: missing, though run.json says that it was made")
    elif "bytes" not in wrong and not goes_on and (size := files.size_of(root / name)) != entry["bytes"]:
      problems.append(f"{name}: has {size:,} bytes, and had {entry['bytes']:,} when it was made")
  return good


def memory(root: Path, trained: bool, problems: list[str]) -> dict[str, float]:
  """By stage, the most GiB that a device held, of metrics.jsonl; `trained` says whether there has to be one."""
  path = root / "metrics.jsonl"
  most: dict[str, float] = collections.defaultdict(float)
  if not path.is_file():
    problems += ["metrics.jsonl: missing, so nobody can say how much memory the devices took"] * trained
    return most
  damaged = 0
  with path.open(encoding="utf-8", errors="replace") as f:
    for line in f:
      if not line.endswith("\n"):
        continue  # being written, or the last of a killed process
      try:
        row = json.loads(line)
        stage, value = row["stage"], row.get("memory_gib", 0)
        if not (isinstance(stage, str) and is_number(value)):
          raise ValueError(f"{row} has no name of a stage, or memory that is no number")
        if value > most.get(stage, 0):
          most[stage] = value
      except (AttributeError, KeyError, TypeError, ValueError):
        damaged += 1
  problems += [f"metrics.jsonl: {damaged} line{'s' * (damaged > 1)} cannot be read"] * bool(damaged)
  return most


def analysis(path: Path, problems: list[str]) -> dict[str, Any]:
  """The parts of analysis.json that were measured and have the form they should have."""
  name = f"{path.parent.name}/{path.name}"
  try:
    found = files.read_json(path)
  except UserError as e:
    problems.append(f"{name}: damaged ({e})")
    return {}
  good = {}
  for part, check in _PARTS.items():
    try:
      if found[part] is not None:  # null is what was not measured
        if not check(found[part]):
          raise ValueError("numbers that cannot be")
        good[part] = found[part]
    except (AttributeError, KeyError, TypeError, ValueError) as e:
      problems.append(f"{name}: {part} is damaged or missing ({e!r})")
  return good


def drift(path: Path, problems: list[str]) -> dict[str, Any]:
  """The content of drift.json; empty where it has not the form it should have."""
  try:
    found = files.read_json(path)
    texts, models = found["texts"], found["models"]
    right = all(_is_count(of["tokens"]) and _numbers(of, "loss", "entropy") for of in texts.values()) and all(
        of.keys() == texts.keys() and all(_numbers(one, "kl", "loss", "entropy") for one in of.values())
        for of in models.values())
    if not (right and texts and models):
      raise ValueError("numbers that cannot be")
    return found
  except (UserError, AttributeError, KeyError, TypeError, ValueError) as e:
    problems.append(f"{path.parent.name}/{path.name}: damaged ({e!r})")
    return {}


def _numbers(found: Mapping[str, Any], *keys: str) -> bool:
  return all(is_number(found[key]) for key in keys)


def is_number(value: Any) -> bool:
  """Whether a value is a number that can be shown and drawn: no NaN, no infinity, nothing huge."""
  return isinstance(value, int | float) and not isinstance(value, bool) and -1e100 < value < 1e100


def count(facts: Mapping[str, Any], key: str) -> int:
  """A count among facts, 0 where there is none."""
  return facts[key] if _is_count(facts.get(key)) else 0


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and is_number(value) and value >= 0


def _sizes(values: Any) -> bool:
  return isinstance(values, list) and bool(values) and all(is_number(value) and value >= 0 for value in values)


def _layers(found: Mapping[str, Any]) -> bool:
  """Whether these are numbers by layer, and by layer of each module."""
  values = [found["layers"], *(found["modules"][module] for module in MODULES)]
  return all(map(_sizes, values)) and len({len(of) for of in values}) == 1


def _diversity(found: Mapping[str, Any]) -> bool:
  measured = [found[key] for key in ("distinct_4grams", "token_entropy") if found[key] is not None]
  return _sizes([found["distinct_answers"], *measured]) and all(_is_count(found[k]) for k in ("questions", "samples"))


_PARTS: dict[str, Callable[[Any], bool]] = {
    "importance": _layers,
    "weight_change": lambda found: "sft" in found and all(_layers(of) and _sizes(of["share"]) for of in found.values()),
    "spearman": lambda found: is_number(found) and -1 <= found <= 1,
    "diversity": _diversity}
