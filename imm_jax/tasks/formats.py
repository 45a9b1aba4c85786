"""What the published records hold: each `parse` turns one into an Example without an id, or None without a usable gold.

A record is a dict with lower-case keys. A value of the wrong kind is a ValueError that says what was expected.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from imm_jax.tasks import answers, latex
from imm_jax.tasks.base import Example

Record = Mapping[str, Any]
Parser = Callable[[Record], Example | None]

LETTERS = "ABCDEFGH"
KINDS = ("number", "latex", "choice")
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
# ASDiv: a number, with its unit in parentheses; a fraction may stand in parentheses.
_WITH_UNIT = re.compile(r"(?P<number>-?\(?-?[0-9][0-9.,/ ]*\)?)\s*(?:\([^()]*\))?")
_ORDINAL = re.compile(r"[^0-9]*\b(?P<number>[0-9]+)(?:st|nd|rd|th)\b[^0-9]*")
_QUOTED = re.compile(r"""'([^']*)'|"([^"]*)\"""")
_AGIEVAL = re.compile(r"(?P<passage>.*?)Q: (?P<question>.*?)\s*Answer Choices: \(A\).*", re.DOTALL)


def grade_school(record: Record) -> Example | None:
  """GSM8K: the solution with calculator marks, then `#### 1,600`.

  >>> example = grade_school({"question": "What is 2 * 800?", "answer": "2*800 = <<2*800=1600>>1600.\\n#### 1,600"})
  >>> example.answer, example.rationale
  ('1600', '2*800 = 1600.\\nThe answer is 1600')
  """
  work, mark, gold = _text(record, "answer").rpartition("####")
  if not mark:
    raise ValueError("'answer' has no line `#### number`")
  return _worked(_text(record, "question"), number(gold), _CALCULATOR.sub("", work), "number")


def competition(record: Record) -> Example | None:
  """MATH: the gold is the last box of the solution."""
  solution = _text(record, "solution")
  return _worked(_text(record, "problem"), latex.solution_answer(solution), solution, "latex")


def svamp(record: Record) -> Example | None:
  """A body, which may lack its full stop, and a question."""
  body = _text(record, "body")
  return _bare(f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {_text(record, 'question')}",
               number(record["answer"]), "number")


def asdiv(record: Record) -> Example | None:
  """ASDiv: most golds are a number with a unit, `9 (apples)`.

  An ordinal (`6th`, `The 60th caller.`) counts as its number. Ratios, times of day, names, yes and no are compared as
  they are written (latex). Several values (`30 (girls); 15 (boys)`) cannot be judged: None.
  """
  question, gold = f"{_text(record, 'body')} {_text(record, 'question')}", _text(record, "answer")
  if ";" in gold:
    return None
  match = _WITH_UNIT.fullmatch(gold) or _ORDINAL.fullmatch(gold)
  bare = number(match["number"].replace("(", "").replace(")", "")) if match else None
  # A full stop ends a sentence, but not `3:30 p.m.`
  return _bare(question, bare, "number") if bare else _bare(question, re.sub(r"(?<!\.m)\.$", "", gold), "latex")


def numeric(question: str, answer: str) -> Parser:
  """The parser of records with a question and a number under these names."""
  return lambda record: _bare(_text(record, question), number(record[answer]), "number")


def mawps_source(record: Record) -> Example | None:
  """MAWPS as its authors publish it: a list of solutions."""
  solutions = record["lsolutions"]
  if not isinstance(solutions, list):
    raise ValueError("'lSolutions' is no list")
  return _bare(_text(record, "squestion"), number(solutions[0]) if len(solutions) == 1 else None, "number")


def mathqa(record: Record) -> Example | None:
  """Options in one string, of two forms; the rationale may stand in quotes."""
  options = split_options(_text(record, "options"))
  return _choice(_text(record, "problem"), options, _letter(record["correct"]),
                 str(record.get("rationale") or "").strip().strip('"'))


def sat(options: str) -> Parser:
  """The parser of the 32 questions of May 2023, whose options are one string."""
  return lambda record: _choice(_text(record, "question"), split_options(_text(record, options)),
                                _letter(record["answer"]))


def agieval(record: Record) -> Example | None:
  """AGIEval: some questions have a passage before them; the worked solution is none, for its form differs."""
  question = "\n".join(filter(None, (str(record.get("passage") or "").strip(), _text(record, "question"))))
  return _choice(question, _options(record["options"]), _letter(record["label"]))


def agieval_query(record: Record) -> Example | None:
  """AGIEval as the hub has it: passage, question and options in one prompt."""
  match = _AGIEVAL.fullmatch(_text(record, "query"))
  if not match:
    raise ValueError("'query' is not of the form `Q: ... Answer Choices: (A)...`")
  question = "\n".join(filter(None, (match["passage"].strip(), match["question"].strip())))
  gold = record["gold"]
  return _choice(question, _options(record["choices"]), _letter(gold[0] if isinstance(gold, list) and gold else gold))


def mmlu(record: Record) -> Example | None:
  """MMLU: a list of choices, and the index (or letter) of the right one."""
  return _choice(_text(record, "question"), _options(record["choices"]), _letter(record["answer"]))


def mmlu_csv(record: Record) -> Example | None:
  """The same in columns."""
  return _choice(_text(record, "question"), [_text(record, f"choice{i}") for i in range(4)],
                 _letter(record["answer"]))


def mbpp(record: Record) -> Example | None:
  """A task and its program, for layer importance: nothing is judged."""
  return Example("", _text(record, "text"), "", _text(record, "code").replace("\r\n", "\n"), "")


def custom(fields: Mapping[str, str], kind: str) -> Parser:
  """The parser of records with the names that a config gives.

  Args:
    fields: the record's names of `question`, `answer`, and where there are such, `rationale` and `choices`.
    kind: `number`, `latex` (the last box of the answer, where it has one) or `choice` (a letter, an index from 0, or
      the text of an option).
  """
  def parse(record: Record) -> Example | None:
    question, gold = _text(record, fields["question"]), record[fields["answer"]]
    rationale = _text(record, fields["rationale"]) if fields.get("rationale") else ""
    if kind == "choice":
      options = _options(record[fields["choices"]]) if fields.get("choices") else []
      # The text of an option counts before an index: "2" is the option 2 where there is one.
      named = isinstance(gold, str) and len(gold.strip()) > 0 and gold.strip() in options
      return _choice(question, options, LETTERS[options.index(gold.strip())] if named else _letter(gold), rationale)
    if kind == "number":
      return _worked(question, number(gold), rationale, kind)
    if gold is None:
      return None
    if isinstance(gold, bool) or not isinstance(gold, str | int | float):
      raise ValueError(f"{fields['answer']!r} is {gold!r:.50}; expected text or a number")
    text = str(gold).strip()
    boxed = latex.last_boxed(text)
    return _worked(question, text.strip("$ ") if boxed is None else boxed.strip(), rationale, kind)

  return parse


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


def split_options(text: str) -> list[str]:
  """The options of one string: `A) 4 B) 5`, `A. 4 B. 5`, `a ) 4 , b ) 5` or `['a ) 4', 'b ) 5']`.

  Letters count in their order only, so that an option may hold an `A)` of its own.

  >>> split_options("A) f(A) B) f(B) + 1 C) none")
  ['f(A)', 'f(B) + 1', 'none']
  >>> split_options("['a ) 4 , 5', 'b ) 6']")
  ['4 , 5', '6']
  """
  if text.startswith("[") and text.endswith("]"):
    return _options([a or b for a, b in _QUOTED.findall(text)])
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
  return _options([text[found.end():end].rstrip(" ,") for found, end in zip(starts, ends, strict=True)])


def _options(values: Any) -> list[str]:
  if not isinstance(values, Sequence) or isinstance(values, str) or not 2 <= len(values) <= len(LETTERS):
    raise ValueError(f"{str(values)[:80]!r} is no list of 2 to {len(LETTERS)} options")
  return [_unmarked(str(value).strip(), letter) for value, letter in zip(values, LETTERS, strict=False)]


def _unmarked(option: str, letter: str) -> str:
  """An option without its own letter: `(A)2`, `a ) 4`."""
  return re.sub(rf"^(?:\({letter}\)|{letter}\s?\))\s*", "", option, flags=re.IGNORECASE)


def _letter(gold: Any) -> str | None:
  """The letter of an index from 0, or of a letter in any form; None where there is none."""
  gold = "" if gold is None else str(gold).strip()
  if gold.isdecimal() and int(gold) < len(LETTERS):
    return LETTERS[int(gold)]
  return gold.strip("().").upper() or None


def _choice(question: str, options: Sequence[str], letter: str | None, rationale: str = "") -> Example | None:
  """The one form of multiple choice: the question, then a line for each option."""
  if letter and (len(letter) != 1 or letter not in LETTERS[:len(options) or None]):
    raise ValueError(f"the gold {letter!r} is none of the {len(options)} options")
  listed = "".join(f"\n({mark}) {option}" for mark, option in zip(LETTERS, options, strict=False))
  return _worked(question + listed, letter, rationale, "choice")


def _worked(question: str, gold: str | None, rationale: str, kind: str) -> Example | None:
  """An example whose rationale, if it has one, ends in `The answer is X`, in one line."""
  if not gold:
    return None
  gold = " ".join(gold.split())
  rationale = rationale.strip()
  end = f"The answer is {gold}"
  if rationale and not rationale.rstrip(".").endswith(end):
    rationale += f"\n{end}"
  return Example("", question, gold, rationale, kind)


def _bare(question: str, gold: str | None, kind: str) -> Example | None:
  return _worked(question, gold, "", kind)


def _text(record: Record, field: str) -> str:
  value = record[field]
  if not isinstance(value, str) or not value.strip():
    raise ValueError(f"{field!r} is {'empty' if isinstance(value, str) else 'no text'}")
  return value.strip()
