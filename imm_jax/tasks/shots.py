"""Reads worked examples given by the user for evaluation prompts."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from imm_jax.errors import UserError
from imm_jax.tasks import custom, sources
from imm_jax.tasks.base import Example
from imm_jax.tasks.multiple import Question

_TEXTS = ("question", "answer", "rationale")


def read_examples(path: str, task: str, kind: str, fields: Mapping[str, str] | None = None) -> list[Example]:
  """Reads a file's worked examples for a task: the rows whose `task` names it, or else those without a `task`.

  A row has a `question` and a `rationale`, which is shown; if it has an `answer` too, the rationale is extended to end
  in `The answer is X`. Without `rationale` the `answer` is shown as it is. In multiple choice the options of `choices`
  are shown as those of questions are.

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
  return [_make_example(location, row, kind) for location, row in used]


def read_questions(path: str, kind: str, fields: Mapping[str, str] | None = None) -> list[str]:
  """Reads the questions of all rows of such a file, as they are shown for a task with answers of this kind."""
  return [_make_question(location, row, kind) for location, row in _read_rows(path, fields or {})]


def _read_rows(path: str, fields: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (location, row) with the fields under their usual names."""
  own = {field: (fields.get(field) or field).lower() for field in custom.FIELDS}
  needs = f"with {own['question']}, and {own['answer']} or {own['rationale']} or both"
  for location, row in sources.read(f"file:{os.path.expanduser(path)}", sources.ReadOptions("shots", needs=needs)):
    named = {field: row.get(name, row.get(field)) for field, name in own.items()}
    others = {key: value for key, value in row.items() if key not in own and key not in own.values()}
    row = {key: value for key, value in (named | others).items() if value is not None}
    invalid = [field for field in _TEXTS if not _is_text(row.get(field, "-")) and not (
        field == "answer" and "rationale" in row and isinstance(row[field], int | float))]
    if invalid or "question" not in row or not ("answer" in row or "rationale" in row):
      problem = f"{own[invalid[0]]!r} is empty or no text" if invalid else f"has the fields {', '.join(row)}"
      raise UserError(f"{location}: {problem}; expected rows {needs}, all of them text")
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
  if not ("answer" in row and "rationale" in row):
    worked = row["rationale" if "rationale" in row else "answer"]
    return Example(location, question, "", worked.strip(), kind)
  try:
    parsed = custom.make_parser({name: name for name in custom.FIELDS if name in row}, kind)(row)
  except ValueError as e:
    raise UserError(f"{location}: {e}") from e
  if parsed is None:
    raise UserError(f"{location}: its answer {str(row['answer'])[:50]!r} is no {kind} that can be judged")
  return (parsed.example if isinstance(parsed, Question) else parsed)._replace(id=location)
