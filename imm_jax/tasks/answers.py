"""Verdicts: is a model's answer right?

Model output is text from a stranger: it is matched by regular expressions of linear work and never evaluated.
`judge.py` judges many at once.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from imm_jax.tasks import choices, latex, numerals, workers
from imm_jax.tasks.numerals import parse_number

TOLERANCE = Fraction(1, 10_000)
# Longer answers are judged by their end, where the answer stands.
_MAX_CHARS = 20_000
_NEXT_QUESTION = re.compile(
    r"\n[ \t]*+(?:### Instruction|Question:|Q:|Problem:|User:|Human:)|<\|im_start\|>[ \t]*+user\b")
_MARKER = re.compile(r"answer is|answer\**:|(?<!#)####(?!#)", re.IGNORECASE)
_OPTION_MARKER = re.compile(r"(?:correct|right|best) (?:option|choice|letter)(?: is|\**:)", re.IGNORECASE)
# In multiple choice an option may begin like this, so there it only counts without any other marker.
_WEAK_MARKER = re.compile(r"(?:\A|[\n.?!])[ \t]*+A:")
# Before `answer:` and after any marker: what speaks of an answer that stands elsewhere.
_CHECK = re.compile(r"\b(?:check|verif|confirm)[a-z]{0,5}\s(?:(?:the|our|my|this)\s)?(?:final\s)?\Z", re.IGNORECASE)
_ASSESSED = re.compile(r"\s+(?:correct|reasonable|plausible|sensible|verified|confirmed|accurate|consistent)\b")
# An answer that is followed by this is no more the one that is meant.
_TAKEN_BACK = re.compile(
    r"\b(?:wait|wrong|incorrect|mistaken?)\b|\bis[\s*:]{0,4}(?:not|no|none|zero|one|two|three|four|five|six|seven|eight"
    r"|nine|ten|eleven|twelve)\b", re.IGNORECASE)
_WORDS = re.compile(r"[\s:*]*+[A-Za-z](?:[A-Za-z]|\s+[a-z]{2})")


class Verdict(NamedTuple):
  """Whether an answer is right, and the part of the text that was judged (empty where none was found)."""

  correct: bool
  span: str


def verdict(text: str, gold: str, kind: str, *, strict: bool,
            equal: Callable[[str, str], bool] | None = None) -> Verdict:
  """Judges one answer.

  The final answer is what follows the later of the last marker (`answer is`, `answer:`, `####`, `A:`) and the last
  `\\boxed`, before a next question begins. A marker that states no number or letter (`This answer is rounded`) gives
  way to the one before it.

  Args:
    text: what the model wrote.
    gold: the right answer.
    kind: `number` (equal within 1e-4), `latex` (equal as mathematics) or `choice` (the letter).
    strict: an answer without a marker is wrong (filtering); else the last number or formula counts (evaluation).
    equal: whether two LaTeX expressions that are spelled otherwise are equal; by default a worker process is asked.

  Raises:
    ValueError: for an unknown kind, or a gold answer that is not of its kind.

  >>> verdict("3 + 4 = 7. The answer is $7.00.", "7", "number", strict=True)
  Verdict(correct=True, span='7.00')
  >>> verdict("It must be 7.", "7", "number", strict=True).correct
  False
  >>> verdict(r"Hence $x = \\boxed{\\dfrac12}$.", "0.5", "latex", strict=True)
  Verdict(correct=True, span='\\\\dfrac12')
  >>> verdict("The answer is (B).", "B", "choice", strict=True)
  Verdict(correct=True, span='B')
  """
  target = None
  if kind == "number":
    target = parse_number(gold)
    if target is None:
      raise ValueError(f"gold answer {gold!r} is not a number")
  elif kind == "choice":
    if not re.fullmatch("[A-H]", gold):
      raise ValueError(f"gold answer {gold!r} is not a letter from A to H")
  elif kind != "latex":
    raise ValueError(f"kind={kind!r}: expected number, latex or choice")
  text = before_next_question(text)[-_MAX_CHARS:]
  if kind == "latex":
    return _latex_verdict(text, gold, strict, equal)
  return _number_verdict(text, target, strict) if kind == "number" else _choice_verdict(text, gold, strict)


def before_next_question(text: str) -> str:
  """A text up to where it goes on to a next question, as base models do.

  >>> before_next_question("The answer is 7.\\nQ: What is 2 + 3?")
  'The answer is 7.'
  """
  following = _NEXT_QUESTION.search(text)
  return text[:following.start()] if following else text


def _number_verdict(text: str, target: Fraction, strict: bool) -> Verdict:
  text = numerals.plain(text)
  span = _final_span(text, _markers(text, _MARKER, _WEAK_MARKER), numerals.any_stated)
  if span is None and strict:
    return Verdict(False, "")
  match = numerals.last(text) if span is None else numerals.stated(span, strict)
  if match is None:
    return Verdict(False, "")
  value = numerals.value(match)
  return Verdict(value is not None and abs(value - target) <= TOLERANCE, numerals.spelled(match))


def _choice_verdict(text: str, gold: str, strict: bool) -> Verdict:
  text = numerals.plain(text)
  markers = _markers(text, _MARKER, _OPTION_MARKER)
  if not markers and latex.find_last_boxed(text) is None:
    markers = _markers(text, _WEAK_MARKER)
  span = _final_span(text, markers, lambda s: choices.stated(s) is not None)
  letter = None if span is None else choices.stated(span)
  if letter is None and not strict:
    letter = choices.concluded(text) if span is None else choices.said_correct(text)
  return Verdict((letter or "").upper() == gold, letter or "")


def _latex_verdict(text: str, gold: str, strict: bool, equal: Callable[[str, str], bool] | None) -> Verdict:
  boxed, marker = latex.find_last_boxed(text), max((m.end() for m in _markers(text, _MARKER)), default=-1)
  # After a box, "This answer is correct" and "Let us check our answer: as ..." state no other.
  if boxed and (boxed.start >= marker or _WORDS.match(text, marker)):
    span = boxed.inside
  elif marker >= 0:
    span = latex.stated(text[marker:])
  else:
    span = "" if strict else latex.concluded(text)
  span = span.strip()[:latex.MAX_CHARS + 1]
  correct = latex.same(gold, span)
  if correct is None:
    correct = (equal or workers.shared().equal)(latex.tidy(gold), latex.tidy(span))
  return Verdict(correct, span)


def _markers(text: str, *patterns: re.Pattern) -> list[re.Match]:
  """The markers of a text that begin an answer, in their order."""
  found = (m for pattern in patterns for m in pattern.finditer(text))
  checks = lambda m: m[0].endswith(":") and _CHECK.search(text, max(0, m.start() - 40), m.start())
  return sorted((m for m in found if not (checks(m) or _ASSESSED.match(text, m.end()))), key=re.Match.end)


def _final_span(text: str, markers: list[re.Match], states: Callable[[str], bool]) -> str | None:
  """What stands in the last box or follows the last marker that states something; None without a box or a marker.

  A box states what it holds, and so does a last marker at the end of a text that was cut. What follows a marker ends at
  the next one, so that all of them are read in linear time.
  """
  boxed = latex.find_last_boxed(text)
  last, end = None, len(text)
  for marker in reversed(markers):
    if boxed and boxed.start >= marker.end():
      break
    span = text[marker.end():end]
    if states(span) or (last is None and not re.search(r"\w", span)):
      return span if last is None or not _TAKEN_BACK.search(text, marker.end()) else last
    last, end = span if last is None else last, marker.start()
  if boxed and (last is None or not _TAKEN_BACK.search(text, boxed.start)):
    return boxed.inside
  return last


def canonical(span: str, kind: str) -> str | None:
  """What equal answers have in common, for votes; None where there is no answer.

  >>> canonical("1,200.0", "number") == canonical("$1200", "number")
  True
  >>> canonical(r"\\frac12", "latex") == canonical("0.5", "latex")
  True
  """
  if not span:
    return None
  if kind == "choice":
    return span.upper()
  value = parse_number(span) if kind == "number" else latex.value(span)
  if value is not None:
    return str(value)
  return latex.normalise(span) if kind == "latex" else span
