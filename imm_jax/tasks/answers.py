"""Judges whether a model's answer is right.

Model output is untrusted text: it is matched by regular expressions that run in linear time and is never evaluated.
`judge.py` judges many answers at once.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from imm_jax.tasks import choices, latex, numerals, workers
from imm_jax.tasks.numerals import parse_number

TOLERANCE = Fraction(1, 10_000)
# Only the end of longer texts is judged, where the answer is.
_MAX_CHARS = 20_000
_NEXT_QUESTION = re.compile(
    r"\n[ \t]*+(?:### Instruction|Question:|Q:|Problem:|User:|Human:)|<\|im_start\|>[ \t]*+user\b")
_MARKER = re.compile(r"answer is|answer\**:|(?<!#)####(?!#)", re.IGNORECASE)
_OPTION_MARKER = re.compile(r"(?:correct|right|best) (?:option|choice|letter)(?: is|\**:)", re.IGNORECASE)
# In multiple choice an option may begin like this, so there it counts only if there is no other marker.
_WEAK_MARKER = re.compile(r"(?:\A|[\n.?!])[ \t]*+A:")
# Words before `answer:` and after any marker that refer to an answer given elsewhere.
_ANNOUNCED_CHECK = re.compile(
    r"\b(?:check|verif|confirm)[a-z]{0,5}\s(?:(?:the|our|my|this)\s)?(?:final\s)?\Z", re.IGNORECASE)
_ASSESSED = re.compile(r"\s+(?:correct|reasonable|plausible|sensible|verified|confirmed|accurate|consistent)\b")
# Words by which a text retracts the answer before them.
_RETRACTED = re.compile(
    r"\b(?:wait|wrong|incorrect|mistaken?)\b|\bis[\s*:]{0,4}(?:not|no|none|zero|one|two|three|four|five|six|seven|eight"
    r"|nine|ten|eleven|twelve)\b", re.IGNORECASE)
_WORDS = re.compile(r"[\s:*]*+[A-Za-z](?:[A-Za-z]|\s+[a-z]{2})")


class Verdict(NamedTuple):
  """Says whether an answer is right, and which part of the text was judged (empty if it has no answer)."""

  correct: bool
  span: str


def verdict(text: str, gold: str, kind: str, *, strict: bool,
            equal: Callable[[str, str], bool] | None = None) -> Verdict:
  """Judges one answer.

  The final answer follows the last marker (`answer is`, `answer:`, `####`, `A:`) or stands in the last `\\boxed`,
  whichever comes later, before the text goes on to another question. A marker without a number or letter after it
  (`This answer is rounded`) is skipped in favor of the one before it.

  Args:
    text: the model's output.
    gold: the right answer.
    kind: `number` (equal within 1e-4), `latex` (equal as mathematics) or `choice` (the letter).
    strict: whether an answer without a marker is wrong (filtering); otherwise the last number or formula counts
      (evaluation).
    equal: compares two LaTeX expressions of different spelling; by default a worker process does.

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
  gold_value = None
  if kind == "number":
    gold_value = parse_number(gold)
    if gold_value is None:
      raise ValueError(f"gold answer {gold!r} is not a number")
  elif kind == "choice":
    if not re.fullmatch("[A-H]", gold):
      raise ValueError(f"gold answer {gold!r} is not a letter from A to H")
  elif kind != "latex":
    raise ValueError(f"kind={kind!r}: expected number, latex or choice")
  text = before_next_question(text)[-_MAX_CHARS:]
  if kind == "latex":
    return _latex_verdict(text, gold, strict, equal)
  if gold_value is not None:
    return _number_verdict(text, gold_value, strict)
  return _choice_verdict(text, gold, strict)


def before_next_question(text: str) -> str:
  """Truncates a text where it goes on to another question, as base models do.

  >>> before_next_question("The answer is 7.\\nQ: What is 2 + 3?")
  'The answer is 7.'
  """
  following = _NEXT_QUESTION.search(text)
  return text[:following.start()] if following else text


def _number_verdict(text: str, gold_value: Fraction, strict: bool) -> Verdict:
  text = numerals.simplify(text)
  span = _final_span(text, _find_markers(text, _MARKER, _WEAK_MARKER), numerals.contains_number)
  if span is None and strict:
    return Verdict(False, "")
  match = numerals.find_last(text) if span is None else numerals.extract_stated(span, strict)
  if match is None:
    return Verdict(False, "")
  value = numerals.parse_match(match)
  return Verdict(value is not None and abs(value - gold_value) <= TOLERANCE, numerals.matched_text(match))


def _choice_verdict(text: str, gold: str, strict: bool) -> Verdict:
  text = numerals.simplify(text)
  markers = _find_markers(text, _MARKER, _OPTION_MARKER)
  if not markers and latex.find_last_boxed(text) is None:
    markers = _find_markers(text, _WEAK_MARKER)
  span = _final_span(text, markers, lambda s: choices.extract_stated(s) is not None)
  letter = None if span is None else choices.extract_stated(span)
  if letter is None and not strict:
    letter = choices.extract_concluded(text) if span is None else choices.find_called_correct(text)
  return Verdict((letter or "").upper() == gold, letter or "")


def _latex_verdict(text: str, gold: str, strict: bool, equal: Callable[[str, str], bool] | None) -> Verdict:
  boxed, marker = latex.find_last_boxed(text), max((m.end() for m in _find_markers(text, _MARKER)), default=-1)
  # After a box, "This answer is correct" or "Let us check our answer: as ..." gives no other answer.
  if boxed and (boxed.start >= marker or _WORDS.match(text, marker)):
    span = boxed.inside
  elif marker >= 0:
    span = latex.extract_stated(text[marker:])
  else:
    span = "" if strict else latex.extract_concluded(text)
  span = span.strip()[:latex.MAX_CHARS + 1]
  correct = latex.compare_spelling(gold, span)
  if correct is None:
    correct = (equal or workers.shared_workers().equal)(latex.clean(gold), latex.clean(span))
  return Verdict(correct, span)


def _find_markers(text: str, *patterns: re.Pattern) -> list[re.Match]:
  """Finds the markers that introduce an answer, in order."""
  matches = (m for pattern in patterns for m in pattern.finditer(text))
  announces_check = lambda m: m[0].endswith(":") and _ANNOUNCED_CHECK.search(text, max(0, m.start() - 40), m.start())
  return sorted((m for m in matches if not (announces_check(m) or _ASSESSED.match(text, m.end()))), key=re.Match.end)


def _final_span(text: str, markers: list[re.Match], contains_answer: Callable[[str], bool]) -> str | None:
  """Returns the text in the last box or after the last marker with an answer; None without a box or a marker.

  A box always counts, and so does a last marker at the end of a truncated text. The text after a marker ends at the
  next one, so that all of them are read in linear time.
  """
  boxed = latex.find_last_boxed(text)
  candidate, end = None, len(text)
  for marker in reversed(markers):
    if boxed and boxed.start >= marker.end():
      break
    span = text[marker.end():end]
    if contains_answer(span) or (candidate is None and not re.search(r"\w", span)):
      return span if candidate is None or not _RETRACTED.search(text, marker.end()) else candidate
    candidate, end = span if candidate is None else candidate, marker.start()
  if boxed and (candidate is None or not _RETRACTED.search(text, boxed.start)):
    return boxed.inside
  return candidate


def canonical(span: str, kind: str) -> str | None:
  """Returns a form that is the same for equal answers, for majority votes; None if there is no answer.

  >>> canonical("1,200.0", "number") == canonical("$1200", "number")
  True
  >>> canonical(r"\\frac12", "latex") == canonical("0.5", "latex")
  True
  """
  if not span:
    return None
  if kind == "choice":
    return span.upper()
  value = parse_number(span) if kind == "number" else latex.parse_value(span)
  if value is not None:
    return str(value)
  return latex.normalize(span) if kind == "latex" else span
