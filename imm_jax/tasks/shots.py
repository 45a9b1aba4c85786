"""Reads worked examples given by the user for evaluation prompts."""

import os
from collections.abc import Iterator
from typing import Any

from imm_jax.errors import UserError
from imm_jax.tasks import formats, sources
from imm_jax.tasks.base import Example
from imm_jax.tasks.multiple import Question

_NEEDS = "with question, and answer or rationale or both"


def read_examples(path: str, task: str, kind: str) -> list[Example]:
  """Reads a file's worked examples for a task: the rows whose `task` names it, or else those without a `task`.

  A row has a `question` and a `rationale`, which is shown; if it has an `answer` too, the rationale is extended to end
  in `The answer is X`. Without `rationale` the `answer` is shown as it is.

  Args:
    path: a jsonl, json or csv file.
    task: name of the task.
    kind: kind of its answers: `number`, `latex` or `choice`.

  Raises:
    UserError: for a file that cannot be read, or a row that is no worked example.
  """
  rows = list(_read_rows(path))
  own_rows = [row for row in rows if row[1].get("task") == task]
  used = own_rows or [row for row in rows if not row[1].get("task")]
  return [_make_example(location, row, kind) for location, row in used]


def read_questions(path: str) -> list[str]:
  """Reads the questions of all rows of such a file."""
  return [row["question"] for _, row in _read_rows(path)]


def _read_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
  for location, row in sources.read(f"file:{os.path.expanduser(path)}", sources.ReadOptions("shots", needs=_NEEDS)):
    invalid = [name for name in ("question", "answer", "rationale") if not _is_text(row.get(name, "-"))]
    if invalid or "question" not in row or not ("answer" in row or "rationale" in row):
      problem = f"{invalid[0]!r} is empty or no text" if invalid else f"has the fields {', '.join(row)}"
      raise UserError(f"{location}: {problem}; expected rows {_NEEDS}, all of them text")
    yield location, row


def _is_text(value: Any) -> bool:
  return isinstance(value, str) and bool(value.strip())


def _make_example(location: str, row: dict[str, Any], kind: str) -> Example:
  if not ("answer" in row and "rationale" in row):
    worked = row["rationale" if "rationale" in row else "answer"]
    return Example(location, row["question"].strip(), "", worked.strip(), kind)
  try:
    parsed = formats.custom_parser({"question": "question", "answer": "answer", "rationale": "rationale"}, kind)(row)
  except ValueError as e:
    raise UserError(f"{location}: {e}") from e
  if parsed is None:
    raise UserError(f"{location}: its answer {row['answer'][:50]!r} is no {kind} that can be judged")
  return (parsed.example if isinstance(parsed, Question) else parsed)._replace(id=location)
