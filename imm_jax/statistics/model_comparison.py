"""Compares the answers of two models on disk, question by question, and tests which differences are significant."""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imm_jax import files
from imm_jax.errors import UserError, join_items
from imm_jax.statistics import paired_tests
from imm_jax.statistics.paired_tests import Paired

# Fields of a row that hold a score of its question, each with the field that it is divided by, if it is a rate. A rate,
# row["nats"] / row["bytes"], is weighted with row["bytes"], so that a mean over texts is the rate of all their bytes.
# It is per byte because another tokenizer has other tokens.
METRICS: Mapping[str, str | None] = {"correct": None, "correct_norm": None, "nats": "bytes"}
# Number of question ids that a message lists.
_MAX_IDS = 3


class Answers(NamedTuple):
  """Holds the scores of a model's answers to the questions of a task.

  Attributes:
    path: the file.
    fingerprints: by question id, a hash of the question and its gold answer.
    scores: by metric and question id, the score.
    weights: by metric, if it is a rate, and question id, the weight.
  """

  path: Path
  fingerprints: dict[str, int]
  scores: dict[str, dict[str, float]]
  weights: dict[str, dict[str, float]]


class Line(NamedTuple):
  """Holds the difference between two models on a task; a line of the table.

  Attributes:
    task: name of the task.
    metric: a key of METRICS.
    paired: scores of both models, their difference and its interval.
    p: p-value, corrected by Holm's method over the lines of the comparison.
  """

  task: str
  metric: str
  paired: Paired
  p: float

  @property
  def label(self) -> str:
    """Returns the task, and the metric unless it is `correct`."""
    return self.task if self.metric == "correct" else f"{self.task}, {_describe_metric(self.metric)}"

  @property
  def significant(self) -> bool:
    """Returns whether the corrected p-value is below 0.05."""
    return paired_tests.is_significant(self.p)


class Comparison(NamedTuple):
  """Holds the differences between two models on the tasks that both have answered.

  Attributes:
    lines: the difference on each task in each metric.
    notes: what was not compared, with the reason, a line each.
  """

  lines: tuple[Line, ...]
  notes: tuple[str, ...]


def read_folder(folder: Path) -> dict[str, Answers]:
  """Reads the answers of a model, by task.

  Args:
    folder: an --out of `imm evaluate`, or an eval folder of a run, such as RUN/round_0/eval/sft.

  Raises:
    UserError: when it holds no answers, or a file cannot be read.
  """
  paths = [path for path in sorted(folder.glob("*.jsonl")) if not path.stem.endswith("_samples")]
  below = sorted({str(path.parent) for path in folder.glob("**/eval/**/*.jsonl")}) if folder.is_dir() else []
  if not paths or below:  # a run directory or a round, whose own jsonl files are not answers
    choices = f"one of {join_items(below)}" if below else "a folder such as RUN/base/eval or RUN/round_0/eval/sft"
    raise UserError(f"{folder}: is no folder of answers (<task>.jsonl); expected an --out of imm evaluate, or of a "
                    f"run {choices}")
  return {path.stem: read_answers(path) for path in paths}


def read_answers(path: Path) -> Answers:
  """Reads <task>.jsonl; a file that has not changed since the last call is not read again.

  Raises:
    UserError: when a line is not the row of a question or has no score, or a question occurs twice.
  """
  stat = path.stat()
  return _read(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1024)
def _read(path: Path, *_: int) -> Answers:
  rows = files.read_jsonl(path, {"id": str})
  if not rows:
    raise UserError(f"{path}: holds no answer")
  fingerprints = {row["id"]: hash(repr((row.get("question"), row.get("gold")))) for row in rows}
  if len(fingerprints) < len(rows):
    ids = [row["id"] for row in rows]
    raise UserError(f"{path}: question {next(id_ for id_ in ids if ids.count(id_) > 1)} is duplicated")
  metrics = [metric for metric in METRICS if metric in rows[0]]
  if not metrics:
    raise UserError(f"{path}:1: holds no score; expected one of {', '.join(METRICS)}")
  answers = Answers(path, fingerprints, {metric: {} for metric in metrics}, {m: {} for m in metrics if METRICS[m]})
  for number, row in enumerate(rows, 1):
    for metric in metrics:
      divisor = METRICS[metric]
      for field, minimum in ((metric, -math.inf), *([(divisor, 0)] if divisor else [])):
        if not isinstance(row.get(field), int | float) or not minimum < row[field] < math.inf:
          raise UserError(f"{path}:{number}: {field!r} is missing or no number that can be compared")
      answers.scores[metric][row["id"]] = row[metric] / row[divisor] if divisor else float(row[metric])
      if divisor:
        answers.weights[metric][row["id"]] = float(row[divisor])
  return answers


def compare(first: Mapping[str, Answers], second: Mapping[str, Answers], *, pooled: Mapping[str, Sequence[str]] = {},
            ) -> Comparison:
  """Compares two models task by task, on the questions that both answered; p-values are corrected over all lines.

  Args:
    first: answers of one model, by task.
    second: answers of the other model, by task.
    pooled: names of further lines, each with the tasks whose questions it pools.

  Raises:
    UserError: when the models share no task, a task has no question that both answered, or a question's text or gold
      answer differs between them.
  """
  shared = [task for task in first if task in second]
  if not shared:
    raise UserError(f"no task has answers of both: {_folder(first)} has {join_items(list(first))}; "
                    f"{_folder(second)} has {join_items(list(second))}")
  notes = [f"not compared, because {_folder(b)} has no answers to it: {task}"
           for a, b in ((first, second), (second, first)) for task in a if task not in b]
  ids_by_task = {}
  for task in shared:
    ids_by_task[task], note = _match_questions(first[task], second[task])
    notes += [f"{task}: {note}"] * bool(note)
  differences = []
  for name, tasks in ({task: [task] for task in shared} | dict(pooled)).items():
    for metric in METRICS:
      parts = [(first[t], second[t], ids_by_task[t]) for t in tasks if t in ids_by_task]
      parts = [part for part in parts if metric in part[0].scores and metric in part[1].scores]
      if parts and (name in ids_by_task or len(parts) > 1):
        differences.append((name, metric, _compare_metric(parts, metric)))
  corrected = paired_tests.holm([paired.p for *_, paired in differences])
  return Comparison(tuple(Line(*line, p) for line, p in zip(differences, corrected, strict=True)), tuple(notes))


def _match_questions(first: Answers, second: Answers) -> tuple[list[str], str]:
  """Returns the ids of the questions that both answered, and a note if these are not all of them."""
  ids = [id_ for id_ in first.fingerprints if id_ in second.fingerprints]
  paths = f"{first.path} and {second.path}"
  if not ids:
    counts = (f"{len(ids)} ({_list_some(list(ids))})" for ids in (first.fingerprints, second.fingerprints))
    raise UserError(f"{paths}: share no question; the first has {next(counts)}, the second {next(counts)}")
  differing = [id_ for id_ in ids if first.fingerprints[id_] != second.fingerprints[id_]]
  if differing:
    raise UserError(f"{paths}: of {len(ids)} shared ids {len(differing)} have another question or another gold answer "
                    f"in the other ({_list_some(differing)}), so these are not the same questions")
  unshared = [(answers, [id_ for id_ in answers.fingerprints if id_ not in other.fingerprints])
              for answers, other in ((first, second), (second, first))]
  notes = [f"{len(more)} only in {answers.path} ({_list_some(more)})" for answers, more in unshared if more]
  return ids, f"compared on the {len(ids)} questions that both answered; {'; '.join(notes)}" if notes else ""


def _compare_metric(parts: Sequence[tuple[Answers, Answers, Sequence[str]]], metric: str) -> Paired:
  weights = None
  if divisor := METRICS[metric]:
    weights, other_weights = ([answers[i].weights[metric][id_] for *answers, ids in parts for id_ in ids]
                              for i in (0, 1))
    if weights != other_weights:
      raise UserError(f"{parts[0][0].path} and {parts[0][1].path}: their {divisor} differ, as of other texts, so "
                      f"{_describe_metric(metric)} cannot be compared")
  first, second = ([answers[i].scores[metric][id_] for *answers, ids in parts for id_ in ids] for i in (0, 1))
  return paired_tests.compare_paired(first, second, weights)


def _describe_metric(metric: str) -> str:
  """Names a metric for the user.

  >>> _describe_metric("nats"), _describe_metric("correct_norm")
  ('nats per bytes', 'correct_norm')
  """
  return f"{metric} per {METRICS[metric]}" if METRICS[metric] else metric


def _folder(answers: Mapping[str, Answers]) -> str:
  return str(next(iter(answers.values())).path.parent) if answers else "the one"


def _list_some(ids: Sequence[str]) -> str:
  return ", ".join(ids[:_MAX_IDS]) + (f" and {len(ids) - _MAX_IDS} more" if len(ids) > _MAX_IDS else "")


def format_table(result: Comparison, this: Path, other: Path) -> str:
  """Formats the comparison of two folders as a table for the terminal, with its notes below."""
  head = ["", "n", "this", "other", "difference", "only this", "only other", "p", "p (Holm)", "significant at 5 %"]
  rows = [[line.label, str(d.n), f"{d.first:.3f}", f"{d.second:.3f}", f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]",
           *("" if count is None else str(count) for count in (d.wins, d.losses)), f"{d.p:.2g}", f"{line.p:.2g}",
           "yes" if line.significant else "no"] for line in result.lines for d in (line.paired,)]
  widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
  text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
          for row in (head, *rows)]
  tests = "McNemar's test (mid-p)"
  if any(line.paired.wins is None for line in result.lines):
    tests += ", or a randomization test for scores other than 0 and 1"
  return "\n".join([f"{this} against {other}, on the same questions", *text, "brackets: 95 % intervals (paired "
                    f"bootstrap); p: {tests}, corrected by Holm over the {len(rows)} lines", *result.notes])


def to_json(result: Comparison, other: Path) -> dict[str, Any]:
  """Returns a comparison with the folder `other` in JSON types."""
  return {"against": str(other), "tests": [
      {"task": line.task, "metric": line.metric, "n": d.n, "this": d.first, "other": d.second, "difference": d.value,
       "low": d.low, "high": d.high, "only_this": d.wins, "only_other": d.losses, "p": d.p, "p_holm": line.p,
       "real": line.significant} for line in result.lines for d in (line.paired,)], "notes": list(result.notes)}


def read_protocols(folder: Path) -> dict[str, Mapping[str, Any]]:
  """Returns how the questions of a folder's answers were asked, by task, as `evaluate.describe_protocol` recorded it.

  The source is scores.json beside the answers, or run.json of their run.
  """
  if (folder / "scores.json").is_file():
    facts = files.read_json(folder / "scores.json")
  else:
    run = next((above for above in folder.parents if (above / "run.json").is_file()), None)
    stages = files.read_json(run / "run.json").get("stages", {}) if run else {}
    facts = stages.get(str(folder.relative_to(run)), {}).get("facts", {}) if run else {}
  return dict(facts.get("protocol", {}))


def _describe_difference(this: Mapping[str, Any], other: Mapping[str, Any]) -> str:
  """Says how two protocols differ, or that their worked examples do if both are recorded; "" if they do not."""
  texts = _describe_protocol(this), _describe_protocol(other)
  if texts[0] != texts[1]:
    return f"asked in other ways, this {texts[0]}; other {texts[1]}"
  digests = {protocol.get("shots_digest") for protocol in (this, other)} - {None}
  return "asked with other worked examples" if len(digests) > 1 else ""


def _describe_protocol(protocol: Mapping[str, Any]) -> str:
  """Describes a protocol as it was recorded; records of older versions have fewer keys."""
  parts = [f"protocol {protocol['name']} with worked examples: {protocol['shots']}",
           *["chat template"] * bool(protocol.get("chat")),
           *(f"{text} {protocol[key]!r}" for key, text in (
               ("header", "header"), ("stop", "stop"), ("max_new_tokens", "at most so many tokens:"))
             if key in protocol)]
  return ", ".join(parts)


def print_and_write(this: Path, baselines: Mapping[Path, Mapping[str, Answers]], out: Path | None) -> None:
  """Compares a folder's answers with those of other folders; prints the tables and writes the tests to a JSON file.

  Args:
    this: the folder.
    baselines: answers by task of each other folder.
    out: the JSON file, or None to write none.

  Raises:
    UserError: as `read_folder` and, once what can be compared is printed and written, as `compare`.
  """
  answers, results, failures = read_folder(this), {}, []
  protocols = read_protocols(this)
  for other, other_answers in baselines.items():
    try:
      result = compare(answers, other_answers)
    except UserError as e:
      failures.append(e)
      continue
    other_protocols = read_protocols(other)
    results[other] = result._replace(notes=(*result.notes, *(
        f"{task}: {difference}" for task in protocols if task in other_protocols and (
            difference := _describe_difference(protocols[task], other_protocols[task])))))
  if out and results:
    files.write_json(out, [to_json(result, other) for other, result in results.items()])
  for other, result in results.items():
    print(f"\n{format_table(result, this, other)}")
  if failures:
    raise failures[0]
