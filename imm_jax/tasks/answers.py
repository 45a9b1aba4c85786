"""Verdicts: is a model's answer right?

Model output is text from a stranger: it is matched by regular expressions of linear work and never evaluated.
`judge.py` judges many at once.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from imm_jax.tasks import latex, workers

TOLERANCE = Fraction(1, 10_000)
# Longer answers are judged by their end, where the answer stands.
_MAX_CHARS = 20_000
_NEXT_QUESTION = re.compile(r"\n[ \t]*+(?:### Instruction|Question:|Q:|Problem:)")
_MARKER = re.compile(r"answer is|answer\**:|(?<!#)####(?!#)", re.IGNORECASE)
# In multiple choice an option may begin like this, so there it only counts without any other marker.
_WEAK_MARKER = re.compile(r"(?:\A|[\n.?!])[ \t]*+A:")
_WORDS = re.compile(r"[\s:*]*+[A-Za-z](?:[A-Za-z]|\s+[a-z]{2})")
# The rest of the line, or of the next one that says something.
_LINE = re.compile(r"[\s:*]*+[^\n]*")

_SPELLINGS = (("−", "-"), ("–", "-"), ("½", " 1/2"), ("¼", " 1/4"), ("¾", " 3/4"), ("\\!", ""), ("\\,", ""),
              ("{,}", ","), ("\\$", "$"), ("\\%", "%"))
_FRACTION = re.compile(r"([0-9]?)\\[cdt]?frac\s?\{(-?[0-9.,]{1,400})\}\s?\{([0-9.,]{1,400})\}")
# A whole run of digits, points and commas is taken first and judged afterwards, so that no part of a malformed one is
# ever a number. Digits inside words (mp3) are none.
_DIGITS = r"[0-9]+(?:[.,][0-9]+)*"
_NUMBER = re.compile(
    r"(?P<root>(?:\\sqrt\s?\{|√)\s?)?(?P<sign>-\s?)?[$€£]?\s?(?P<sign2>-)?"
    rf"(?P<whole>(?<![A-Za-z0-9_])(?<![0-9][.,]){_DIGITS}|(?<![A-Za-z0-9_.])\.[0-9]+)"
    rf"(?:[ ]{{1,4}}(?P<mixed>[0-9]+)/(?P<part>[0-9]+)|\s?/\s?(?P<over>{_DIGITS})|\s?\^\s?\{{?(?P<caret>-?[0-9]+)\}}?)?"
    r"(?:[eE](?P<exp>[+-]?[0-9]+)|\s?(?:×|x|\*|\\times|\\cdot)\s?10\s?\^\s?\{?(?P<power>[+-]?[0-9]+)\}?)?"
    # What makes it a time, a ratio, a date, a power, a multiple of a root or of pi.
    r"(?P<more>:[0-9]|\s?/\s?[0-9]|\s?\^|\s?\\(?:sqrt|pi|[cdt]?frac)|\s?[√π]|[²³¹⁰-⁹⁻])?")
_WELL_FORMED = re.compile(r"(?:[0-9]{1,400}|[0-9]{1,3}(?:,[0-9]{3}){1,133})?(?:\.[0-9]{1,400})?")

# A letter where the answer begins, alone or set off: `B`, `(b)`, `B.`, `option B`, `B because`; never the article of
# `A dog` or of a cut `a`, nor the variable of `B = 3`.
_CHOICE = re.compile(
    r"""[\s:*_"'`$]*+(?:(?i:option|choice|letter)\b)?+[\s:*_"'`$]*+(?:\\[a-z]{1,9}\s?\{)?"""
    r"""(?:[(\[{]\s?(?P<bracketed>[A-Ha-h])\s?[)\]}]"""
    r"""|[(\[{]?(?P<ended>[A-Ha-h](?=[)\]}:]|[.,;*_"'`$\\](?![A-Za-z]))|[A-Hb-h](?=[ \t]*(?:\n|\Z)))"""
    r"""|(?P<followed>[B-H](?=\s)|A(?=\s+(?:[^\sA-Za-z]|(?:as|because|for|is|since|which|with)\b))))"""
    r"""(?!\s*[=+^<>])""")
_HEDGE = re.compile(
    r"""[)\]}*_"'`$]{0,4}\s?(?:(?:/|&|or\b|and\b)\s?[(\[]?[A-H]\b|,\s?[(\[]?[A-H](?:[)\],.]|\s?(?:or|and)\b|\s*\Z))""")
_ONLY_CHOICE = re.compile(r"[(\[]?([A-H])[)\].]{0,2}")


class Verdict(NamedTuple):
  """Whether an answer is right, and the part of the text that was judged (empty where none was found)."""

  correct: bool
  span: str


def verdict(text: str, gold: str, kind: str, *, strict: bool,
            equal: Callable[[str, str], bool] | None = None) -> Verdict:
  """Judges one answer.

  The final answer is what follows the later of the last marker (`answer is`, `answer:`, `####`, `A:`) and the last
  `\\boxed`, before a next question begins.

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
  text = _plain(text)
  span = _final_span(text, kind)
  if span is None and strict:
    return Verdict(False, "")
  if kind == "choice":
    letter = _choice(text, span)
    return Verdict(letter.upper() == gold, letter)
  match = _last_number(text) if span is None else _stated_number(span, strict)
  if match is None:
    return Verdict(False, "")
  value = _value(match)
  return Verdict(value is not None and abs(value - target) <= TOLERANCE, match[0].strip(" $€£"))


def _latex_verdict(text: str, gold: str, strict: bool, equal: Callable[[str, str], bool] | None) -> Verdict:
  boxed, marker = latex.find_last_boxed(text), _last_end(_MARKER, text)
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


def parse_number(text: str) -> Fraction | None:
  """The number a text holds and nothing else, or None.

  >>> parse_number("$1,234.50")
  Fraction(2469, 2)
  """
  match = _NUMBER.fullmatch(_plain(text).strip().rstrip("%").rstrip())
  return _value(match) if match else None


def _plain(text: str) -> str:
  """Without the LaTeX and the Unicode that only change how a number looks."""
  for old, new in _SPELLINGS:
    text = text.replace(old, new)
  return _FRACTION.sub(lambda m: f"{m[1]}{' ' if m[1] else ''}{m[2]}/{m[3]}", text)


def _last_end(pattern: re.Pattern, text: str) -> int:
  return max((m.end() for m in pattern.finditer(text)), default=-1)


def _final_span(text: str, kind: str) -> str | None:
  """What follows the last marker or stands in the last box; None without either."""
  marker, boxed = _last_end(_MARKER, text), latex.find_last_boxed(text)
  if kind == "number" or (marker < 0 and boxed is None):
    marker = max(marker, _last_end(_WEAK_MARKER, text))
  if boxed and boxed.start >= marker:
    return boxed.inside
  return text[marker:] if marker >= 0 else None


def _choice(text: str, span: str | None) -> str:
  """The letter that is answered, or an empty string."""
  if span is None:
    only = _ONLY_CHOICE.fullmatch(text.strip().rpartition("\n")[2].strip())
    return only[1] if only else ""
  match = _CHOICE.match(span)
  if match is None or _HEDGE.match(span, match.end(match.lastgroup)):
    return ""
  return match[match.lastgroup]


def _stated_number(span: str, strict: bool) -> re.Match | None:
  """The first number after the last `=` of the line, else of the line."""
  line = _LINE.match(span)[0]
  _, equals, after = line.rpartition("=")
  match = (_NUMBER.search(after) if equals else None) or _NUMBER.search(line)
  # "The answer is the number of boxes. Therefore, ..." states nothing yet.
  return match if match or strict else _last_number(span)


def _last_number(text: str) -> re.Match | None:
  return next((m for m in reversed(list(_NUMBER.finditer(text))) if _value(m) is not None), None)


def _value(match: re.Match) -> Fraction | None:
  """The number of a match, or None for one that is malformed, beyond all bounds, or more than a number."""
  parts = match.group("whole", "mixed", "part", "over")
  exponent = match["exp"] or match["power"] or match["caret"] or "0"
  if match["root"] or match["more"] or any(p and not _WELL_FORMED.fullmatch(p) for p in parts) or len(exponent) > 4:
    return None
  if match["caret"] and parts[0] != "10":
    return None
  whole, mixed, part, over = (Fraction(p.replace(",", "")) if p else None for p in parts)
  if part == 0 or over == 0:
    return None
  if match["caret"]:
    whole = Fraction(1)
  value = whole + mixed / part if part else whole / over if over else whole
  value *= Fraction(10) ** int(exponent)
  return -value if _negative(match) else value


def _negative(match: re.Match) -> bool:
  """Whether a minus is a sign: not in `9-2`, and in `- 2` only where an answer begins."""
  sign, start = match["sign"], match.start("sign")
  if not sign:
    return match["sign2"] is not None
  before = match.string[max(0, start - 8):start]
  if sign == "-":
    return not (before[-1:].isalnum() or before[-1:] in (")", "]", "}"))
  before = before.rstrip(" ")
  return not before or before[-1] in ":=($"


def before_next_question(text: str) -> str:
  """The part of an answer before a next question, which some models go on to make up.

  >>> before_next_question("The answer is 8.\\nQ: Who is next?")
  'The answer is 8.'
  """
  following = _NEXT_QUESTION.search(text)
  return text[:following.start()] if following else text


def canonical(span: str, kind: str) -> str | None:
  """What equal answers have in common, for votes; None where there is no answer.

  >>> canonical("1,200.0", "number") == canonical("$1200", "number")
  True
  """
  if not span:
    return None
  if kind == "latex":
    return latex.normalise(span)
  value = parse_number(span) if kind == "number" else None
  return span if value is None else str(value)
