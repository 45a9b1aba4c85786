"""Word problems that take one step with whole numbers, with worked answers written from their equations."""

import hashlib
import re

from imm_jax.tasks.base import Example
from imm_jax.tasks.fields import Record, number, text_of, worked

# `7+2`, `X=(7.0+2.0)`, `7+2=x`; a share such as 0.5, or a second step, does not fit.
_STEP = re.compile(r"(?:[a-z_]\w*=)?\(?([0-9]+)(?:\.0+)?([-+*/])([0-9]+)(?:\.0+)?\)?(?:=[a-z_]\w*)?", re.IGNORECASE)
_SIGNS = {"*": "x"}
# A record's names of question, equation and solution; the first that it has.
NAMES = (("question", "expression", "result_float"), ("squestion", "lequations", "lsolutions"),
         ("original_text", "equation", "ans"))
_TEST_SHARE = 3


def parse(record: Record) -> Example | None:
  """A record of MAWPS, in any of the forms in which it is published; None for what takes more than one step.

  >>> parse({"question": "Ann has 7 nuts, Bob 2. How many is that?", "expression": "7 + 2", "result_float": 9.0})[1:4]
  ('Ann has 7 nuts, Bob 2. How many is that?', '9', '7 + 2 = 9.\\nThe answer is 9')
  """
  question, equation, solution = next((names for names in NAMES if record.keys() >= set(names)), NAMES[0])
  written, gold = _only(record[equation]), _only(record[solution])
  step = _STEP.fullmatch(re.sub(r"\s", "", written)) if isinstance(written, str) else None
  gold = None if step is None or gold is None else number(gold)
  if gold is None or not gold.isdigit():
    return None
  a, sign, b = int(step[1]), step[2], int(step[3])
  # Some published solutions do not follow from their equations.
  if {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[sign] != int(gold):
    return None
  return worked(text_of(record, question), gold, f"{a} {_SIGNS.get(sign, sign)} {b} = {gold}.", "number")


def _only(value: object) -> object:
  """The only entry of a list, None of another list; what is no list itself."""
  if isinstance(value, list):
    return value[0] if len(value) == 1 else None
  return value


def select(record: Record, split: str) -> bool:
  """Whether a record takes one step and belongs to the split: by its words a third are the test set, whatever the
  source and its order."""
  found = parse(record)
  if found is None:
    return False
  words = "".join(found.question.split())
  return (hashlib.sha256(words.encode()).digest()[0] % _TEST_SHARE == 0) == (split == "test")
