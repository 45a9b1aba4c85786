"""Reads worked examples given by the user for evaluation prompts."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from imm_jax.errors import UserError, print_once
from imm_jax.tasks import answers, custom, custom_notes, sources
from imm_jax.tasks.base import Example
from imm_jax.tasks.fields import make_example
from imm_jax.tasks.multiple import Question

_TEXTS = ("question", "rationale")


def read_examples(path: str, task: str, kind: str, fields: Mapping[str, str] | None = None) -> list[Example]:
  """Reads a file's worked examples for a task: the rows whose `task` names it, or else those without a `task`.

  A row has a `question` and a `rationale`, which is shown; if it has an `answer` too, the rationale is extended to end
  in `The answer is X`. Without `rationale` the `answer` is shown: as it is if it is read as the gold, which a letter
  alone need not be, else as `The answer is X` below it. Answers and options are read as those of task `custom` are.

  Args:
    path: a jsonl, json or csv file.
    task: name of the task.
    kind: kind of its answers: `number`, `latex` or `choice`.
    fields: names that rows may have in place of these, as `task.fields` gives them.

  Raises:
    UserError: for a file that cannot be read, or a row that is no worked example.
  """
  rows = list(_read_rows(path, fields or {}))
  own_rows = [row for row in rows if row[1].get("task") == task]
  used = own_rows or [row for row in rows if not row[1].get("task")]
  examples = [_make_example(location, row, kind) for location, row in used]
  observed = custom_notes.Observations({name: name for name in custom.FIELDS}, kind)
  for example, (location, row) in zip(examples, used, strict=True):
    if example.answer and (kind != "choice" or custom.lists_options(example.question)):
      observed.add(location, row, Question(example, None))
  for warning in observed.make_warnings(f"worked examples of {path}"):
    print_once(warning)
  return examples


def read_questions(path: str, kind: str, fields: Mapping[str, str] | None = None) -> list[str]:
  """Reads the questions of all rows of such a file, as they are shown for a task with answers of this kind."""
  return [_make_question(location, row, kind) for location, row in _read_rows(path, fields or {})]


def _read_rows(path: str, fields: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (location, row) with the fields under their usual names."""
  own = {field: (fields.get(field) or field).lower() for field in custom.FIELDS}
  shown = {field: fields.get(field) or field for field in custom.FIELDS}
  needs = f"with {shown['question']}, and {shown['answer']} or {shown['rationale']} or both"
  for location, row in sources.read(f"file:{os.path.expanduser(path)}", sources.ReadOptions("shots", needs=needs)):
    named = {field: row.get(name, row.get(field)) for field, name in own.items()}
    others = {key: value for key, value in row.items() if key not in own and key not in own.values()}
    row = {key: value for key, value in (named | others).items() if value is not None}
    invalid = [field for field in _TEXTS if not _is_text(row.get(field, "-"))]
    if not custom.is_scalar(row.get("answer", "-")) or not str(row.get("answer", "-")).strip():
      invalid.append("answer")
    if invalid or "question" not in row or not ("answer" in row or "rationale" in row):
      problem = f"{shown[invalid[0]]!r} is empty or no text" if invalid else f"has the fields {', '.join(row)}"
      raise UserError(f"{location}: {problem}; expected rows {needs}, all of them text (an answer may be a number)")
    yield location, row


def _is_text(value: Any) -> bool:
  return isinstance(value, str) and bool(value.strip())


def _make_question(location: str, row: dict[str, Any], kind: str) -> str:
  question = row["question"].strip()
  if kind != "choice":
    return question
  unshown = custom.find_unshown_options(row, {name: name for name in custom.FIELDS if name in row}, question)
  if unshown:
    raise UserError(f"{location}: {unshown!r} looks like options, which are not shown; name the field choices, or as "
                    "task.fields.choices does")
  try:
    return custom.list_options(question, row["choices"]) if "choices" in row else question
  except ValueError as e:
    raise UserError(f"{location}: {e}") from e


def _make_example(location: str, row: dict[str, Any], kind: str) -> Example:
  question = _make_question(location, row, kind)
  if kind != "choice" and "choices" in row:
    raise UserError(f"{location}: has options, which are not shown, while the answers are of kind {kind}; leave them "
                    "out, or give the row the `task` that it is for")
  if "answer" not in row:
    return Example(location, question, "", row["rationale"].strip(), kind)
  try:
    parsed = custom.make_parser({name: name for name in custom.FIELDS if name in row}, kind)(row)
  except ValueError as e:
    raise UserError(f"{location}: {e}") from e
  if parsed is None:
    raise UserError(f"{location}: its answer {str(row['answer'])[:50]!r} is no {kind} that can be judged; expected "
                    f"{custom.EXPECTED[kind]}")
  example = parsed.example if isinstance(parsed, Question) else parsed
  stated = custom.find_stated(row.get("rationale", ""))
  if stated and (other := _read_gold({**row, "answer": stated}, kind)) and not answers.verdict(
      f"The answer is {other}", example.answer, kind, strict=False).correct:
    raise UserError(f"{location}: its rationale states another answer, {other}, than {example.answer}")
  if "rationale" not in row:
    example = example._replace(rationale=_show_answer(str(row["answer"]).strip(), example.answer, kind))
  return example._replace(id=location)


def _read_gold(row: dict[str, Any], kind: str) -> str:
  """Returns the answer that a row is read as; nothing if none can be judged."""
  try:
    parsed = custom.make_parser({name: name for name in custom.FIELDS if name in row}, kind)(row)
  except ValueError:
    return ""
  return (parsed.example if isinstance(parsed, Question) else parsed).answer if parsed else ""


def _show_answer(text: str, gold: str, kind: str) -> str:
  """Returns an answer that has no rationale as it is shown: in a form from which the gold can be read.

  >>> _show_answer("#### 7", "7", "number"), _show_answer("tea", "B", "choice")
  ('#### 7', 'The answer is B')
  """
  if kind == "choice" and custom.find_stated(text) is None:
    return f"The answer is {gold}"
  is_read = (re.search(rf"answer is \(?{gold}\b", text) if kind == "choice" else
             answers.verdict(text, gold, kind, strict=False).correct)
  example = make_example("", gold, text, kind)
  return text if is_read or example is None else example.rationale
