"""Parsers of published records: each converts one to an Example without an id, or None without a usable gold.

Those of multiple choice are in `multiple.py`, that of task `custom` in `custom.py`. A record is a dict with lower-case
keys. A value of the wrong kind raises a ValueError that says what was expected.
"""

import hashlib
import re

from imm_jax.tasks import latex
from imm_jax.tasks.base import Example
from imm_jax.tasks.fields import Parser, Record, get_raw_text, get_text, make_example, parse_gold

KINDS = ("number", "latex", "choice")
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
# A gold of ASDiv: a number with its unit in parentheses; fractions may be in parentheses too.
_WITH_UNIT = re.compile(r"(?P<number>-?\(?-?[0-9][0-9.,/ ]*\)?)\s*(?:\([^()]*\))?")
_ORDINAL = re.compile(r"[^0-9]*\b(?P<number>[0-9]+)(?:st|nd|rd|th)\b[^0-9]*")
# An equation of one step: matches `7+2`, `X=(7.0+2.0)`, `7+2=x`, but no fractions such as 0.5 and no second step.
_STEP = re.compile(r"(?:[a-z_]\w*=)?\(?([0-9]+)(?:\.0+)?([-+*/])([0-9]+)(?:\.0+)?\)?(?:=[a-z_]\w*)?", re.IGNORECASE)
_SIGNS = {"*": "x"}
# The published field names of question, equation and solution of MAWPS; the first triple that a record has is used.
ONE_STEP_FIELDS = (("question", "expression", "result_float"), ("squestion", "lequations", "lsolutions"),
                   ("original_text", "equation", "ans"))
# One in this many one-step problems is in the test set.
_TEST_SHARE = 3


def parse_gsm8k(record: Record) -> Example | None:
  """Parses GSM8K: the solution with calculator annotations, then `#### 1,600`.

  >>> example = parse_gsm8k({"question": "What is 2 * 800?", "answer": "2*800 = <<2*800=1600>>1600.\\n#### 1,600"})
  >>> example.answer, example.rationale
  ('1600', '2*800 = 1600.\\nThe answer is 1600')
  """
  work, mark, gold = get_text(record, "answer").rpartition("####")
  if not mark:
    raise ValueError("'answer' has no line `#### number`")
  return make_example(get_text(record, "question"), parse_gold(gold), _CALCULATOR.sub("", work), "number")


def parse_math(record: Record) -> Example | None:
  """Parses MATH, where the gold is the last box of the solution."""
  solution = get_text(record, "solution")
  return make_example(get_text(record, "problem"), latex.extract_gold(solution), solution, "latex")


def parse_math_500(record: Record) -> Example | None:
  """Parses MATH-500, where the gold has a field of its own."""
  return make_example(get_text(record, "problem"), get_text(record, "answer"), get_text(record, "solution"), "latex")


def parse_gsm_plus(record: Record) -> Example | None:
  """Parses GSM-Plus: a number and a worked answer; the gold of unanswerable questions is `None`."""
  rationale = get_raw_text(record, "solution").partition("####")[0]
  return make_example(get_text(record, "question"), parse_gold(record["answer"]), _CALCULATOR.sub("", rationale),
                      "number")


def parse_tabmwp(record: Record) -> Example | None:
  """Parses TabMWP: a table and a question on it, some with options; non-numeric golds are compared as latex."""
  title, choices = str(record.get("table_title") or "").strip(), record.get("choices") or []
  parts = [f"Table: {title}" if title else "Table:", get_text(record, "table"), get_text(record, "question")]
  if choices:
    parts.append(f"Options: {', '.join(map(str, choices))}")
  gold = get_text(record, "answer")
  number = parse_gold(gold) if record.get("ans_type") in ("integer_number", "decimal_number") else None
  return _bare_example("\n".join(parts), number or gold, "number" if number else "latex")


def parse_svamp(record: Record) -> Example | None:
  """Parses SVAMP: a body, which may lack its full stop, and a question."""
  body = get_text(record, "body")
  return _bare_example(f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {get_text(record, 'question')}",
                       parse_gold(record["answer"]), "number")


def parse_asdiv(record: Record) -> Example | None:
  """Parses ASDiv, where most golds are a number with a unit, `9 (apples)`.

  An ordinal (`6th`, `The 60th caller.`) counts as its number. Ratios, times of day, names, yes and no are compared as
  latex. Golds of several values (`30 (girls); 15 (boys)`) cannot be judged: None.
  """
  question, gold = f"{get_text(record, 'body')} {get_text(record, 'question')}", get_text(record, "answer")
  if ";" in gold:
    return None
  match = _WITH_UNIT.fullmatch(gold) or _ORDINAL.fullmatch(gold)
  number = parse_gold(match["number"].replace("(", "").replace(")", "")) if match else None
  # Remove the full stop of a sentence, but not that of `3:30 p.m.`
  text = re.sub(r"(?<!\.m)\.$", "", gold)
  return _bare_example(question, number, "number") if number else _bare_example(question, text, "latex")


def numeric_parser(question: str, answer: str) -> Parser:
  """Returns a parser of records with a question and a number in these fields."""
  return lambda record: _bare_example(get_text(record, question), parse_gold(record[answer]), "number")


def parse_mawps_source(record: Record) -> Example | None:
  """Parses MAWPS as its authors publish it, with a list of solutions."""
  solutions = record["lsolutions"]
  if not isinstance(solutions, list):
    raise ValueError("'lSolutions' is no list")
  gold = parse_gold(solutions[0]) if len(solutions) == 1 else None
  return _bare_example(get_text(record, "squestion"), gold, "number")


def parse_one_step(record: Record) -> Example | None:
  """Parses a problem of MAWPS in any of its published forms, with an answer worked from its equation.

  Returns None if it takes more than one step, or other numbers than whole ones.

  >>> parse_one_step({"question": "What are 7 and 2 nuts?", "expression": "7 + 2", "result_float": 9.0})[1:4]
  ('What are 7 and 2 nuts?', '9', '7 + 2 = 9.\\nThe answer is 9')
  """
  question, equation, solution = next((names for names in ONE_STEP_FIELDS if record.keys() >= set(names)),
                                      ONE_STEP_FIELDS[0])
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


def select_one_step(record: Record, split: str) -> bool:
  """Returns whether a record takes one step and belongs to the split: a third, chosen by a hash of the words, are the
  test set, independently of the source and its order."""
  example = parse_one_step(record)
  if example is None:
    return False
  words = "".join(example.question.split())
  return (hashlib.sha256(words.encode()).digest()[0] % _TEST_SHARE == 0) == (split == "test")


def parse_mbpp(record: Record) -> Example | None:
  """Parses MBPP, a task and its program, for layer importance; nothing is judged."""
  return Example("", get_text(record, "text"), "", get_text(record, "code").replace("\r\n", "\n"), "")


def _bare_example(question: str, gold: str | None, kind: str) -> Example | None:
  return make_example(question, gold, "", kind)
