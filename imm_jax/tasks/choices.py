"""Extracts the letter of a multiple-choice answer from a text, which is not just any capital letter."""

import re

# A letter at the beginning of the answer, alone or set off: `B`, `(b)`, `B.`, `option B`, `B because`; but not the
# article in `A dog` or a truncated `a`, nor the variable in `B = 3`.
_CHOICE = re.compile(
    r"""(?:[\s:*_"'`$“‘]|\\[(\[])*+(?:(?i:option|choice|letter)\b)?+(?:[\s:*_"'`$“‘]|\\[(\[])*+"""
    r"""(?:\\[a-z]{1,9}\s?\{|\(\$)?"""
    r"""(?:[(\[{]\s?(?P<bracketed>[A-Ha-h])\s?[)\]}]"""
    r"""|[(\[{]?(?P<ended>[A-Ha-h](?=[)\]}:]|[.,;!?*_"'`$”’\\](?![A-Za-z]))|[A-Hb-h](?=[ \t]*(?:\n|\Z)))"""
    r"""|(?P<followed>[B-H](?=\s)|A(?=\s+(?:[^\sA-Za-z]|(?:and|as|because|for|is|or|since|which|with)\b))))"""
    r"""(?!\s*[=+^<>])""")
# Another letter next to it, unless that is the subject of a statement: `(D), (E) is wrong`.
_HEDGE = re.compile(
    r"""[)\]}*_"'`$]{0,4}\s?(?:(?:/|&|or\b|and\b)\s?[(\[]?[A-H]\b"""
    r"""|,\s?[(\[]?[A-H](?:[)\]](?!\s+(?!or\b|and\b)[a-z])|[,.]|\s?(?:or|and)\b|\s*\Z))""")
_NAMED = re.compile(r"[^\n]*?\bwhich (?:is|matches|corresponds to) (?i:option|choice)[\s*]{1,4}\(?([A-H])\b(?!['+=^])")
_ONLY_CHOICE = re.compile(r"[*_]{0,2}[(\[]?([A-H])[)\].]{0,2}[*_]{0,2}")
_OPTION = re.compile(r"(?m)^[ \t]*+(?:\*\*)?(?:[(\[]([A-H])[)\]]|([A-H])[).])[ \t]+(?=\S)")
_OTHER_OPTION = re.compile(r"[(\s][A-H][).]|\b(?:or|and) \(?[A-H]\b")
_CORRECT = re.compile(r"(?:\b(?i:option|choice|answer)[ *]{1,4}\(?|(?<!\w)\((?=[A-H]\))|(?m:^)(?=[B-H] ))([A-H])\)?"
                      r"[\s*]{1,3}is (?:the )?(?:correct|right|best)")


def extract_stated(span: str) -> str | None:
  """Returns the letter with which a span begins; empty if it hedges between several, None if it has none."""
  match = _CHOICE.match(span)
  if match is None:
    named = _NAMED.match(span)
    return named[1] if named else None
  letter = match.lastgroup or 0  # one of the groups always matches
  return "" if _HEDGE.match(span, match.end(letter)) else match[letter]


def extract_concluded(text: str) -> str:
  """Returns the letter of a text without a marker: a bare one at its end, its only option, or one called correct.

  >>> extract_concluded("B) 42"), extract_concluded("A) 41\\nB) 42")
  ('B', '')
  """
  text = text.strip()
  only = _ONLY_CHOICE.fullmatch(text.rpartition("\n")[2].strip())
  if only:
    return only[1]
  options = list(_OPTION.finditer(text))
  if len(options) == 1:
    first, end = options[0].start() == 0, text.find("\n", options[0].end())
    if (first or end < 0) and not _OTHER_OPTION.search(text, options[0].end()):
      return options[0][1] or options[0][2]
  return find_called_correct(text)


def find_called_correct(text: str) -> str:
  """Returns the only option that a text calls correct, or an empty string."""
  letters = {m[1] for m in _CORRECT.finditer(text)}
  return letters.pop() if len(letters) == 1 else ""
