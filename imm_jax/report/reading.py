"""Reads the files of a run directory, tolerating missing and damaged data.

Functions append a line to the list `problems` for everything that they leave out. A JSON file without the structure
that a report needs is left out as a whole; whether its numbers are those that were written, `imm verify` tells.
"""

import collections
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from imm_jax import files
from imm_jax.errors import UserError, join_items
from imm_jax.model.config import PROJECTIONS
from imm_jax.runs import status
from imm_jax.statistics.accuracy import Accuracy

# The form of a JSON value: a type, a predicate, a mapping with the forms by key (`str` stands for every key), or a
# tuple with the form of what may be null or missing.
Form = type | Callable[[Any], object] | Mapping[Any, Any] | tuple[Any]
# Counts of a round's data, in the order of a round -> their labels.
COUNTS = {"samples": "sampled", "correct": "right", "dropped_wrong": "dropped: wrong answer",
          "dropped_unfinished": "dropped: cut off", "dropped_duplicate": "dropped: repeated", "kept": "trained on",
          "real": "of these real", "of_earlier_rounds": "of these of earlier rounds",
          "dropped_long": "dropped in SFT: too long", "no_answer": "without an answer",
          "unfinished": "cut at max_new_tokens", "long_prompts": "questions too long to ask",
          "tokens": "tokens sampled"}
# Names of scores that count: those of greedy answers, or of the most likely options.
COUNTED = re.compile(r"[A-Za-z]\w{0,60}")
# Outputs of stages.
_OUTPUTS = ("few_shot.jsonl", "base/eval", *(f"round_*/{name}" for name in (
    "samples.jsonl", "train.jsonl", "sft", "importance.json", "sweep", "base_weight.json", "merged", "eval/*",
    "analysis.json", "drift.json")))


def is_number(value: Any) -> bool:
  """Returns whether a value is a number that can be displayed and plotted: not NaN, infinite or huge."""
  return isinstance(value, int | float) and not isinstance(value, bool) and -1e100 < value < 1e100


def _are_numbers(values: Any) -> bool:
  return isinstance(values, list) and bool(values) and all(map(is_number, values))


def _are_texts(values: Any) -> bool:
  return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _are_scores(scores: Any) -> bool:
  """Returns whether a value has accuracies with intervals, which can be plotted, and one of them counts."""
  return isinstance(scores, dict) and any(map(COUNTED.fullmatch, scores)) and all(
      isinstance(score, dict) and score.keys() == {*Accuracy._fields} and all(map(is_number, score.values()))
      and isinstance(score["n"], int) and score["n"] > 0
      and 0 <= score["low"] <= score["value"] <= score["high"] <= 1 for score in scores.values())


_LAYERS = {"layers": _are_numbers, "modules": dict.fromkeys(PROJECTIONS, _are_numbers)}
_ANALYSIS = {
    "importance": (_LAYERS,), "weight_change": ({"sft": dict, str: _LAYERS | {"share": _are_numbers}},),
    "spearman": (is_number,), "diversity": ({
        "questions": is_number, "samples": is_number, "distinct_answers": is_number, "distinct_4grams": (is_number,),
        "token_entropy": (is_number,)},)}


def read_config(root: Path, problems: list[str]) -> dict[str, Any]:
  """Reads config.json."""
  return _read_json(root, "config.json", lambda _: {
      "method": str, "model": str, "task": {"name": str, "ood": _are_texts}, "sft": dict, "eval": dict}, problems)


def read_record(root: Path, problems: list[str]) -> dict[str, Any]:
  """Reads run.json."""
  return _read_json(root, "run.json", lambda record: {
      "method": str, "versions": dict, "devices": _are_texts, "tasks": {"id": str, "ood": _are_texts},
      "outdated": (_are_texts,), "stages": {name: {"bytes": is_number, "seconds": is_number, "memory_gib": (is_number,),
                        "facts": _facts_form(name, record)} for name in record.get("stages", ())}}, problems)


def _facts_form(name: str, record: Mapping[str, Any]) -> Form:
  """Returns the form of the facts of a stage."""
  head, _, rest = name.partition("/")
  if not rest.startswith("eval"):
    required = {"samples.jsonl": ["samples", "correct", "tokens"],
                "train.jsonl": ["kept", "real", "of_earlier_rounds"]}.get(rest, [])
    if rest == "train.jsonl" and f"{head}/samples.jsonl" in record["stages"]:
      required += ["dropped_wrong", "dropped_unfinished", "dropped_duplicate"]
    return dict.fromkeys(COUNTS, (is_number,)) | dict.fromkeys(required, is_number)
  tasks = [record["tasks"]["id"], *record["tasks"]["ood"]]
  interval = dict.fromkeys(("value", "low", "high"), is_number)
  protocol = {"name": str} | dict.fromkeys(("shots", "n", "mean_tokens", "cut"), is_number)
  return {"scores": dict.fromkeys(tasks, _are_scores), "protocol": (dict.fromkeys(tasks, protocol),),
          "long_prompts": ({str: is_number},),
          "texts": ({str: {"nats_per_token": interval, "bits_per_byte": interval}},)}


def read_analysis(root: Path, name: str, problems: list[str]) -> dict[str, Any]:
  """Reads the parts of an analysis.json that were measured."""
  analysis = _read_json(root, name, lambda _: _ANALYSIS, problems)
  return {part: analysis[part] for part in _ANALYSIS if analysis.get(part) is not None}


def read_drift(root: Path, name: str, problems: list[str]) -> dict[str, Any]:
  """Reads a drift.json, in which every model has all texts."""
  text, measures = (dict.fromkeys(keys, is_number) for keys in (("tokens", "loss", "entropy"),
                                                                ("kl", "loss", "entropy")))
  return _read_json(root, name, lambda drift: {
      "texts": {str: text}, "models": {str: dict.fromkeys(drift["texts"], measures)}}, problems)


def _read_json(root: Path, name: str, make_form: Callable[[Any], Form], problems: list[str]) -> dict[str, Any]:
  """Reads a JSON object, whose form may depend on it; returns an empty one if the file is missing or damaged."""
  if not (root / name).is_file():
    problems.append(f"{name}: missing")
    return {}
  try:
    value = files.read_json(root / name)
    _check(value, make_form(value))
  except (AttributeError, KeyError, TypeError, UserError, ValueError) as e:
    reason = e if isinstance(e, UserError | ValueError) else repr(e)
    problems.append(f"{name}: damaged ({reason}); run `imm verify {root}`")
    return {}
  return value


def _check(value: Any, form: Form, where: str = "") -> None:
  """Raises an error, a ValueError that names the place if possible, unless a JSON value has a form."""
  if isinstance(form, Mapping):
    _check(value, dict, where)
    for key, inner in form.items():
      for name in value if key is str else (key,):
        _check(value.get(name), inner, f"{where}.{name}".lstrip("."))
  elif isinstance(form, tuple):
    if value is not None:
      _check(value, form[0], where)
  elif not (isinstance(value, form) if isinstance(form, type) else form(value)):
    raise ValueError(f"{where} is {f'{value!r}':.60}")


def read_stages(root: Path, record: Mapping[str, Any], problems: list[str]) -> dict[str, dict[str, Any]]:
  """Returns name -> entry of the finished stages in run.json; without it, of stages whose answers exist.

  Stages whose output is of other settings or inputs, and which the run has still to make again, are left out.
  """
  outputs = sorted(str(path.relative_to(root)) for pattern in _OUTPUTS for path in root.glob(pattern)
                   if not path.name.startswith("."))  # outputs of unfinished stages are hidden
  if not record:
    return {name: {"facts": {}} for name in outputs
            if name == "base/eval" or "samples.jsonl" in name or "/eval/" in name}
  # A running run may have outputs that are not recorded yet.
  stages, is_live = record["stages"], status.is_running(root)
  unknown = [name for name in outputs if name not in stages and not is_live]
  problems += [f"left out, for run.json does not say that they were finished: {join_items(unknown)}"] * bool(unknown)
  for name, entry in stages.items():
    if not (root / name).exists():
      problems.append(f"{name}: missing, though run.json says that it was made")
    elif not is_live and (size := files.count_bytes(root / name)) != entry["bytes"]:
      problems.append(f"{name}: has {size:,} bytes, and had {entry['bytes']:,} when it was made")
  outdated = record.get("outdated", ())
  return {name: entry for name, entry in stages.items() if name not in outdated}


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
        if (memory := row.get("memory_gib", 0)) > peak.get(row["stage"], 0):
          peak[row["stage"]] = memory
      except (AttributeError, KeyError, TypeError, ValueError):
        damaged += 1
  problems += [f"metrics.jsonl: {damaged} line{'s' * (damaged > 1)} cannot be read"] * bool(damaged)
  return peak
