"""Worked examples that a user gives, for prompts of evaluation."""

import os
from collections.abc import Iterator
from typing import Any

from imm_jax.errors import UserError
from imm_jax.tasks import formats, sources
from imm_jax.tasks.base import Example
from imm_jax.tasks.multiple import Posed

_NEEDS = "with question, and answer or rationale or both"


def read(path: str, task: str, kind: str) -> list[Example]:
  """The worked examples of a file for a task: of the rows whose `task` names it, else of those that name none.

  A row has a `question` and a `rationale`, which is shown; with `answer` it is made to end in `The answer is X`.
  Without `rationale` the `answer` is shown as it is.

  Args:
    path: of jsonl, json or csv.
    task: its name.
    kind: of its answers: `number`, `latex` or `choice`.

  Raises:
    UserError: for a file that cannot be read, and for a row of it that is no worked example.
  """
  rows = list(_rows(path))
  named = [row for row in rows if row[1].get("task") == task]
  return [_example(place, row, kind) for place, row in named or [row for row in rows if not row[1].get("task")]]


def questions(path: str) -> list[str]:
  """The questions of all rows of such a file."""
  return [row["question"] for _, row in _rows(path)]


def _rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
  for place, row in sources.read(f"file:{os.path.expanduser(path)}", sources.Where("shots", needs=_NEEDS)):
    wrong = [name for name in ("question", "answer", "rationale") if not _is_text(row.get(name, "-"))]
    if wrong or "question" not in row or not ("answer" in row or "rationale" in row):
      what = f"{wrong[0]!r} is empty or no text" if wrong else f"has the fields {', '.join(row)}"
      raise UserError(f"{place}: {what}; expected rows {_NEEDS}, all of them text")
    yield place, row


def _is_text(value: Any) -> bool:
  return isinstance(value, str) and bool(value.strip())


def _example(place: str, row: dict[str, Any], kind: str) -> Example:
  if not ("answer" in row and "rationale" in row):
    return Example(place, row["question"].strip(), "", row.get("rationale", row.get("answer")).strip(), kind)
  try:
    found = formats.custom({"question": "question", "answer": "answer", "rationale": "rationale"}, kind)(row)
  except ValueError as e:
    raise UserError(f"{place}: {e}") from e
  if found is None:
    raise UserError(f"{place}: its answer {row['answer'][:50]!r} is no {kind} that can be judged")
  return (found.example if isinstance(found, Posed) else found)._replace(id=place)
