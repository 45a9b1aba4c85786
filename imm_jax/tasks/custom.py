"""Parses the records of task `custom`: fields that the config names, and answers as they are usually written."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from imm_jax.tasks import latex, multiple
from imm_jax.tasks.base import Example
from imm_jax.tasks.fields import Record, get_raw_text, get_text, make_example, parse_gold
from imm_jax.tasks.multiple import LETTERS, Question

FIELDS = ("question", "answer", "rationale", "choices")
_MARKER = re.compile(r"answer is|answer\**:|(?<!#)####(?!#)", re.IGNORECASE)
_WITH_LETTER = re.compile(r"[(\[]?([A-Ha-h])\s?[).:\]]\s*(\S.*)", re.DOTALL)
# The answers of each kind that can be judged.
EXPECTED = {"number": "a number alone, such as 42, or stated as in `#### 42`, `\\boxed{42}` or `The answer is 42`",
            "latex": "a formula or a text", "choice": "an option"}


def resolve_fields(fields: Mapping[str, str]) -> dict[str, str]:
  """Returns the records' field names, in lower case: question and answer have a default, the others may be missing.

  >>> resolve_fields({"question": "Problem", "choices": ""})
  {'question': 'problem', 'answer': 'answer'}
  """
  names = {"question": "question", "answer": "answer"} | {field: name for field, name in fields.items() if name}
  return {field: name.lower() for field, name in names.items()}


def make_parser(names: Mapping[str, str], kind: str) -> Callable[[Record], Example | Question | None]:
  """Returns a parser of records whose field names a config gives.

  An answer that states its result in a sentence (after `####` or `answer is`, or in a box) is read as that result.

  Args:
    names: the record's field names for `question`, `answer` (which records may lack, as they may lack a gold), and
      optionally `rationale` (which they may lack, too) and `choices`.
    kind: `number`, `latex` or `choice` (a letter, an index from 0, or the text of an option).
  """
  def parse(record: Record) -> Example | Question | None:
    question, gold = get_text(record, names["question"]), record.get(names["answer"])
    rationale = get_raw_text(record, names["rationale"]).strip() if names.get("rationale") else ""
    if kind == "choice":
      return _parse_choice(record, names, question, gold, rationale)
    if not is_scalar(gold):
      return None
    return make_example(question, _read_number(gold) if kind == "number" else _read_latex(gold), rationale, kind)

  return parse


def list_options(question: str, value: Any) -> str:
  """Returns a question followed by a line for each option, as multiple choice is asked.

  >>> list_options("Which is even?", {"A": 3, "B": 4})
  'Which is even?\\n(A) 3\\n(B) 4'
  """
  options, _ = _read_options(value, "choices")
  return question + "".join(f"\n({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))


def lists_options(question: str, letters: str = "AB") -> bool:
  """Returns whether a question lists options by letter, these among them.

  >>> lists_options("Which? (A) 3 (B) 4"), lists_options("Which? (A) 3 (B) 4", "C"), lists_options("Which?")
  (True, False, False)
  """
  return all(re.search(rf"(?<![A-Za-z])(?:{letter}\s?[).:\]]|{letter.lower()}\s?\))", question)
             for letter in letters)


def find_unshown_options(record: Record, names: Mapping[str, str], question: str) -> str:
  """Returns the field of a record with options that no one would see, or "".

  These are options that neither `names` has as choices nor the question lists by letter.
  """
  if names.get("choices") or lists_options(question):
    return ""
  return next((field for field, value in record.items() if field not in names.values() and _is_options(value)), "")


def is_scalar(value: Any) -> bool:
  """Returns whether a value is text or a number."""
  return isinstance(value, str | int | float) and not isinstance(value, bool) and not (
      isinstance(value, float) and math.isnan(value))


def _is_options(value: Any) -> bool:
  try:
    return bool(_read_options(value, "")[0])
  except ValueError:
    return False


def find_stated(text: str) -> str | None:
  """Returns the part of an answer that states its result: in the last box, else after the last marker; else None."""
  boxed, markers = latex.extract_last_boxed(text), list(_MARKER.finditer(text))
  if boxed is None and not markers:
    return None
  stated = text[markers[-1].end():].strip().partition("\n")[0] if boxed is None else boxed
  return _strip_marks(stated)


def _strip_marks(text: str) -> str:
  """Removes marks around an answer, but not the point of `.5`."""
  return text.lstrip(" :*$").rstrip(" .:*$")


def _read_number(gold: Any) -> str | None:
  number = parse_gold(gold)
  if number is not None or not isinstance(gold, str):
    return number
  stated = find_stated(gold)
  return parse_gold(_strip_marks(gold) if stated is None else stated)


def _read_latex(gold: Any) -> str:
  text = str(gold).strip()
  boxed, markers = latex.extract_last_boxed(text), list(_MARKER.finditer(text))
  if boxed is None and markers:
    return latex.extract_stated(text[markers[-1].end():]).strip("$ ")
  return text.strip("$ ") if boxed is None else boxed.strip()


def _parse_choice(record: Record, names: Mapping[str, str], question: str, gold: Any, rationale: str,
                  ) -> Question | None:
  unshown = find_unshown_options(record, names, question)
  if unshown:
    raise ValueError(f"{unshown!r} looks like options, which are not shown: name it with "
                     f"--config.task.fields.choices={unshown}, or list them in the question, as `(A) ... (B) ...`")
  options, labels = _read_options(record[names["choices"]], names["choices"]) if names.get("choices") else ([], [])
  letter = _find_letter(gold, options, labels, names["answer"]) if is_scalar(gold) and gold != "" else None
  return multiple.from_letter(question, options, letter, rationale)


def _read_options(value: Any, field: str) -> tuple[list[str], list[str]]:
  """Reads options: a list, a mapping from letters, lists `text` and `label`, or a text `A) ... B) ...`.

  Returns:
    The options, and the labels by which an answer may name them (none for a list or a text).
  """
  labels: list[str] = []
  if isinstance(value, Mapping):
    if value.keys() == {"text", "label"} and all(isinstance(part, list) for part in value.values()):
      if len(value["text"]) != len(value["label"]):
        raise ValueError(f"{field!r} has {len(value['text'])} texts and {len(value['label'])} labels")
      items = list(zip(map(str, value["label"]), value["text"], strict=True))
    else:
      items = [(str(label).strip(), option) for label, option in value.items() if option is not None]
      items = sorted(items) if all(label.upper() in [*LETTERS] for label, _ in items) else items
    labels, value = [label for label, _ in items], [option for _, option in items]
  elif isinstance(value, str) and re.match(r"\s*\(?A\s?[).]", value, re.IGNORECASE):
    return multiple.split_options(value.strip()), []
  for number, option in enumerate(value if isinstance(value, list) else (), 1):
    if not (is_scalar(option) or isinstance(option, bool)) or not str(option).strip():
      raise ValueError(f"option {number} of {field!r} is {option!r:.40}; expected text or a number")
  return _strip_letters(multiple.parse_options(value)), labels


def _strip_letters(options: list[str]) -> list[str]:
  """Strips the letters of options that carry them all, in order.

  >>> [_strip_letters(options) for options in (["A. dog", "B. cat"], ["A. Lee", "C. Lee"], ["A.D.", "B.C."])]
  [['dog', 'cat'], ['A. Lee', 'C. Lee'], ['A.D.', 'B.C.']]
  """
  found = [re.fullmatch(rf"(?:{letter}\s?[.:]\s+|[(\[]{letter}[)\]]\s*)(\S.*)", option, re.IGNORECASE | re.DOTALL)
           for letter, option in zip(LETTERS, options, strict=False)]
  return [match[1] for match in found if match] if all(found) else options


def _find_letter(gold: Any, options: list[str], labels: list[str], field: str) -> str | None:
  """Returns the letter of the option that an answer names: by its text, its label or letter, or its index from 0.

  The text of an option takes precedence over an index: "2" means the option "2" if there is one.
  """
  if isinstance(gold, float) and gold.is_integer():
    gold = int(gold)
  text = str(gold).strip()
  if not text:
    return None
  lower = [label.lower() for label in labels]
  if text.strip("().").lower() in lower:
    return LETTERS[lower.index(text.strip("().").lower())]
  count = len(options) or len(LETTERS)
  # Where options have other labels, letters and indices may be meant in another order.
  letter = "" if labels and lower != [*LETTERS[:count].lower()] else multiple.parse_letter(text) or ""
  lettered = _WITH_LETTER.fullmatch(text)
  if lettered and lettered[2] == dict(zip(LETTERS, options, strict=False)).get(lettered[1].upper()):
    return lettered[1].upper()
  matches = [i for i, option in enumerate(options) if option == text] if isinstance(gold, str) else []
  if len(matches) > 1 or (matches and not text.isdecimal() and letter in [*LETTERS[:count]]
                          and letter != LETTERS[matches[0]]):
    raise ValueError(f"{field!r} is {text!r}, which may mean different options; give the index, counted from 0")
  if matches:
    return LETTERS[matches[0]]
  if letter in [*LETTERS[:count]]:
    return letter
  stated = find_stated(text)
  if stated:
    return _find_letter(stated, options, labels, field)
  which = (f"none of the {count} options; expected the text of one, " if options else "no letter; expected ")
  if labels:
    raise ValueError(f"{field!r} is {gold!r:.60}, which names none of the {count} options; expected the text of one, "
                     f"or its label ({', '.join(labels)})")
  raise ValueError(f"{field!r} is {gold!r:.60}, which names {which}a letter from A to {LETTERS[count - 1]}, or an "
                   f"index, which counts from 0 (to {count - 1})")
