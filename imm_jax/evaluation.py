"""Accuracy with its uncertainty."""

import math
from typing import NamedTuple


class Accuracy(NamedTuple):
  """A share of right answers.

  Attributes:
    value: correct / n.
    n: number of questions.
    low: lower end of the 95 % interval.
    high: upper end.
  """

  value: float
  n: int
  low: float
  high: float


def accuracy(correct: int, n: int) -> Accuracy:
  """Accuracy with Wilson's 95 % interval (E. B. Wilson, JASA 22, 1927).

  Raises:
    ValueError: unless 0 <= correct <= n and n > 0.

  >>> [round(x, 3) for x in accuracy(8, 10)]
  [0.8, 10, 0.49, 0.943]
  """
  if n <= 0 or not 0 <= correct <= n:
    raise ValueError(f"{correct} correct of {n}")
  z = 1.959963984540054
  p, z2n = correct / n, z * z / n
  centre = (p + z2n / 2) / (1 + z2n)
  half = z * math.sqrt(p * (1 - p) / n + z2n / (4 * n)) / (1 + z2n)
  # Rounding must not push an end past the value (0 or n correct).
  return Accuracy(p, n, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)))
