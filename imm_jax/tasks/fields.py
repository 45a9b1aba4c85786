"""Reads the fields of published records; raises ValueError for values of the wrong kind."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from imm_jax.tasks import answers
from imm_jax.tasks.base import Example

Record = Mapping[str, Any]  # with lower-case keys
Parser = Callable[[Record], Example | None]


def get_text(record: Record, field: str) -> str:
  """Returns a field's text without surrounding white space; raises ValueError if it is empty or no text."""
  value = record[field]
  if not isinstance(value, str) or not value.strip():
    raise ValueError(f"{field!r} is {'empty' if isinstance(value, str) else 'no text'}")
  return value.strip()


def get_raw_text(record: Record, field: str) -> str:
  """Returns a field's text unchanged, empty if the field is missing; raises ValueError if it is no text."""
  value = record.get(field)
  if value is not None and not isinstance(value, str):
    raise ValueError(f"{field!r} is no text")
  return value or ""


def parse_gold(value: Any) -> str | None:
  """Normalizes a gold number, removing commas, currency signs and the decimals of whole numbers; None for other text.

  >>> parse_gold("$1,600"), parse_gold(504.0), parse_gold(" 5/2 "), parse_gold("3:30 p.m.")
  ('1600', '504', '5/2', None)
  """
  if isinstance(value, bool) or not isinstance(value, str | int | float):
    raise ValueError(f"{value!r} is no number")
  text = str(value).strip().replace(",", "").lstrip("$")
  if answers.parse_number(str(value)) is None:
    return None
  return text[:-2] if re.fullmatch(r"-?[0-9]+\.0", text) else text


def make_example(question: str, gold: str | None, rationale: str, kind: str) -> Example | None:
  """Makes an Example, whose rationale if there is one is extended to end in `The answer is X`; None without a gold."""
  if not gold:
    return None
  gold = " ".join(gold.split())
  rationale = rationale.strip()
  conclusion = f"The answer is {gold}"
  if rationale and not rationale.rstrip(".").endswith(conclusion):
    rationale += f"\n{conclusion}"
  return Example("", question, gold, rationale, kind)
