"""Runs that differ in nothing but their seed, as one: their mean, their style and what they are called."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from imm_jax.evaluation import Accuracy
from imm_jax.report import figures
from imm_jax.report.figures import Line
from imm_jax.report.results import Results

# Letters of a label's settings.
_LONGEST = 40


class Group(NamedTuple):
  """Runs that differ in nothing that decides what comes out but their seed.

  Attributes:
    label: in legends and tables, of no other group: of one run its name, of several what they have in common.
    style: colour and marker, those of the method.
    dash: the kind of line.
    runs: by name.
  """

  label: str
  style: tuple[str, str]
  dash: str
  runs: Mapping[str, Results]


def group(runs: Mapping[str, Results]) -> list[Group]:
  """The runs, those together whose configs differ in the seed alone and which have the same tasks."""
  found: dict[str, dict[str, Results]] = {}
  for name, run in runs.items():
    settings = relevant(run.config)
    # A run whose config is lost is like no other.
    key = json.dumps([settings, run.id_task, run.ood_tasks], sort_keys=True) if settings else name
    found.setdefault(key, {})[name] = run
  labels = _labels(list(found.values()))
  seen: dict[str, int] = {}
  groups = []
  for label, members in zip(labels, found.values(), strict=True):
    run = next(iter(members.values()))
    i = seen[run.method] = seen.get(run.method, -1) + 1
    groups.append(Group(label, figures.method_style(run.method, intervention(run), i), figures.dash(i), members))
  return groups


def relevant(config: Mapping[str, Any]) -> dict[str, Any]:
  """The settings, by dotted key, that decide what comes out of a run, but for the seed."""
  from imm_jax.config import HOW  # late: it imports what training needs

  how = (*HOW, "seed")
  return {key: value for key, value in flat(config).items()
          if not any(key == name or key.startswith(f"{name}.") for name in how)}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Settings by dotted key.

  >>> flat({"seed": 1, "sft": {"epochs": 3}})
  {'seed': 1, 'sft.epochs': 3}
  """
  found: dict[str, Any] = {}
  for key, value in config.items():
    found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
  return found


def method(run: Results) -> str:
  """The method, and the intervention in SFT where there is one."""
  return run.method if intervention(run) == "none" else f"{run.method}, {intervention(run)}"


def intervention(run: Results) -> str:
  """The intervention in SFT, or `none`."""
  sft = run.config.get("sft")
  return str(sft.get("intervention", "none")) if isinstance(sft, dict) else "none"


def curve(group: Group, measure: Callable[[Results], Mapping[int, Accuracy | float]]) -> Line | None:
  """A group's curve of what `measure` gives of a run, by its place on the x axis; None where there is nothing.

  Of one run the values, with their intervals where they have some; of several the mean and its standard error over
  those that have a value at that place.
  """
  found = [measure(run) for run in group.runs.values()]
  places = sorted({x for values in found for x in values})
  if not places:
    return None
  if len(found) > 1:
    means = [mean([number(values[x]) for values in found if x in values]) for x in places]
    return Line(group.label, *group.style, group.dash, tuple(places), tuple(m for m, _ in means),
                tuple(m - e for m, e in means), tuple(m + e for m, e in means))
  values = found[0]
  if all(isinstance(value, Accuracy) for value in values.values()):
    return figures.scores(group.label, group.style, list(values), list(values.values()), group.dash)
  return figures.over_rounds(values, group.label, group.style, group.dash)


def number(value: Accuracy | float) -> float:
  """The number itself."""
  return value.value if isinstance(value, Accuracy) else value


def mean(values: Sequence[float]) -> tuple[float, float]:
  """The mean of some values and its standard error, 0 for one value.

  >>> mean([1.0, 3.0]), mean([2.0])
  ((2.0, 1.0), (2.0, 0.0))
  """
  error = np.std(values, ddof=1) / len(values)**0.5 if len(values) > 1 else 0.0
  return float(np.mean(values)), float(error)


def _labels(groups: Sequence[Mapping[str, Results]]) -> list[str]:
  """Names of runs that are alone; for the others the method, and the settings in which groups of one method differ.

  They are short, and no two are equal.
  """
  first = [next(iter(members.values())) for members in groups]
  methods = [method(run) for run in first]
  labels: list[str] = []
  for members, run, label in zip(groups, first, methods, strict=True):
    if len(members) == 1:
      name, = members
      told = all(re.search(rf"(?<![a-z]){re.escape(word)}(?![a-z])", name) for word in label.split(", "))
      text = figures.short(name) if told else f"{figures.short(name)} ({label})"
    else:
      alike = [relevant(other.config) for other, of, same in zip(first, groups, methods, strict=True)
               if same == label and len(of) > 1]
      different = [f"{key.rpartition('.')[2]}={_brief(value)}" for key, value in relevant(run.config).items()
                   if any(other.get(key) != value for other in alike)]
      seeds = {str(member.config.get("seed")) for member in members.values()}
      text = ", ".join([label, *different])
      text = text if len(text) <= _LONGEST else f"{text[:_LONGEST - 3]}..."
      text += f" ({len(members)} {'seeds' if len(seeds) == len(members) else 'runs'})"
    labels.append(text)
  return [label if labels.count(label) == 1 else f"{label} [{labels[:i].count(label) + 1}]"
          for i, label in enumerate(labels)]


def _brief(value: Any) -> str:
  """A setting in few letters: of a path or hub id the last part, of a list how many entries.

  >>> _brief("Qwen/Qwen2.5-0.5B"), _brief(["svamp", "asdiv"]), _brief(0.3)
  ('Qwen2.5-0.5B', '2 entries', '0.3')
  """
  if isinstance(value, list) and len(value) > 1:
    return f"{len(value)} entries"
  return str(value).rstrip("/").rpartition("/")[2]
