"""Verdicts: is a model's answer right?

Model output is text from a stranger: it is matched by regular expressions of bounded work and never evaluated.
"""

import re
from fractions import Fraction
from typing import NamedTuple

TOLERANCE = 1e-4
# Longer answers are judged by their end, where the answer stands.
_MAX_CHARS = 20_000
_NEXT_QUESTION = re.compile(r"\n\s*(?:### Instruction|Question:|Q:|Problem:)")
_MARKER = re.compile(r"answer is|####|(?<![A-Za-z])A:", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,]*,\d)|\d{1,400})(?:\.\d{1,400})?|\.\d{1,400}"
_NUMBER = re.compile(
    rf"(?P<sign>-\s?)?[$€£]?\s?(?P<sign2>-)?(?P<whole>{_DIGITS})"
    rf"(?:\s+(?P<mixed>\d{{1,9}}/\d{{1,9}})|\s?/\s?(?P<over>\d{{1,400}}(?:\.\d{{1,400}})?))?"
    r"(?:[eE](?P<exp>[+-]?\d{1,3})|\s?(?:×|x|\*|\\times|\\cdot)\s?10\s?\^\s?\{?(?P<power>-?\d{1,3})\}?)?")
_MALFORMED_GROUP = re.compile(r"(?<![\d,])\d+(?:,\d+)+(?![\d,])")
_CHOICE = re.compile(r"^[\s:*\"'`]*(?:option\s+)?[(\[{]?([A-H])(?:[)\]}.,:*\"'`\s]|$)", re.IGNORECASE)


class Verdict(NamedTuple):
  """Whether an answer is right, and the part of the text that was judged (empty where none was found)."""

  correct: bool
  span: str


def verdict(text: str, gold: str, kind: str, *, strict: bool) -> Verdict:
  """Judges one answer.

  The final answer is what follows the later of the last marker (`answer is`, `####`, `A:`) and the last `\\boxed`,
  before a next question begins.

  Args:
    text: what the model wrote.
    gold: the right answer.
    kind: `number` (equal within 1e-4) or `choice` (the letter).
    strict: an answer without a marker is wrong (filtering); else the last number counts (evaluation).

  Raises:
    ValueError: for an unknown kind, or a gold answer that is not of its kind.

  >>> verdict("3 + 4 = 7. The answer is $7.00.", "7", "number", strict=True)
  Verdict(correct=True, span='7.00')
  >>> verdict("It must be 7.", "7", "number", strict=True).correct
  False
  """
  if kind not in ("number", "choice"):
    raise ValueError(f"kind={kind!r}: expected number or choice")
  text = text[-_MAX_CHARS:].replace("−", "-")
  following = _NEXT_QUESTION.search(text)
  if following:
    text = text[:following.start()]
  span, marked = _final_span(text)
  if strict and not marked:
    return Verdict(False, "")
  return _choice_verdict(span, gold, marked) if kind == "choice" else _number_verdict(span, gold, marked)


def _final_span(text: str) -> tuple[str, bool]:
  marker = max((m.end() for m in _MARKER.finditer(text)), default=-1)
  boxed = max((m.end() for m in _BOXED.finditer(text)), default=-1)
  if marker < 0 and boxed < 0:
    return text, False
  if boxed > marker:
    depth = 1
    for i in range(boxed, len(text)):
      depth += {"{": 1, "}": -1}.get(text[i], 0)
      if depth == 0:
        return text[boxed:i], True
    return text[boxed:], True
  return text[marker:], True


def _choice_verdict(span: str, gold: str, marked: bool) -> Verdict:
  if not re.fullmatch("[A-H]", gold):
    raise ValueError(f"gold answer {gold!r} is not a letter from A to H")
  match = _CHOICE.search(span) if marked else re.fullmatch(r"\s*[(\[]?([A-H])[)\].]?\s*", span)
  return Verdict(match is not None and match[1].upper() == gold, match[1] if match else "")


def _number_verdict(span: str, gold: str, marked: bool) -> Verdict:
  target = parse_number(gold)
  if target is None:
    raise ValueError(f"gold answer {gold!r} is not a number")
  if marked:
    line = span.lstrip().split("\n", 1)[0]
    _, equals, after = line.rpartition("=")
    matches = [m for m in (_first_number(after) if equals else None, _first_number(line)) if m]
    match = matches[0] if matches else None
  else:
    match = max(_NUMBER.finditer(span), key=lambda m: m.start(), default=None)
  if match is None:
    return Verdict(False, "")
  value = _value(match)
  return Verdict(value is not None and abs(value - target) <= TOLERANCE, match[0].strip(" $€£"))


def _first_number(text: str) -> re.Match | None:
  match = _NUMBER.search(text)
  malformed = match and _MALFORMED_GROUP.match(text, match.start("whole"))
  if malformed and not re.fullmatch(r"\d{1,3}(?:,\d{3})+", malformed[0]):
    return None
  return match


def parse_number(text: str) -> Fraction | None:
  """The number a text holds and nothing else, or None.

  >>> parse_number("$1,234.50")
  Fraction(2469, 2)
  """
  match = _NUMBER.fullmatch(text.strip().rstrip("%").rstrip())
  return _value(match) if match else None


def _value(match: re.Match) -> Fraction | None:
  value = Fraction(match["whole"].replace(",", ""))
  try:
    if match["mixed"]:
      value += Fraction(match["mixed"])
    elif match["over"]:
      value /= Fraction(match["over"])
  except ZeroDivisionError:
    return None
  exponent = match["exp"] or match["power"]
  if exponent:
    value *= Fraction(10) ** int(exponent)
  return -value if match["sign"] or match["sign2"] else value
