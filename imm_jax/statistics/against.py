"""The answers of two models on disk, paired by question: which of the differences between their scores are real."""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imm_jax import files
from imm_jax.errors import UserError, join_items
from imm_jax.statistics import comparison
from imm_jax.statistics.comparison import Paired

# Fields of a row that score its question. A rate has the field that it is per: row[nats] / row[bytes], weighted with
# row[bytes], so that a mean over texts is that of all their bytes; tokens would be other ones with another tokenizer.
METRICS: Mapping[str, str | None] = {"correct": None, "correct_norm": None, "nats": "bytes"}
# Ids of questions in a message.
_MOST = 3


class Answers(NamedTuple):
  """The answers of a model to the questions of a task, by question id.

  Attributes:
    path: where they were read.
    fingerprints: of each question a fingerprint of its text and its gold answer.
    scores: by metric, the score of each.
    weights: by metric whose scores are rates, the weight of each.
  """

  path: Path
  fingerprints: dict[str, int]
  scores: dict[str, dict[str, float]]
  weights: dict[str, dict[str, float]]


class Line(NamedTuple):
  """A difference between two models.

  Attributes:
    task: on which.
    metric: a key of METRICS.
    paired: the difference.
    p: corrected by Holm over the lines of the comparison.
  """

  task: str
  metric: str
  paired: Paired
  p: float

  @property
  def label(self) -> str:
    """The task, and the metric where it is not the usual one."""
    return self.task if self.metric == "correct" else f"{self.task}, {_describe_metric(self.metric)}"

  @property
  def real(self) -> bool:
    """Whether the corrected p is below 0.05."""
    return comparison.is_real(self.p)


class Comparison(NamedTuple):
  """Two models on the tasks that both have answers to.

  Attributes:
    lines: a line for each task and metric.
    notes: what was not compared and why, a line each.
  """

  lines: tuple[Line, ...]
  notes: tuple[str, ...]


def read_folder(folder: Path) -> dict[str, Answers]:
  """Reads the answers of a model, by task: an --out of imm_jax.evaluate, or of a run such as RUN/round_0/eval/sft.

  Raises:
    UserError: when there are none, and for a file that cannot be read.
  """
  paths = [path for path in sorted(folder.glob("*.jsonl")) if not path.stem.endswith("_samples")]
  below = sorted({str(path.parent) for path in folder.glob("**/eval/**/*.jsonl")}) if folder.is_dir() else []
  if not paths or below:  # a run and its rounds hold other files, too
    ours = f"one of {join_items(below)}" if below else "a folder such as RUN/base/eval or RUN/round_0/eval/sft"
    raise UserError(f"{folder}: is no folder of answers (<task>.jsonl); expected an --out of imm_jax.evaluate, or of a "
                    f"run {ours}")
  return {path.stem: read_answers(path) for path in paths}


def read_answers(path: Path) -> Answers:
  """Reads <task>.jsonl; a file that has not changed since is not read again.

  Raises:
    UserError: for a line that is no row of a question, one that has no score, and a question that stands there twice.
  """
  stat = path.stat()
  return _read(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1024)
def _read(path: Path, *_: int) -> Answers:
  rows = files.read_jsonl(path, {"id": str})
  if not rows:
    raise UserError(f"{path}: holds no answer")
  asked = {row["id"]: hash(repr((row.get("question"), row.get("gold")))) for row in rows}
  if len(asked) < len(rows):
    ids = [row["id"] for row in rows]
    raise UserError(f"{path}: question {next(id_ for id_ in ids if ids.count(id_) > 1)} stands in it twice")
  metrics = [metric for metric in METRICS if metric in rows[0]]
  if not metrics:
    raise UserError(f"{path}:1: holds no score; expected one of {', '.join(METRICS)}")
  found = Answers(path, asked, {metric: {} for metric in metrics}, {m: {} for m in metrics if METRICS[m]})
  for number, row in enumerate(rows, 1):
    for metric in metrics:
      per = METRICS[metric]
      for field, least in ((metric, -math.inf), *([(per, 0)] if per else [])):
        if not isinstance(row.get(field), int | float) or not least < row[field] < math.inf:
          raise UserError(f"{path}:{number}: {field!r} is missing or no number that can be compared")
      found.scores[metric][row["id"]] = row[metric] / row[per] if per else float(row[metric])
      if per:
        found.weights[metric][row["id"]] = float(row[per])
  return found


def compare(first: Mapping[str, Answers], second: Mapping[str, Answers], *, pooled: Mapping[str, Sequence[str]] = {},
            ) -> Comparison:
  """Compares two models task by task, on the questions that both answered; p is corrected over all lines.

  Args:
    first: answers by task.
    second: of the other model.
    pooled: further lines, by name: tasks whose questions are taken together.

  Raises:
    UserError: when they share no task, and where a question of one name is not the same question, or no question of a
      task is shared.
  """
  shared = [task for task in first if task in second]
  if not shared:
    raise UserError(f"no task has answers of both: {_folder(first)} has {join_items(list(first))}; "
                    f"{_folder(second)} has {join_items(list(second))}")
  notes = [f"not compared, for {_folder(b)} has no answers to it: {task}"
           for a, b in ((first, second), (second, first)) for task in a if task not in b]
  ids = {}
  for task in shared:
    ids[task], note = _match_questions(first[task], second[task])
    notes += [f"{task}: {note}"] * bool(note)
  found = []
  for name, tasks in ({task: [task] for task in shared} | dict(pooled)).items():
    for metric in METRICS:
      parts = [(first[t], second[t], ids[t]) for t in tasks if t in ids]
      parts = [part for part in parts if metric in part[0].scores and metric in part[1].scores]
      if parts and (name in ids or len(parts) > 1):
        found.append((name, metric, _compare_metric(parts, metric)))
  corrected = comparison.holm([paired.p for *_, paired in found])
  return Comparison(tuple(Line(*line, p) for line, p in zip(found, corrected, strict=True)), tuple(notes))


def _match_questions(first: Answers, second: Answers) -> tuple[list[str], str]:
  """The ids of the questions that both answered, and what to say where these are not all."""
  ids = [id_ for id_ in first.fingerprints if id_ in second.fingerprints]
  where = f"{first.path} and {second.path}"
  if not ids:
    counts = (f"{len(ids)} ({_list_some(list(ids))})" for ids in (first.fingerprints, second.fingerprints))
    raise UserError(f"{where}: share no question; the first has {next(counts)}, the second {next(counts)}")
  others = [id_ for id_ in ids if first.fingerprints[id_] != second.fingerprints[id_]]
  if others:
    raise UserError(f"{where}: of {len(ids)} shared ids {len(others)} have another question or another gold answer in "
                    f"the other ({_list_some(others)}), so these are not the same questions")
  alone = [(answers, [id_ for id_ in answers.fingerprints if id_ not in other.fingerprints])
           for answers, other in ((first, second), (second, first))]
  said = [f"{answers.path} alone has {len(more)} ({_list_some(more)})" for answers, more in alone if more]
  return ids, f"compared on the {len(ids)} questions that both answered; {'; '.join(said)}" if said else ""


def _compare_metric(parts: Sequence[tuple[Answers, Answers, Sequence[str]]], metric: str) -> Paired:
  weights = None
  if per := METRICS[metric]:
    weights, others = ([answers[i].weights[metric][id_] for *answers, ids in parts for id_ in ids] for i in (0, 1))
    if weights != others:
      raise UserError(f"{parts[0][0].path} and {parts[0][1].path}: their {per} differ, as of other texts, so "
                      f"{_describe_metric(metric)} are not to be compared")
  return comparison.compare_paired(*([answers[i].scores[metric][id_] for *answers, ids in parts for id_ in ids]
                                     for i in (0, 1)), weights)


def _describe_metric(metric: str) -> str:
  """A metric in words.

  >>> _describe_metric("nats"), _describe_metric("correct_norm")
  ('nats per bytes', 'correct_norm')
  """
  return f"{metric} per {METRICS[metric]}" if METRICS[metric] else metric


def _folder(answers: Mapping[str, Answers]) -> str:
  return str(next(iter(answers.values())).path.parent) if answers else "the one"


def _list_some(ids: Sequence[str]) -> str:
  return ", ".join(ids[:_MOST]) + (f" and {len(ids) - _MOST} more" if len(ids) > _MOST else "")


def format_table(found: Comparison, this: Path, other: Path) -> str:
  """A comparison as lines for the terminal."""
  head = ["", "n", "this", "other", "difference", "only this", "only other", "p", "p (Holm)", "real at 5 %"]
  rows = [[line.label, str(d.n), f"{d.first:.3f}", f"{d.second:.3f}", f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]",
           *("" if count is None else str(count) for count in (d.wins, d.losses)), f"{d.p:.2g}", f"{line.p:.2g}",
           "yes" if line.real else "no"] for line in found.lines for d in (line.paired,)]
  widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
  text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
          for row in (head, *rows)]
  tests = "McNemar's (mid-p)"
  if any(line.paired.wins is None for line in found.lines):
    tests += ", of scores that are not 0 or 1 a randomisation test's"
  return "\n".join([f"{this} against {other}, on the same questions; brackets are 95 % intervals (paired bootstrap), p "
                    f"is {tests}, corrected by Holm over the {len(rows)} lines", *text, *found.notes])


def to_json(found: Comparison, other: Path) -> dict[str, Any]:
  """A comparison as JSON."""
  return {"against": str(other), "tests": [
      {"task": line.task, "metric": line.metric, "n": d.n, "this": d.first, "other": d.second, "difference": d.value,
       "low": d.low, "high": d.high, "only_this": d.wins, "only_other": d.losses, "p": d.p, "p_holm": line.p,
       "real": line.real} for line in found.lines for d in (line.paired,)], "notes": list(found.notes)}


def read_protocols(folder: Path) -> dict[str, str]:
  """How the answers in a folder were asked for, by task, as scores.json beside them or their run's run.json says."""
  if (folder / "scores.json").is_file():
    told = files.read_json(folder / "scores.json")
  else:
    run = next((above for above in folder.parents if (above / "run.json").is_file()), None)
    stages = files.read_json(run / "run.json").get("stages", {}) if run else {}
    told = stages.get(str(folder.relative_to(run)), {}).get("facts", {}) if run else {}
  return {task: _describe_protocol(how) for task, how in told.get("protocol", {}).items()}


def _describe_protocol(how: Mapping[str, Any]) -> str:
  """Describes how a task was asked, as `evaluating.describe` recorded it; older records say less."""
  parts = [f"protocol {how['name']} with worked examples: {how['shots']}", *["chat template"] * bool(how.get("chat")),
           *(f"{text} {how[key]!r}" for key, text in (
               ("header", "header"), ("stop", "stop"), ("max_new_tokens", "at most so many tokens:")) if key in how)]
  return ", ".join(parts)


def report(this: Path, others: Mapping[Path, Mapping[str, Answers]], out: Path | None) -> None:
  """Prints a table of a folder's answers against those of each other, and writes them to a JSON file."""
  answers = read_folder(this)
  found, ours = {other: compare(answers, given) for other, given in others.items()}, read_protocols(this)
  for other, of in found.items():
    theirs = read_protocols(other)
    found[other] = of._replace(notes=(*of.notes, *(
        f"{task}: asked in other ways, this {ours[task]}; other {theirs[task]}"
        for task in ours if task in theirs and ours[task] != theirs[task])))
  if out:
    files.write_text(out, json.dumps([to_json(of, other) for other, of in found.items()], indent=1) + "\n")
  for other, of in found.items():
    print(f"\n{format_table(of, this, other)}")
