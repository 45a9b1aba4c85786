"""Groups runs that differ only in their seed, with labels, styles and mean curves of the groups."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from imm_jax.report import figures
from imm_jax.report.figures import Curve
from imm_jax.report.results import Results
from imm_jax.statistics.accuracy import Accuracy

# Maximum length of the settings in a label.
_MAX_LABEL = 40


class Group(NamedTuple):
  """Runs whose settings that affect results differ only in the seed.

  Attributes:
    label: unique label in legends and tables: the name of a single run, or what several runs have in common.
    style: color and marker of the method.
    dash: line style.
    runs: the runs by name.
  """

  label: str
  style: tuple[str, str]
  dash: str
  runs: Mapping[str, Results]


def group_runs(runs: Mapping[str, Results]) -> list[Group]:
  """Groups runs with the same tasks whose configs differ only in the seed."""
  members_by_key: dict[str, dict[str, Results]] = {}
  for name, run in runs.items():
    settings = relevant_settings(run.config)
    # A run without a config is a group of its own.
    key = json.dumps([settings, run.id_task, run.ood_tasks], sort_keys=True) if settings else name
    members_by_key.setdefault(key, {})[name] = run
  labels = _make_labels(list(members_by_key.values()))
  seen: dict[str, int] = {}
  groups = []
  for label, members in zip(labels, members_by_key.values(), strict=True):
    run = next(iter(members.values()))
    i = seen[run.method] = seen.get(run.method, -1) + 1
    groups.append(Group(label, figures.get_method_style(run.method, intervention(run), i), figures.get_dash(i),
                        members))
  return groups


def relevant_settings(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the settings, by dotted key, that affect a run's results, without the seed."""
  from imm_jax.runs.run import RUNTIME_KEYS  # imported here because it imports the training code

  irrelevant = (*RUNTIME_KEYS, "seed")
  return {key: value for key, value in flatten(config).items()
          if not any(key == name or key.startswith(f"{name}.") for name in irrelevant)}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Flattens nested settings to dotted keys.

  >>> flatten({"seed": 1, "sft": {"epochs": 3}})
  {'seed': 1, 'sft.epochs': 3}
  """
  settings: dict[str, Any] = {}
  for key, value in config.items():
    settings |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
  return settings


def method_label(run: Results) -> str:
  """Returns the method's name, with the intervention in SFT if there is one."""
  return run.variant if intervention(run) == "none" else f"{run.variant}, {intervention(run)}"


def intervention(run: Results) -> str:
  """Returns the intervention in SFT, or `none`."""
  sft = run.config.get("sft")
  return str(sft.get("intervention", "none")) if isinstance(sft, dict) else "none"


def make_curve(group: Group, measure: Callable[[Results], Mapping[int, Accuracy | float]]) -> Curve | None:
  """Makes a group's curve of a measure that returns values by x for each run; None if there are no values.

  The curve of a single run has its values, with intervals if they have any; that of several runs has the mean and its
  standard error over the runs that have a value at that x.
  """
  by_run = [measure(run) for run in group.runs.values()]
  xs = sorted({x for values in by_run for x in values})
  if not xs:
    return None
  if len(by_run) > 1:
    means = [mean_and_error([to_number(values[x]) for values in by_run if x in values]) for x in xs]
    return Curve(group.label, *group.style, group.dash, tuple(xs), tuple(m for m, _ in means),
                 tuple(m - e for m, e in means), tuple(m + e for m, e in means))
  values = by_run[0]
  if all(isinstance(value, Accuracy) for value in values.values()):
    return figures.accuracy_line(group.label, group.style, list(values), list(values.values()), group.dash)
  return figures.round_line(values, group.label, group.style, group.dash)


def to_number(value: Accuracy | float) -> float:
  """Returns an accuracy's value, and numbers unchanged."""
  return value.value if isinstance(value, Accuracy) else value


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
  """Returns the mean of values and its standard error, 0 for a single value.

  >>> mean_and_error([1.0, 3.0]), mean_and_error([2.0])
  ((2.0, 1.0), (2.0, 0.0))
  """
  error = np.std(values, ddof=1) / len(values)**0.5 if len(values) > 1 else 0.0
  return float(np.mean(values)), float(error)


def _make_labels(groups: Sequence[Mapping[str, Results]]) -> list[str]:
  """Makes short, unique labels of groups: the name of a single run; for several runs the method and the settings in
  which groups of that method differ."""
  first = [next(iter(members.values())) for members in groups]
  methods = [method_label(run) for run in first]
  labels: list[str] = []
  for members, run, label in zip(groups, first, methods, strict=True):
    if len(members) == 1:
      name, = members
      names_method = all(re.search(rf"(?<![a-z]){re.escape(word)}(?![a-z])", name) for word in label.split(", "))
      text = figures.shorten(name) if names_method else f"{figures.shorten(name)} ({label})"
    else:
      alike = [relevant_settings(other.config) for other, group, same in zip(first, groups, methods, strict=True)
               if same == label and len(group) > 1]
      different = [f"{key.rpartition('.')[2]}={_abbreviate(value)}"
                   for key, value in relevant_settings(run.config).items()
                   if any(other.get(key) != value for other in alike)]
      seeds = {str(member.config.get("seed")) for member in members.values()}
      text = ", ".join([label, *different])
      text = text if len(text) <= _MAX_LABEL else f"{text[:_MAX_LABEL - 3]}..."
      text += f" ({len(members)} {'seeds' if len(seeds) == len(members) else 'runs'})"
    labels.append(text)
  return [label if labels.count(label) == 1 else f"{label} [{labels[:i].count(label) + 1}]"
          for i, label in enumerate(labels)]


def _abbreviate(value: Any) -> str:
  """Abbreviates a setting: to the last part of a path or hub id, or the number of entries of a list.

  >>> _abbreviate("Qwen/Qwen2.5-0.5B"), _abbreviate(["svamp", "asdiv"]), _abbreviate(0.3)
  ('Qwen2.5-0.5B', '2 entries', '0.3')
  """
  if isinstance(value, list) and len(value) > 1:
    return f"{len(value)} entries"
  return str(value).rstrip("/").rpartition("/")[2]
