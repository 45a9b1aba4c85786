"""Finds numbers in text and parses their exact values.

Text is matched by regular expressions that run in linear time and is never evaluated.
"""

import re
from fractions import Fraction

_SPELLINGS = (("−", "-"), ("–", "-"), ("½", " 1/2"), ("¼", " 1/4"), ("¾", " 3/4"), ("\\!", ""), ("\\,", ""),
              ("{,}", ","), ("\\$", "$"), ("\\%", "%"), ("\u00a0", " "), ("\u2009", " "), ("\u202f", " "))
_FRACTION = re.compile(r"([0-9]?)\\[cdt]?frac\s?\{(-?[0-9.,]{1,400})\}\s?\{([0-9.,]{1,400})\}")
_MINUS = re.compile(r"(\bis|[:=#{])([\s*$(]*+)(?:negative|minus)\s(?=[$€£]?[0-9])", re.IGNORECASE)
# A whole run of digits, points and commas is matched first and validated afterwards, so that no part of a malformed
# number counts as one. Digits inside words (mp3) do not count.
_DIGITS = r"[0-9]+(?:[.,][0-9]+)*"
_NUMBER = re.compile(
    r"(?P<within>(?:\\(?:sqrt|[cdt]?frac|[dt]?binom)\s?[{\[]|√)\s?)?(?P<sign>-\s?)?(?P<money>[$€£])?\s?(?P<sign2>-)?"
    rf"(?P<whole>(?<![A-Za-z0-9_])(?<![0-9][.,])(?:[1-9][0-9]{{0,2}}(?:[ ][0-9]{{3}})+(?![0-9]|[.,/][0-9])|{_DIGITS})"
    r"|(?<![A-Za-z0-9_.])\.[0-9]+)"
    rf"(?:[ ]{{1,4}}(?P<mixed>[0-9]+)/(?P<part>[0-9]+)|\s?/\s?(?P<over>{_DIGITS})"
    r"|\s?\^\s?(?:\{\s?(?P<braced>-?[0-9]+)\s?\}|(?P<caret>-?[0-9]+)(?![0-9]|[./][0-9])))?"
    r"(?:[eE](?P<exp>[+-]?[0-9]+)|\s?(?:×|x|\*|\\times|\\cdot)\s?10\s?\^\s?\{?(?P<power>[+-]?[0-9]+)\}?)?"
    r"(?:\s?(?P<scale>(?i:hundred|thousand|million|billion|trillion))\b|(?P<k>[kK])(?![\w$]))?"
    # A continuation that makes it a time, a ratio, a date, a power, or a multiple of a root or of pi.
    r"(?P<more>:[0-9]|\s?/\s?[0-9]|\s?\^|\s?\\(?:sqrt|pi|[cdt]?frac)|\s?[√π]|[²³¹⁰-⁹⁻])?")
_WELL_FORMED = re.compile(r"(?:[0-9]{1,400}|[0-9]{1,3}(?:([ ,])[0-9]{3}(?:\1[0-9]{3}){0,132})?)?(?:\.[0-9]{1,400})?")
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Limits of powers of bases other than ten.
_MAX_BASE_CHARS, _MAX_EXPONENT = 20, 64

# The rest of the line, or the next line that is not empty, after an optional formula delimiter.
_LINE = re.compile(r"(?:[\s:*$]|\\[(\[])*+[^\n]*")
_SENTENCE = re.compile(r"[\s:*]*+[A-Z][a-z]")
_NEXT_SENTENCE = re.compile(r"[.!?][)\]}\"'*$]{0,4}\s+(?=[A-Z])")
# A continuation that makes a number one of several: a range, a choice, a list, a term. Not `7, 5 of them`, nor
# `7.5 to 1 decimal`.
_ONE_OF_SEVERAL = re.compile(
    r"[%*$)]{0,4}(?:\s*(?:[-+*÷×x]|\\(?:times|cdot|div|pm)|(?:or|and|plus|minus|times)\b|to\b(?!\s[0-9]+\sdecimal))\s*[*($€£-]{0,4}[0-9]"
    r"|\s*,\s*[$€£-]?[0-9]+(?=\s*(?:,|(?:or|and)\b|[.!$]{0,2}\s*\Z))|\s+[0-9])")
_DENIED = re.compile(r"\bnot[\s*$]*\Z")


def parse_number(text: str) -> Fraction | None:
  """Parses a text that consists of one number; returns None for any other text.

  >>> parse_number("$1,234.50"), parse_number("2.5 million"), parse_number("5 or 7")
  (Fraction(2469, 2), Fraction(2500000, 1), None)
  """
  match = _NUMBER.fullmatch(simplify(text).strip().rstrip("%").rstrip())
  return parse_match(match) if match else None


def simplify(text: str) -> str:
  """Removes LaTeX, Unicode and words that affect only the appearance of numbers."""
  for old, new in _SPELLINGS:
    text = text.replace(old, new)
  return _MINUS.sub(r"\1\2-", _FRACTION.sub(lambda m: f"{m[1]}{' ' if m[1] else ''}{m[2]}/{m[3]}", text))


def contains_number(span: str) -> bool:
  """Returns whether the line after a marker contains a number."""
  return _NUMBER.search(_first_line(span)) is not None


def _first_line(span: str) -> str:
  match = _LINE.match(span)
  return match[0] if match else ""


def extract_stated(span: str, strict: bool) -> re.Match | None:
  """Finds the number that the line after a marker states: the first one after the last `=` before a plain number.

  If there is none, returns None if `strict`, otherwise the first number of the expression, or the last of the span.
  """
  line, first = _first_line(span), None
  # Search only the answer's sentence, unless the marker is a heading: `Answer: Tom has 3. He finds 4. 3 + 4 = 7`.
  number = None if _SENTENCE.match(line) else _NUMBER.search(line)
  following = _NEXT_SENTENCE.search(line, number.end()) if number else None
  if following:
    line = line[:following.start()]
  for part in reversed(line.split("=")):
    match = _NUMBER.search(part)
    if match and not (_ONE_OF_SEVERAL.match(part, match.end()) or _DENIED.search(part, 0, match.start())):
      return match
    first = first or match
  # "The answer is the number of boxes. Therefore, ..." states nothing yet.
  return None if strict else first or find_last(span)


def find_last(text: str) -> re.Match | None:
  """Finds the last valid number of a text."""
  return next((m for m in reversed(list(_NUMBER.finditer(text))) if parse_match(m) is not None), None)


def matched_text(match: re.Match) -> str:
  """Returns the text of a matched number, without a leading dash that is not a sign."""
  text = match[0].strip(" $€£")
  return text if _is_negative(match) else text.lstrip("- $€£")


def parse_match(match: re.Match) -> Fraction | None:
  """Parses a match; returns None if it is malformed, out of bounds, or more than a number."""
  parts = match.group("whole", "mixed", "part", "over")
  caret, exponent = match["caret"] or match["braced"], match["exp"] or match["power"] or "0"
  if match["within"] or match["more"] or any(p and not _WELL_FORMED.fullmatch(p) for p in parts):
    return None
  if len(exponent) > 4 or (caret and (len(caret) > 4 or exponent != "0")):
    return None
  whole, mixed, part, over = (Fraction(re.sub("[ ,]", "", p)) if p else None for p in parts)
  if whole is None or part == 0 or over == 0:
    return None
  if caret and whole != 10 and (len(parts[0]) > _MAX_BASE_CHARS or not 0 <= int(caret) <= _MAX_EXPONENT):
    return None
  number = whole + mixed / part if mixed is not None and part else (
      whole / over if over else whole ** int(caret) if caret else whole)
  if exponent != "0":
    number *= Fraction(10) ** int(exponent)
  if match["scale"] or (match["k"] and match["money"]):
    number *= _SCALES[(match["scale"] or "thousand").lower()]
  return -number if _is_negative(match) else number


def _is_negative(match: re.Match) -> bool:
  """Returns whether a matched number has a minus sign: not in `9-2`, and in `- 2` only at the start of an answer."""
  sign, start = match["sign"], match.start("sign")
  if not sign:
    return match["sign2"] is not None
  before = match.string[max(0, start - 8):start]
  if sign == "-":
    return not (before[-1:].isalnum() or before[-1:] in (")", "]", "}"))
  before = before.rstrip(" ")
  return not before or before[-1] in ":=($"
