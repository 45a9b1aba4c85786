"""The published records of multiple choice; otherwise as `formats.py`."""

import re
from collections.abc import Sequence
from typing import Any

from imm_jax.tasks.base import Example
from imm_jax.tasks.fields import Parser, Record, text_of, worked

LETTERS = "ABCDEFGH"
_QUOTED = re.compile(r"""'([^']*)'|"([^"]*)\"""")
_AGIEVAL = re.compile(r"(?P<passage>.*?)Q: (?P<question>.*?)\s*Answer Choices: \(A\).*", re.DOTALL)


def mathqa(record: Record) -> Example | None:
  """Options in one string, of two forms; the rationale may stand in quotes."""
  options = split_options(text_of(record, "options"))
  return choice(text_of(record, "problem"), options, letter_of(record["correct"]),
                str(record.get("rationale") or "").strip().strip('"'))


def sat(options: str) -> Parser:
  """The parser of the 32 questions of May 2023, whose options are one string."""
  return lambda record: choice(text_of(record, "question"), split_options(text_of(record, options)),
                               letter_of(record["answer"]))


def agieval(record: Record) -> Example | None:
  """AGIEval: some questions have a passage before them; the worked solution is none, for its form differs."""
  question = "\n".join(filter(None, (str(record.get("passage") or "").strip(), text_of(record, "question"))))
  return choice(question, options_of(record["options"]), letter_of(record["label"]))


def agieval_query(record: Record) -> Example | None:
  """AGIEval as the hub has it: passage, question and options in one prompt."""
  match = _AGIEVAL.fullmatch(text_of(record, "query"))
  if not match:
    raise ValueError("'query' is not of the form `Q: ... Answer Choices: (A)...`")
  question = "\n".join(filter(None, (match["passage"].strip(), match["question"].strip())))
  gold = record["gold"]
  gold = gold[0] if isinstance(gold, list) and gold else gold
  return choice(question, options_of(record["choices"]), letter_of(gold))


def mmlu(record: Record) -> Example | None:
  """MMLU: a list of choices, and the index (or letter) of the right one."""
  return choice(text_of(record, "question"), options_of(record["choices"]), letter_of(record["answer"]))


def mmlu_csv(record: Record) -> Example | None:
  """The same in columns."""
  return choice(text_of(record, "question"), [text_of(record, f"choice{i}") for i in range(4)],
                letter_of(record["answer"]))


def split_options(text: str) -> list[str]:
  """The options of one string: `A) 4 B) 5`, `A. 4 B. 5`, `a ) 4 , b ) 5` or `['a ) 4', 'b ) 5']`.

  Letters count in their order only, so that an option may hold an `A)` of its own.

  >>> split_options("A) f(A) B) f(B) + 1 C) none")
  ['f(A)', 'f(B) + 1', 'none']
  >>> split_options("['a ) 4 , 5', 'b ) 6']")
  ['4 , 5', '6']
  """
  if text.startswith("[") and text.endswith("]"):
    return options_of([a or b for a, b in _QUOTED.findall(text)])
  starts = []
  for letter in LETTERS:
    marker = re.compile(rf"(?:^|(?<=[\s,])){letter}\s?[).]\s*", re.IGNORECASE)
    found = marker.search(text, starts[-1].end() if starts else 0)
    if not found:
      break
    starts.append(found)
  if not starts:
    raise ValueError(f"{text[:80]!r} holds no options `A) ... B) ...`")
  ends = [found.start() for found in starts[1:]] + [len(text)]
  return options_of([text[found.end():end].rstrip(" ,") for found, end in zip(starts, ends, strict=True)])


def options_of(values: Any) -> list[str]:
  """The options of a list, without letters of their own."""
  if not isinstance(values, Sequence) or isinstance(values, str) or not 2 <= len(values) <= len(LETTERS):
    raise ValueError(f"{str(values)[:80]!r} is no list of 2 to {len(LETTERS)} options")
  return [_unmarked(str(value).strip(), letter) for value, letter in zip(values, LETTERS, strict=False)]


def _unmarked(option: str, letter: str) -> str:
  """An option without its own letter: `(A)2`, `a ) 4`."""
  return re.sub(rf"^(?:\({letter}\)|{letter}\s?\))\s*", "", option, flags=re.IGNORECASE)


def letter_of(gold: Any) -> str | None:
  """The letter of an index from 0, or of a letter in any form; None where there is none."""
  gold = "" if gold is None else str(gold).strip()
  if gold.isdecimal() and int(gold) < len(LETTERS):
    return LETTERS[int(gold)]
  return gold.strip("().").upper() or None


def choice(question: str, options: Sequence[str], letter: str | None, rationale: str = "") -> Example | None:
  """The one form of multiple choice: the question, then a line for each option."""
  if letter and (len(letter) != 1 or letter not in LETTERS[:len(options) or None]):
    raise ValueError(f"the gold {letter!r} is none of the {len(options)} options")
  listed = "".join(f"\n({mark}) {option}" for mark, option in zip(LETTERS, options, strict=False))
  return worked(question + listed, letter, rationale, "choice")
