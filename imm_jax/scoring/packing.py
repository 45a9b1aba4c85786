"""Packs requests into rows, with common prefixes stored only once.

A row is a depth-first walk through the prefix tree of its texts: a token is followed by its branches, one after the
other. `until` is the end of the last branch, which is all that attention needs to know (`attention.branching`).

Axes: N rows, T positions, S positions that are scored, E tokens that are scored.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from imm_jax.scoring.requests import Request


class Rows(NamedTuple):
  """Holds packed requests.

  Attributes:
    tokens: int32 [N, T].
    positions: int32 [N, T], of each token in its own text.
    until: int32 [N, T], the last position that attends to each token.
    places: int32 [N, S], the positions whose predictions are scored, padded with 0.
    indices: int32 [N, E], for each scored token the index in `places` that predicts it.
    targets: int32 [N, E], its id.
    owners: for each row the requests of its scored tokens, in order.
    filled: total number of tokens without padding.
  """

  tokens: np.ndarray
  positions: np.ndarray
  until: np.ndarray
  places: np.ndarray
  indices: np.ndarray
  targets: np.ndarray
  owners: list[list[int]]
  filled: int


class _Row:
  """Builds a row request by request."""

  def __init__(self, length: int):
    self.tokens, self.positions, self.until = np.zeros(length, int), np.zeros(length, int), np.arange(length)
    self.used, self.path, self.text = 0, [], ()
    self.places: dict[int, int] = {}
    self.indices, self.targets, self.owners = [], [], []

  def fits(self, request: Request) -> bool:
    return self.used + len(request.tokens) - 1 - self._common_prefix(request) <= len(self.tokens)

  def add(self, request: Request, owner: int) -> None:
    """Appends the tokens that the request does not share with the previous one."""
    prefix = self._common_prefix(request)
    self.close(prefix)
    new = request.tokens[prefix:-1]  # the last token is only predicted
    begin, self.used = self.used, self.used + len(new)
    self.tokens[begin:self.used] = new
    self.positions[begin:self.used] = np.arange(prefix, prefix + len(new))
    self.path, self.text = [*self.path[:prefix], *range(begin, self.used)], request.tokens[:-1]
    for t in range(request.start, len(request.tokens)):
      self.indices.append(self.places.setdefault(self.path[t - 1], len(self.places)))
      self.targets.append(request.tokens[t])
      self.owners.append(owner)

  def close(self, prefix: int = 0) -> None:
    """Ends the branches of the last text after its first `prefix` tokens."""
    self.until[self.path[prefix:]] = self.used - 1

  def _common_prefix(self, request: Request) -> int:
    limit = min(len(self.text), len(request.tokens) - 1)
    return next((i for i in range(limit) if self.text[i] != request.tokens[i]), limit)


def pack(requests: Sequence[Request], *, length: int) -> Rows:
  """Packs requests into rows, sorted by their tokens so that those with common prefixes are adjacent.

  Args:
    requests: requests of at most `length + 1` tokens.
    length: T.

  >>> rows = pack([Request((1, 2, 3, 4), 3), Request((1, 2, 3, 5, 6), 3)], length=6)
  >>> rows.tokens.tolist(), rows.positions.tolist(), rows.until.tolist()
  ([[1, 2, 3, 5, 0, 0]], [[0, 1, 2, 3, 0, 0]], [[3, 3, 3, 3, 4, 5]])
  >>> rows.places.tolist(), rows.indices.tolist(), rows.targets.tolist()  # 4 and 5 after the 3, and 6 after the 5
  ([[2, 3]], [[0, 0, 1]], [[4, 5, 6]])
  """
  rows: list[_Row] = []
  for owner in sorted(range(len(requests)), key=lambda i: requests[i].tokens):
    if not rows or not rows[-1].fits(requests[owner]):
      if rows:
        rows[-1].close()
      rows.append(_Row(length))
    rows[-1].add(requests[owner], owner)
  if rows:
    rows[-1].close()
  return Rows(*(_stack([getattr(row, name) for row in rows]) for name in ("tokens", "positions", "until")),
              *(_stack([list(getattr(row, name)) for row in rows]) for name in ("places", "indices", "targets")),
              [row.owners for row in rows], sum(row.used for row in rows))


def _stack(rows: Sequence[Sequence[int]]) -> np.ndarray:
  """Stacks rows of different lengths, padded with zeros."""
  result = np.zeros((len(rows), max(map(len, rows), default=0)), np.int32)
  for row, values in zip(result, rows, strict=True):
    row[:len(values)] = values
  return result
