"""The values of a published record: text, numbers, and what an Example is made of; ValueError where they are not."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from imm_jax.tasks import answers
from imm_jax.tasks.base import Example

Record = Mapping[str, Any]  # with lower-case keys
Parser = Callable[[Record], Example | None]


def text_of(record: Record, field: str) -> str:
  """A field's text without white space around it; ValueError where it has none."""
  value = record[field]
  if not isinstance(value, str) or not value.strip():
    raise ValueError(f"{field!r} is {'empty' if isinstance(value, str) else 'no text'}")
  return value.strip()


def raw_of(record: Record, field: str) -> str:
  """A field's text as it stands, which may be empty or lacking; ValueError for what is no text."""
  value = record.get(field)
  if value is not None and not isinstance(value, str):
    raise ValueError(f"{field!r} is no text")
  return value or ""


def number(value: Any) -> str | None:
  """A gold number, bare: without commas, units of money, or the decimals of a whole number; None for anything else.

  >>> number("$1,600"), number(504.0), number(" 5/2 "), number("3:30 p.m.")
  ('1600', '504', '5/2', None)
  """
  if isinstance(value, bool) or not isinstance(value, str | int | float):
    raise ValueError(f"{value!r} is no number")
  text = str(value).strip().replace(",", "").lstrip("$")
  if answers.parse_number(str(value)) is None:
    return None
  return text[:-2] if re.fullmatch(r"-?[0-9]+\.0", text) else text


def worked(question: str, gold: str | None, rationale: str, kind: str) -> Example | None:
  """An example whose rationale, if it has one, ends in `The answer is X`, in one line."""
  if not gold:
    return None
  gold = " ".join(gold.split())
  rationale = rationale.strip()
  end = f"The answer is {gold}"
  if rationale and not rationale.rstrip(".").endswith(end):
    rationale += f"\n{end}"
  return Example("", question, gold, rationale, kind)
