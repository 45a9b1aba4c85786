"""Letters of multiple choice, where text answers with one: never any capital letter."""

import re

# A letter where the answer begins, alone or set off: `B`, `(b)`, `B.`, `option B`, `B because`; never the article of
# `A dog` or of a cut `a`, nor the variable of `B = 3`.
_CHOICE = re.compile(
    r"""(?:[\s:*_"'`$“‘]|\\[(\[])*+(?:(?i:option|choice|letter)\b)?+(?:[\s:*_"'`$“‘]|\\[(\[])*+"""
    r"""(?:\\[a-z]{1,9}\s?\{|\(\$)?"""
    r"""(?:[(\[{]\s?(?P<bracketed>[A-Ha-h])\s?[)\]}]"""
    r"""|[(\[{]?(?P<ended>[A-Ha-h](?=[)\]}:]|[.,;!?*_"'`$”’\\](?![A-Za-z]))|[A-Hb-h](?=[ \t]*(?:\n|\Z)))"""
    r"""|(?P<followed>[B-H](?=\s)|A(?=\s+(?:[^\sA-Za-z]|(?:and|as|because|for|is|or|since|which|with)\b))))"""
    r"""(?!\s*[=+^<>])""")
# Another letter beside it, but not one of which something is said: `(D), (E) is wrong`.
_HEDGE = re.compile(
    r"""[)\]}*_"'`$]{0,4}\s?(?:(?:/|&|or\b|and\b)\s?[(\[]?[A-H]\b"""
    r"""|,\s?[(\[]?[A-H](?:[)\]](?!\s+(?!or\b|and\b)[a-z])|[,.]|\s?(?:or|and)\b|\s*\Z))""")
_NAMED = re.compile(r"[^\n]*?\bwhich (?:is|matches|corresponds to) (?i:option|choice)[\s*]{1,4}\(?([A-H])\b(?!['+=^])")
_ONLY_CHOICE = re.compile(r"[*_]{0,2}[(\[]?([A-H])[)\].]{0,2}[*_]{0,2}")
_OPTION = re.compile(r"(?m)^[ \t]*+(?:\*\*)?(?:[(\[]([A-H])[)\]]|([A-H])[).])[ \t]+(?=\S)")
_OTHER_OPTION = re.compile(r"[(\s][A-H][).]|\b(?:or|and) \(?[A-H]\b")
_CORRECT = re.compile(r"(?:\b(?i:option|choice|answer)[ *]{1,4}\(?|(?<!\w)\((?=[A-H]\))|(?m:^)(?=[B-H] ))([A-H])\)?"
                      r"[\s*]{1,3}is (?:the )?(?:correct|right|best)")


def stated(span: str) -> str | None:
  """The letter with which a span begins; empty where it wavers between several, None where it says none."""
  match = _CHOICE.match(span)
  if match is None:
    named = _NAMED.match(span)
    return named[1] if named else None
  return "" if _HEDGE.match(span, match.end(match.lastgroup)) else match[match.lastgroup]


def concluded(text: str) -> str:
  """What a text without a marker answers: a bare letter at its end, its only option, `Option B is correct`; or nothing.

  >>> concluded("B) 42"), concluded("A) 41\\nB) 42")
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
      return options[0][options[0].lastindex]
  return said_correct(text)


def said_correct(text: str) -> str:
  """The one option that a text calls correct, or nothing."""
  letters = {m[1] for m in _CORRECT.finditer(text)}
  return letters.pop() if len(letters) == 1 else ""
