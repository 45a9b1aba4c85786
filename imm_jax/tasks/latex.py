"""Answers in LaTeX: the last box of a text, and whether two expressions are the same but for spelling."""

import re
from typing import NamedTuple

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# What a box without braces holds: a command, or characters up to the end of the formula.
_BARE = re.compile(r"\\[A-Za-z]+|[^\s$\\.,;{}]+")


class Boxed(NamedTuple):
  """The inside of a box, and where its command begins in the text."""

  inside: str
  start: int


def last_boxed(text: str) -> str | None:
  r"""The inside of the last `\boxed{...}`, `\fbox{...}` or `\boxed x` of a text; None without any.

  >>> last_boxed(r"\boxed{3}, so $x = \boxed{\frac{1}{2}}$.")
  '\\frac{1}{2}'
  """
  boxed = find_last_boxed(text)
  return boxed.inside if boxed else None


def find_last_boxed(text: str) -> Boxed | None:
  """The same with its place. A box that is never closed holds the rest of the text."""
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


def solution_answer(solution: str) -> str | None:
  r"""The gold answer of a worked MATH solution: its last box, without a full stop at the end; None for an empty box.

  >>> solution_answer(r"Hence $\boxed{43_5.}$")
  '43_5'
  """
  return (last_boxed(solution) or "").strip().rstrip(".,").rstrip() or None
