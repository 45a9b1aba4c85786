"""Extracts answers in LaTeX, and compares expressions up to spelling.

Text is matched by regular expressions and never evaluated.
"""

import re
from fractions import Fraction
from typing import NamedTuple

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# The content of a box without braces: a command, or characters up to the end of the formula.
_BARE = re.compile(r"\\[A-Za-z]+|[^\s$\\.,;{}]+")

# Longer texts are not answers (the longest of MATH has 159 characters).
MAX_CHARS = 1000
# Tolerance of decimals, relative for numbers below one: 0.333333 is a third.
_TOLERANCE = Fraction(1, 1_000_000)

_UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt",
    "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "±": r"\pm ", "θ": r"\theta ", "∅": r"\emptyset ", "²": "^2", "³": "^3", "½": r" \frac{1}{2}", "¼": r" \frac{1}{4}",
    "¾": r" \frac{3}{4}", "，": ",", "（": "(", "）": ")", "\n": " ", "\t": " ", "\u00a0": " "})
# Two backslashes begin a row of a matrix; elsewhere they are a command that was escaped twice.
_ROWS = re.compile(r"\\begin\s?\{(?:[bpvBV]?matrix|array|cases|align)")
_ESCAPED_TWICE = re.compile(r"\\\\(?=[A-Za-z!,;:%$()\[\]{}])")
_NAMES = tuple((re.compile(pattern), name) for pattern, name in (
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"), (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
    (r"\\leq(?:slant)?(?![A-Za-z])", r"\\le"), (r"\\geq(?:slant)?(?![A-Za-z])", r"\\ge"),
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
    (r"\\neq(?![A-Za-z])", r"\\ne"), (r"\\lbrace(?![A-Za-z])", r"\\{"), (r"\\rbrace(?![A-Za-z])", r"\\}"),
    (r"\\(?:left|right)\s?\.", " "),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|q?quad|degree)(?![A-Za-z])", " ")))
_THOUSANDS = re.compile(r"(?<=[0-9])(?:,\s?\\!\s?|\{,\}|\\[,!;:]\s?)(?=[0-9]{3}(?![0-9]))")
_PLAIN_TEXT = re.compile(r"\\(text(?:normal|bf|it|rm|sf|tt)?|mbox|hbox|math(?:rm|bf|it|sf|tt)|operatorname)\s?"
                         r"\{([^{}]*)\}(\s?\^\s?\{?[23]\}?)?")
# Except for the end of a row, which may precede a space.
_INVISIBLE = re.compile(r"(\\\\)|\\[!,;: >()\[\]]|~|\\?\$|\\(?:hspace|phantom)\s?\{[^{}]*\}|\\phantom"
                        r"|\^\s?(?:\{\s?\\circ\s?\}|\\circ(?![A-Za-z]))")
_PERCENT = re.compile(r"\\?%|(?<=[0-9])\s?percent\b")
_AND = re.compile(r"(?:,\s*)?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_FUNCTIONS = re.compile(r"(?:arc)?(?:sin|cos|tan|cot|sec|csc|cis)h?|log|ln|exp|[a-zA-Z]")
_LETTER_UNITS = ("m", "s", "g", "h", "L", "V")
# Words after a number are its unit; short ones may be variables, except for these.
_UNIT = re.compile(
    r"(?<=[0-9}])\s+(?:(?:square|cubic|sq)\.?\s+)?(?:[A-Za-z]{4,}|feet|foot|ft|inch|in|cm|mm|km|mi|mph|kg|lbs?|sec|min"
    r"|hrs?)(?:\s+[A-Za-z]+){0,4}\.?\s?(?:\^\s?\{?[23]\}?)?$")
_UNIT_OF_POWER = re.compile(r"\\(?:text(?:rm)?|mbox|mathrm)\s?\{[^{}]*\}(?=\s?\^)")
_FRACTION = re.compile(r"\\frac\s*([0-9A-Za-z]|\\pi(?![A-Za-z])|\{[^{}]*\})\s*([0-9A-Za-z]|\{[^{}]*\})")
_ROOT = re.compile(r"\\sqrt\s*([0-9A-Za-z])")
_SLASH = re.compile(r"(?<![\w}.)^/])([0-9]{1,50})\s?/\s?([0-9]{1,50})(?![\w{.(^/\\])")
_SPACE = re.compile(r"(?<=[0-9])(\s)\s*(?=[0-9](?![0-9]{2}(?![0-9])))|\s+")
_GROUP_OF_ONE = re.compile(r"([\^_])\{(\w)\}")
_ASSIGNED = re.compile(r"(?:[A-Za-z]{1,3}|\\[a-z]+|[A-Za-z]\([A-Za-z]\))(?:_\w)?(?:=|\\in(?![A-Za-z]))(?=[^=<>]+$)")
_RATIONAL = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{0,50})"
    r"(?:\.(?=[0-9]|\\(?:overline|bar))(?P<decimals>[0-9]{0,50})(?:\\(?:overline|bar)\{(?P<repeated>[0-9]{1,50})\})?)?"
    r"(?:\\frac\{(?P<minus>-?)(?P<over>[0-9]{1,50})\}\{(?P<under>[0-9]{1,50})\})?"
    r"(?:\\(?:times|cdot)10\^\{?(?P<power>-?[0-9]{1,2})\}?)?")
_THOUSANDS_ALONE = re.compile(r"\{[0-9]{1,3}(?:,[0-9]{3})+\}")
_SPACED_LIST = re.compile(r"[0-9],\s+[0-9]")
_BASES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_BASE = re.compile(rf"_(?:\{{({'|'.join(_BASES)})\}}|({'|'.join(_BASES)})$)")
_NAME = re.compile(r"[\s$]*([A-Za-z])\s*=")
# Units, which are compared only if both answers have one.
_UNITS = {spelling: names.split()[0] for names in (
    "m meter metre", "cm centimeter centimetre", "mm millimeter millimetre", "km kilometer kilometre", "in inch inche",
    "ft foot feet", "yd yard", "mi mile", "g gram", "kg kilogram", "lb pound", "oz ounce", "sec second", "min minute",
    "hr hour", "day", "week", "month", "year", "cent", "dollar") for spelling in names.split()}
_RELATION = re.compile(r"(<|>|\\[lg]e(?![a-z]{2}))")
_HALF_OF_DAY = re.compile(r"(?<=[0-9])[ap]m$")
_CLOCK = re.compile(r"[0-9]{1,2}:[0-9]{2}")
_FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_DELIMITER = re.compile(r"\\[()\[\]]|(?<!\\)\$+")
_SENTENCE_END = re.compile(r"\.(?=\s|$)|\n|I hope")
_REASON = re.compile(r",\s*(?:as|since|because|which|so)\b|\s(?:since|because)\b")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
# A unit or a punctuation mark after the last formula.
_REST = re.compile(r"[^\\=$0-9]{0,3}(?:[A-Za-z]{1,20}[^\\=$0-9A-Za-z]{0,3})?")
_NUMBER_AT_END = re.compile(r"(?<![\w.,^/+*=-])(?:-\s?)?\$?[0-9][0-9,]{0,50}(?:\.[0-9]{1,50}|/[0-9]{1,50})?$")
_BRACKETS = re.compile(r"[()\[\]{}|]|\\(?:frac|cup|cap)")


class Boxed(NamedTuple):
  """Holds the content of a box, and the position of its command in the text."""

  inside: str
  start: int


def extract_last_boxed(text: str) -> str | None:
  r"""Returns the content of the last `\boxed{...}`, `\fbox{...}` or `\boxed x` of a text; None without any.

  >>> extract_last_boxed(r"\boxed{3}, so $x = \boxed{\frac{1}{2}}$.")
  '\\frac{1}{2}'
  """
  boxed = find_last_boxed(text)
  return boxed.inside if boxed else None


def find_last_boxed(text: str) -> Boxed | None:
  """Finds the last box of a text and its position. A box that is not closed extends to the end of the text."""
  boxes = list(_BOX.finditer(text))
  if not boxes:
    return None
  start, begin = boxes[-1].span()
  if text[begin:begin + 1] != "{":
    bare = _BARE.match(text, begin)
    return Boxed(bare[0] if bare else "", start)
  begin, depth = begin + 1, 1
  for brace in _BRACE.finditer(text, begin):
    depth += {"{": 1, "}": -1}.get(brace[0], 0)
    if depth == 0:
      return Boxed(text[begin:brace.start()], start)
  return Boxed(text[begin:], start)


def extract_gold(solution: str) -> str | None:
  r"""Returns the gold of a MATH solution: its last box, without a full stop at the end; None for an empty box.

  >>> extract_gold(r"Hence $\boxed{43_5.}$")
  '43_5'
  """
  return (extract_last_boxed(solution) or "").strip().rstrip(".,").rstrip() or None


def clean(text: str) -> str:
  r"""Removes what affects only an expression's appearance: sizes, units, degrees, `$`, `\dfrac12` for `\frac{1}{2}`."""
  text = text.translate(_UNICODE)
  if not _ROWS.search(text):
    text = _ESCAPED_TWICE.sub(r"\\", text)
  for pattern, name in _NAMES:
    text = pattern.sub(name, text)
  text = _THOUSANDS.sub("", text)
  text = _PLAIN_TEXT.sub(_replace_text, text)
  text = _PERCENT.sub(r"\\%", _INVISIBLE.sub(lambda m: m[1] or " ", text))
  text = _UNIT.sub("", _AND.sub(",", text).lstrip(" ,;:").rstrip(" .,;:?\\"))
  text = _FRACTION.sub(lambda m: rf"\frac{_add_braces(m[1])}{_add_braces(m[2])}", text)
  return _SLASH.sub(r"\\frac{\1}{\2}", _ROOT.sub(r"\\sqrt{\1}", text)).strip()


def normalize(text: str) -> str:
  r"""Returns a canonical spelling of expressions that differ only in appearance.

  >>> normalize(r"x = \left(\dfrac12, 10,\!000\text{ cm}^2\right).")
  '(\\frac{1}{2},10000)'
  """
  text = _SPACE.sub(lambda m: m[1] or "", clean(text))
  text = _BASE.sub(lambda m: f"_{2 + _BASES.index(m[m.lastindex or 0])}", _GROUP_OF_ONE.sub(r"\1\2", text))
  text = _THOUSANDS_ALONE.sub(lambda m: m[0].replace(",", ""), text)
  return _ASSIGNED.sub("", text, count=1) if _ASSIGNED.match(text) else text


def compare_spelling(gold: str, span: str) -> bool | None:
  r"""Returns whether an answer equals the gold one, as far as spelling can decide; None if only mathematics can.

  >>> compare_spelling(r"\frac{1}{2}", "0.5"), compare_spelling(r"2\sqrt{2}", r"\sqrt{8}")
  (True, None)
  """
  if len(span) > MAX_CHARS:
    return False
  a, b = normalize(gold), normalize(span)
  if not a or not b:
    return False
  if _CLOCK.search(a) and _HALF_OF_DAY.search(a) is None:
    b = _HALF_OF_DAY.sub("", b)
  x, y = (_parse_rational(c.replace("\\%", "")) for c in (a, b))
  if x is not None and (("," not in a and _SPACED_LIST.search(span)) or _differs_in_name_or_unit(gold, span)):
    return False
  if a == b or _sorted_items(a) == _sorted_items(b) or (a.isalpha() and len(a) > 2 and a.lower() == b.lower()):
    return True
  if a.strip("()") == b.strip("()") and re.fullmatch(r"\(?[A-Z]\)?", a):
    return True
  # Some gold answers have lost their unit, but not the unit's power.
  if a == normalize(_UNIT_OF_POWER.sub("", span)):
    return True
  if _RELATION.search(b) and _to_interval(b) == _to_interval(a):
    return True
  if x is not None and y is not None:
    close = abs(x - y) <= (_TOLERANCE * min(Fraction(1), abs(x)) if "." in a + b else 0)
    if close or ("%" in a) == ("%" in b):
      return close
  # math-verify reads 43_5 and 43_6 as 43, and the times 1:20 and 2:40 as one twentieth.
  if "_" in a or (_CLOCK.search(a) and ":" in b):
    return False
  # math-verify takes the right side of any equation for its answer.
  if "=" not in gold and re.match(r"[^=]*[A-Za-z][^=]*[+-][^=]*=|[^=]*[+-][^=]*[A-Za-z][^=]*=", b):
    return False
  return None if _is_balanced(b) else False


def _differs_in_name_or_unit(gold: str, span: str) -> bool:
  """Returns whether two numbers are assigned to different variables, or have different units."""
  names = [m[1].lower() for m in map(_NAME.match, (gold, span)) if m]
  if len(set(names)) == 2:
    return True
  units = []
  for text in (gold, span):
    # Only words after the number can be its unit.
    words = re.findall("[A-Za-z]+", re.sub(r"\A[^0-9]*", "", text))
    units.append({_UNITS[w.removesuffix("s")] for w in words if w.removesuffix("s") in _UNITS})
  return len(units[0]) == len(units[1]) == 1 and units[0] != units[1]


def _to_interval(text: str) -> str:
  r"""Converts an inequality to an interval, `x\ge2` to `[2,\infty)` and `1<x<3` to `(1,3)`; keeps other text."""
  parts = _RELATION.split(text)
  if len(parts) == 3 and parts[0].isalpha():
    parts = [*reversed(parts)]
    parts[1] = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}[parts[1]]
  if len(parts) == 3:
    parts += [parts[1], r"\infty" if parts[1] in ("<", r"\le") else r"-\infty"]
  if len(parts) != 5 or len(parts[2]) != 1 or not parts[2].isalpha():
    return text
  low, left_relation, _, right_relation, high = parts
  if left_relation in (">", r"\ge"):
    low, left_relation, right_relation, high = high, right_relation, left_relation, low
  if {left_relation, right_relation} & {">", r"\ge"} and {left_relation, right_relation} & {"<", r"\le"}:
    return text
  closed = lambda relation, bound: relation in (r"\le", r"\ge") and "infty" not in bound
  return f"{'[' if closed(left_relation, low) else '('}{low},{high}{']' if closed(right_relation, high) else ')'}"


def parse_value(text: str) -> Fraction | None:
  r"""Returns the value of an answer that is a plain number, without its unit or percent sign; None for any other.

  >>> parse_value(r"\dfrac{2}{4}\text{ cm}"), parse_value(r"2\pi")
  (Fraction(1, 2), None)
  """
  if len(text) > MAX_CHARS or _SPACED_LIST.search(text):
    return None
  return _parse_rational(normalize(text).replace("\\%", ""))


def _replace_text(match: re.Match) -> str:
  r"""Replaces `\text{...}` by its content, or by nothing if that is the unit of what precedes it."""
  command, words, power = match[1], match[2].strip(), match[3] or ""
  before = match.string[:match.start()].rstrip(" \\,;!~")[-1:]
  if words.strip(", ") in ("and", "or"):
    return f" {words} "
  clock = re.match(r"([ap])\.?\s?m\b", words, re.IGNORECASE)
  if clock:
    return clock[1].lower() + "m"
  name = command == "operatorname" or (_FUNCTIONS.fullmatch(words) and words not in _LETTER_UNITS)
  if name or not (before.isalnum() or before in ("}", ")", "$", "%")) or words[:1] == "(":
    return f" {match[2]}{power} "
  return " "


def _add_braces(text: str) -> str:
  return text if text[0] == "{" else f"{{{text}}}"


def _sorted_items(text: str) -> list[str]:
  """Sorts the items of a list without brackets, in which order does not matter."""
  return sorted(text.split(",")) if "," in text and not _BRACKETS.search(text) else [text]


def _parse_rational(text: str) -> Fraction | None:
  r"""Parses a plain number: `-1,000.5`, `0.1\overline{6}`, `\frac{1}{2}`, `3\frac{1}{2}`, `2\times10^{-3}`."""
  match = _RATIONAL.fullmatch(text)
  if match is None or not any(match.group("whole", "decimals", "repeated", "over")):
    return None
  decimals, repeated = match["decimals"] or "0", match["repeated"]
  parse_value = Fraction(f"{match['whole'].replace(',', '') or '0'}.{decimals}")
  if repeated:
    parse_value += Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(match["decimals"]))
  if match["over"]:
    if int(match["under"]) == 0 or match["decimals"] or (match["minus"] and match["whole"]):
      return None
    part = Fraction(int(match["over"]), int(match["under"]))
    parse_value += -part if match["minus"] else part
  parse_value *= Fraction(10) ** int(match["power"] or 0)
  return -parse_value if match["sign"] == "-" else parse_value


def _is_balanced(text: str) -> bool:
  depth = 0
  for brace in _BRACE.finditer(text):
    depth += {"{": 1, "}": -1}.get(brace[0], 0)
    if depth < 0:
      return False
  return depth == 0


def extract_stated(text: str) -> str:
  r"""Extracts the answer from the sentence that follows a marker.

  >>> extract_stated(r" the point $(1, 2)$. I hope it is correct.")
  '(1, 2)'
  """
  text = text[:2 * MAX_CHARS].lstrip(" \t\n:*")
  formula = _FORMULA.match(text)
  end = _SENTENCE_END.search(text, formula.end() if formula else 0)
  sentence = text[:end.start()] if end else text
  reason = _REASON.search(sentence, formula.end() if formula else 1)
  sentence = sentence[:reason.start()] if reason else sentence
  formulas = list(_FORMULA.finditer(sentence))
  # Words before the formula describe it; words after it are its unit.
  if formulas and re.match("[A-Za-z]{2}", sentence):
    return formulas[-1][formulas[-1].lastindex or 0].strip()
  return _DELIMITER.sub(" ", sentence).strip()


def extract_concluded(text: str) -> str:
  r"""Extracts the answer at the end of a text without a marker: a formula, a number, or a last line with nothing else.

  >>> extract_concluded(r"Hence \(x = 2\), so there are $3$.")
  '3'
  """
  line = text.rstrip().rpartition("\n")[2][-2 * MAX_CHARS:].rstrip(" .*")
  formulas = list(_FORMULA.finditer(line))
  if formulas and _REST.fullmatch(line, formulas[-1].end()):
    return formulas[-1][formulas[-1].lastindex or 0].strip()
  number = _NUMBER_AT_END.search(line)
  if number and (not line[:number.start()] or _WORD.search(line)):
    return number[0].strip()
  return "" if formulas or _WORD.search(line) else line
