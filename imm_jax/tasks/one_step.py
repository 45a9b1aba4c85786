"""Parses MAWPS problems that take one step with whole numbers, with worked answers generated from their equations."""

import hashlib
import re

from imm_jax.tasks.base import Example
from imm_jax.tasks.fields import Record, get_text, make_example, parse_gold

# Matches `7+2`, `X=(7.0+2.0)`, `7+2=x`, but no fractions such as 0.5 and no second step.
_STEP = re.compile(r"(?:[a-z_]\w*=)?\(?([0-9]+)(?:\.0+)?([-+*/])([0-9]+)(?:\.0+)?\)?(?:=[a-z_]\w*)?", re.IGNORECASE)
_SIGNS = {"*": "x"}
# Field names of question, equation and solution; the first triple that a record has is used.
NAMES = (("question", "expression", "result_float"), ("squestion", "lequations", "lsolutions"),
         ("original_text", "equation", "ans"))
_TEST_SHARE = 3


def parse(record: Record) -> Example | None:
  """Parses a record of MAWPS in any of its published forms; returns None if it takes more than one step.

  >>> parse({"question": "Ann has 7 nuts, Bob 2. How many is that?", "expression": "7 + 2", "result_float": 9.0})[1:4]
  ('Ann has 7 nuts, Bob 2. How many is that?', '9', '7 + 2 = 9.\\nThe answer is 9')
  """
  question, equation, solution = next((names for names in NAMES if record.keys() >= set(names)), NAMES[0])
  expression, gold = _get_only(record[equation]), _get_only(record[solution])
  step = _STEP.fullmatch(re.sub(r"\s", "", expression)) if isinstance(expression, str) else None
  gold = None if step is None or gold is None else parse_gold(gold)
  if step is None or gold is None or not gold.isdigit():
    return None
  a, operator, b = int(step[1]), step[2], int(step[3])
  # Some published solutions do not follow from their equations.
  if {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[operator] != int(gold):
    return None
  return make_example(get_text(record, question), gold, f"{a} {_SIGNS.get(operator, operator)} {b} = {gold}.", "number")


def _get_only(value: object) -> object:
  """Returns the only entry of a list, None for other lists, and anything else unchanged."""
  if isinstance(value, list):
    return value[0] if len(value) == 1 else None
  return value


def select(record: Record, split: str) -> bool:
  """Returns whether a record takes one step and belongs to the split: a third, chosen by a hash of the words, are the
  test set, independently of the source and its order."""
  example = parse(record)
  if example is None:
    return False
  words = "".join(example.question.split())
  return (hashlib.sha256(words.encode()).digest()[0] % _TEST_SHARE == 0) == (split == "test")
