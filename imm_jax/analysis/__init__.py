"""Measures layer importance and weight change, the diversity of sampled answers, and drift from the base."""

from collections.abc import Sequence

# Orders of layer importance: 1 for eq. 3, 2 for eq. 2.
ORDERS = (1, 2)


def shares(values: Sequence[float]) -> list[float]:
  """Divides each value by the sum of all.

  >>> shares([1.0, 3.0]), shares([0.0])
  ([0.25, 0.75], [0.0])
  """
  total = sum(values)
  return [value / total if total else 0.0 for value in values]
