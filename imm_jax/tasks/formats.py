"""What the published records hold: each parser turns one into an Example without an id, or None without a usable gold.

Those of multiple choice stand in `multiple.py`. A record is a dict with lower-case keys. A value of the wrong kind is a
ValueError that says what was expected.
"""

import re
from collections.abc import Callable, Mapping

from imm_jax.tasks import latex
from imm_jax.tasks.base import Example
from imm_jax.tasks.fields import Parser, Record, number, raw_of, text_of, worked
from imm_jax.tasks.multiple import LETTERS, Posed, letter_of, lettered, options_of

KINDS = ("number", "latex", "choice")
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
# ASDiv: a number, with its unit in parentheses; a fraction may stand in parentheses.
_WITH_UNIT = re.compile(r"(?P<number>-?\(?-?[0-9][0-9.,/ ]*\)?)\s*(?:\([^()]*\))?")
_ORDINAL = re.compile(r"[^0-9]*\b(?P<number>[0-9]+)(?:st|nd|rd|th)\b[^0-9]*")


def grade_school(record: Record) -> Example | None:
  """GSM8K: the solution with calculator marks, then `#### 1,600`.

  >>> example = grade_school({"question": "What is 2 * 800?", "answer": "2*800 = <<2*800=1600>>1600.\\n#### 1,600"})
  >>> example.answer, example.rationale
  ('1600', '2*800 = 1600.\\nThe answer is 1600')
  """
  work, mark, gold = text_of(record, "answer").rpartition("####")
  if not mark:
    raise ValueError("'answer' has no line `#### number`")
  return worked(text_of(record, "question"), number(gold), _CALCULATOR.sub("", work), "number")


def competition(record: Record) -> Example | None:
  """MATH: the gold is the last box of the solution."""
  solution = text_of(record, "solution")
  return worked(text_of(record, "problem"), latex.solution_answer(solution), solution, "latex")


def with_answer(record: Record) -> Example | None:
  """MATH-500: the gold stands beside the solution."""
  return worked(text_of(record, "problem"), text_of(record, "answer"), text_of(record, "solution"), "latex")


def gsm_plus(record: Record) -> Example | None:
  """GSM-Plus: a number and a worked answer; questions that lack what an answer needs have the gold `None`."""
  return worked(text_of(record, "question"), number(record["answer"]), _CALCULATOR.sub("", _before_mark(record)),
                "number")


def _before_mark(record: Record) -> str:
  return raw_of(record, "solution").partition("####")[0]


def tabmwp(record: Record) -> Example | None:
  """TabMWP: a table, a question on it, for some with options; a gold that is no number is compared as written."""
  title, choices = str(record.get("table_title") or "").strip(), record.get("choices") or []
  parts = [f"Table: {title}" if title else "Table:", text_of(record, "table"), text_of(record, "question")]
  if choices:
    parts.append(f"Options: {', '.join(map(str, choices))}")
  gold = text_of(record, "answer")
  bare = number(gold) if record.get("ans_type") in ("integer_number", "decimal_number") else None
  return _bare("\n".join(parts), bare or gold, "number" if bare else "latex")


def svamp(record: Record) -> Example | None:
  """A body, which may lack its full stop, and a question."""
  body = text_of(record, "body")
  return _bare(f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {text_of(record, 'question')}",
               number(record["answer"]), "number")


def asdiv(record: Record) -> Example | None:
  """ASDiv: most golds are a number with a unit, `9 (apples)`.

  An ordinal (`6th`, `The 60th caller.`) counts as its number. Ratios, times of day, names, yes and no are compared as
  they are written (latex). Several values (`30 (girls); 15 (boys)`) cannot be judged: None.
  """
  question, gold = f"{text_of(record, 'body')} {text_of(record, 'question')}", text_of(record, "answer")
  if ";" in gold:
    return None
  match = _WITH_UNIT.fullmatch(gold) or _ORDINAL.fullmatch(gold)
  bare = number(match["number"].replace("(", "").replace(")", "")) if match else None
  # A full stop ends a sentence, but not `3:30 p.m.`
  return _bare(question, bare, "number") if bare else _bare(question, re.sub(r"(?<!\.m)\.$", "", gold), "latex")


def numeric(question: str, answer: str) -> Parser:
  """The parser of records with a question and a number under these names."""
  return lambda record: _bare(text_of(record, question), number(record[answer]), "number")


def mawps_source(record: Record) -> Example | None:
  """MAWPS as its authors publish it: a list of solutions."""
  solutions = record["lsolutions"]
  if not isinstance(solutions, list):
    raise ValueError("'lSolutions' is no list")
  return _bare(text_of(record, "squestion"), number(solutions[0]) if len(solutions) == 1 else None, "number")


def mbpp(record: Record) -> Example | None:
  """A task and its program, for layer importance: nothing is judged."""
  return Example("", text_of(record, "text"), "", text_of(record, "code").replace("\r\n", "\n"), "")


def custom(fields: Mapping[str, str], kind: str) -> Callable[[Record], Example | Posed | None]:
  """The parser of records with the names that a config gives.

  Args:
    fields: the record's names of `question`, `answer`, and where there are such, `rationale` (which a record may lack)
      and `choices`.
    kind: `number`, `latex` (the last box of the answer, where it has one) or `choice` (a letter, an index from 0, or
      the text of an option).
  """
  def parse(record: Record) -> Example | Posed | None:
    question, gold = text_of(record, fields["question"]), record[fields["answer"]]
    # A question without a worked answer is a question.
    rationale = raw_of(record, fields["rationale"]).strip() if fields.get("rationale") else ""
    if kind == "choice":
      options = options_of(record[fields["choices"]]) if fields.get("choices") else []
      # The text of an option counts before an index: "2" is the option 2 where there is one.
      named = isinstance(gold, str) and len(gold.strip()) > 0 and gold.strip() in options
      return lettered(question, options, LETTERS[options.index(gold.strip())] if named else letter_of(gold), rationale)
    if gold is None:
      return None
    if kind == "number":
      return worked(question, number(gold), rationale, kind)
    if isinstance(gold, bool) or not isinstance(gold, str | int | float):
      raise ValueError(f"{fields['answer']!r} is {gold!r:.50}; expected text or a number")
    text = str(gold).strip()
    boxed = latex.last_boxed(text)
    return worked(question, text.strip("$ ") if boxed is None else boxed.strip(), rationale, kind)

  return parse


def _bare(question: str, gold: str | None, kind: str) -> Example | None:
  return worked(question, gold, "", kind)
