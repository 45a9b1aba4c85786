"""Samples that wait for a row: what their prompts share, how prompts are packed, and which sizes there are.

Every size is compiled, so there are few: lengths and rows come from ladders whose steps grow with them.
"""

import bisect
import collections
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from imm_jax.model.cached import LayerCache

# Tokens of a packed row, where no prompt is longer: scores grow with the square of it.
_ROW = 256
# Tokens that prompts are run in at once, on a CPU and elsewhere: what more would gain is small, what it would hold not.
_AT_ONCE, _AT_ONCE_ELSEWHERE = 1024, 8192
# Prompts of a pack: one for so many tokens, for each takes logits of the whole vocabulary.
_TOKENS_A_PROMPT = 16
# Waiting prompts that are tried where the next does not fit.
_AHEAD = 64
_LEAST_SLOTS = 64
# Of all rows; rows shrink to these shares when none waits.
_SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
_LEAST_ROWS = 8
# Tokens that are worth sharing.
_LEAST_SHARED = 16


class Sample(NamedTuple):
  """One completion that is asked for: of the prompt with this index and id, its number among that prompt's."""

  prompt: int
  number: int
  id: str
  temperature: float


class Shape(NamedTuple):
  """Of a pack of prompts: R rows of T tokens, and at most so many prompts."""

  rows: int
  length: int
  prompts: int

  def fewer(self, rows: int, prompts: int, parts: int) -> "Shape":
    """The smallest of this, its half, its quarter and so on that holds as much; rows stay a multiple of `parts`."""
    if self.rows % (2 * parts) or self.rows // 2 < rows or self.prompts // 2 < prompts:
      return self
    return Shape(self.rows // 2, self.length, self.prompts // 2).fewer(rows, prompts, parts)


class Pack(NamedTuple):
  """Prompts to run.

  Attributes:
    tokens: int32 [R, T].
    positions: int32 [R, T], from 0 in every prompt.
    segment_ids: int32 [R, T], from 1; 0 is padding.
    lengths: int32 [I], of the prompts.
    starts: int32 [I], where they begin among all R T tokens.
  """

  tokens: np.ndarray
  positions: np.ndarray
  segment_ids: np.ndarray
  lengths: np.ndarray
  starts: np.ndarray

  @property
  def last(self) -> np.ndarray:
    """Where the prompts' last tokens lie, int32 [I]."""
    return self.starts + self.lengths - 1


class Run(NamedTuple):
  """A pack that was run: (logits, caches), and the samples that wait for a row, each with its prompt's place in it."""

  pack: Pack
  run: tuple[jax.Array, list[LayerCache]]
  waiting: collections.deque[tuple[int, Sample]]


class Queue:
  """Samples that wait for a row; prompts are run a pack at a time, once each."""

  def __init__(self, ids: Sequence[list[int]], asked: Sequence[Sample], shape: Shape,
               run: Callable[[Pack], tuple[jax.Array, list[LayerCache]]], *, parts: int = 1):
    """Runs nothing yet; `ids` are the prompts' own tokens, less what they share, `parts` as in `pack_shape`."""
    self._ids, self._shape, self._run, self._parts = ids, shape, run, parts
    by_prompt = collections.defaultdict(list)
    for sample in asked:
      by_prompt[sample.prompt].append(sample)
    self._waiting = list(by_prompt.items())
    self._current: Run | None = None

  def __bool__(self) -> bool:
    return bool(self._waiting) or self._current is not None

  def take(self, count: int) -> tuple[list[tuple[int, Sample]], Run]:
    """At most `count` samples, each with the place of its prompt in a pack, and the pack; runs one if need be."""
    current = self._current or self._next()
    taken = [current.waiting.popleft() for _ in range(min(count, len(current.waiting)))]
    self._current = current if current.waiting else None
    return taken, current

  def _next(self) -> Run:
    """Packs prompts, of those that wait the longest first, each into the first row that has room."""
    window, self._waiting = self._waiting[:_AHEAD + self._shape.prompts], self._waiting[_AHEAD + self._shape.prompts:]
    rows: list[list[int]] = [[] for _ in range(self._shape.rows)]
    room, taken = [self._shape.length] * self._shape.rows, set()
    for i in sorted(range(len(window)), key=lambda i: -len(self._ids[window[i][0]])):
      length = len(self._ids[window[i][0]])
      row = next((r for r, free in enumerate(room) if free >= length), None)
      if row is not None and len(taken) < self._shape.prompts:
        rows[row].append(i)
        room[row] -= length
        taken.add(i)
    self._waiting = [w for i, w in enumerate(window) if i not in taken] + self._waiting
    chosen = [window[i] for row in rows for i in row]
    pack = packed([[self._ids[window[i][0]] for i in row] for row in rows], self._shape.fewer(
        sum(map(bool, rows)), len(chosen), self._parts))
    waiting = collections.deque((place, sample) for place, (_, samples) in enumerate(chosen) for sample in samples)
    return Run(pack, self._run(pack), waiting)


def packed(rows: Sequence[Sequence[Sequence[int]]], shape: Shape) -> Pack:
  """Prompts laid end to end in rows."""
  tokens, positions, segment_ids = (np.zeros((shape.rows, shape.length), np.int32) for _ in range(3))
  lengths, starts = np.ones(shape.prompts, np.int32), np.zeros(shape.prompts, np.int32)
  count = 0
  for r, row in enumerate(rows[:shape.rows]):
    begin = 0
    for number, ids in enumerate(row, 1):
      end = begin + len(ids)
      tokens[r, begin:end], positions[r, begin:end], segment_ids[r, begin:end] = ids, range(len(ids)), number
      lengths[count], starts[count] = len(ids), r * shape.length + begin
      begin, count = end, count + 1
  return Pack(tokens, positions, segment_ids, lengths, starts)


def pack_shape(lengths: Sequence[int], *, parts: int = 1, cpu: bool = True) -> Shape:
  """The shape of the packs of prompts.

  Args:
    lengths: of the prompts, less what they share.
    parts: rows are a multiple of this, for so many devices split them.
    cpu: whether it is a CPU that runs them.

  >>> pack_shape([40]), pack_shape([60] * 100), pack_shape([900, 30])
  (Shape(rows=1, length=64, prompts=4), Shape(rows=4, length=256, prompts=64), Shape(rows=1, length=1024, prompts=64))
  """
  total, longest = sum(lengths), max(lengths, default=1)
  length = slots_of(max(longest, min(_ROW, total)))
  most = max(1, (_AT_ONCE if cpu else _AT_ONCE_ELSEWHERE) // (length * parts))
  wanted = 1 << (max(1, math.ceil(total / (length * parts))) - 1).bit_length()
  rows = parts * min(1 << (most.bit_length() - 1), wanted)
  return Shape(rows, length, max(1, rows * length // _TOKENS_A_PROMPT))


def shared(ids: Sequence[Sequence[int]], samples: int) -> int:
  """How many tokens all prompts begin with; one at least is left to each, whose logits are the next token's.

  >>> shared([list(range(40)) + [1, 2], list(range(40)) + [3]], 2), shared([[1, 2, 3], [1, 2, 4]], 2)
  (40, 0)
  """
  if samples < 2 or not ids:
    return 0
  first, last = min(ids), max(ids)  # what these share, all do
  most = min(map(len, ids)) - 1
  count = next((i for i in range(most) if first[i] != last[i]), most)
  return count if count >= _LEAST_SHARED else 0


def slots_of(length: int) -> int:
  """Slots that hold so many tokens: 64, 128, 192, 256, 384, 512, 768, ...

  >>> [slots_of(n) for n in (1, 65, 200, 257, 1500)]
  [64, 128, 256, 384, 1536]
  """
  if length <= 2 * _LEAST_SLOTS:
    return -(-max(1, length) // _LEAST_SLOTS) * _LEAST_SLOTS
  power = 1 << (length - 1).bit_length()
  return power * 3 // 4 if length <= power * 3 // 4 else power


def most_slots(length: int) -> int:
  """The least multiple of 64 that holds so many tokens: what a cache need not grow past."""
  return -(-max(1, length) // _LEAST_SLOTS) * _LEAST_SLOTS


def rows_of(batch_size: int, asked: int) -> int:
  """Samples that are decoded at once, of so many that are asked for."""
  return min(batch_size, 1 << (max(1, asked) - 1).bit_length())


def fewer_rows(rows: int, parts: int = 1) -> list[int]:
  """The numbers of rows that `rows` shrink to, smallest first; multiples of `parts`.

  >>> fewer_rows(64), fewer_rows(12)
  ([8, 16, 24, 32, 48, 64], [8, 9, 12])
  """
  least = -(-_LEAST_ROWS // parts) * parts
  found = {max(least, math.ceil(rows * share / parts) * parts) for share in _SHARES}
  return sorted({*(n for n in found if n < rows), rows})


def fitting_rows(sizes: Sequence[int], going: int) -> int:
  """The smallest of some numbers of rows, smallest first, that so many samples fit in."""
  return sizes[bisect.bisect_left(sizes, going)]
