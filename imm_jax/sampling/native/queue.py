"""The queue of samples that wait for a row: common prefixes, packing of prompts, and the choice of array sizes.

Each size is a compilation, so there are few: numbers of slots and rows are rounded up to coarse steps.
"""

import bisect
import collections
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from imm_jax.model.cached import LayerCache

# Length of a packed row if no prompt is longer: attention scores grow with its square.
_MIN_ROW_LENGTH = 256
# Tokens per prefill, on a CPU and elsewhere: more would be hardly faster but take more memory.
_PREFILL_TOKENS_CPU, _PREFILL_TOKENS = 1024, 8192
# A pack has at most one prompt per this many tokens, because each needs logits of the whole vocabulary.
_TOKENS_PER_PROMPT = 16
# Number of waiting prompts, beyond those of a full pack, that are considered for filling it.
_LOOKAHEAD = 64
_MIN_SLOTS = 64
# Cache slots of a row at the start: as many as most samples fill, and few enough that unused ones cost little.
FIRST_SLOTS = 128
# Maximum of new tokens from which answers are long.
_LONG_ANSWER = 128
# When no sample waits, rows shrink to these shares of all rows. Short answers end too soon for compiling each to pay.
_ROW_SHARES, _ROW_SHARES_SHORT = (0.5, 0.25, 0.125), (0.25,)
_MIN_ROWS = 8
# Shorter common prefixes are not shared; those of only a part of the prompts must be longer.
_MIN_PREFIX, _MIN_GROUP_PREFIX = 16, 64
# A call has one prefix or a few, so their numbers of slots may be many.
_PREFIX_STEP = 128


class Sample(NamedTuple):
  """Identifies a requested completion by its prompt's index and id, and its number among that prompt's samples."""

  prompt: int
  number: int
  id: str
  temperature: float


class Shape(NamedTuple):
  """Holds the shape of a pack: R rows of T tokens, and the maximum number of prompts."""

  rows: int
  length: int
  prompts: int

  def halve_to(self, rows: int, prompts: int, parts: int) -> "Shape":
    """Halves the shape while it holds `rows` and `prompts` and its rows are a multiple of `parts`."""
    if self.rows % (2 * parts) or self.rows // 2 < rows or self.prompts // 2 < prompts:
      return self
    return Shape(self.rows // 2, self.length, self.prompts // 2).halve_to(rows, prompts, parts)


class Pack(NamedTuple):
  """Holds packed prompts.

  Attributes:
    tokens: int32 [R, T].
    positions: int32 [R, T], from 0 in every prompt.
    segment_ids: int32 [R, T], from 1; 0 is padding.
    lengths: int32 [I], lengths of the prompts.
    starts: int32 [I], their offsets within the R T tokens.
  """

  tokens: np.ndarray
  positions: np.ndarray
  segment_ids: np.ndarray
  lengths: np.ndarray
  starts: np.ndarray

  @property
  def last(self) -> np.ndarray:
    """The offsets of the prompts' last tokens, int32 [I]."""
    return self.starts + self.lengths - 1


class PrefilledPack(NamedTuple):
  """Holds a pack, its (logits, caches), and the samples that wait for a row, with their prompts' places in the pack."""

  pack: Pack
  run: tuple[jax.Array, list[LayerCache]]
  waiting: collections.deque[tuple[int, Sample]]


class Queue:
  """Hands out samples that wait for a row; each prompt is run once, a pack at a time."""

  def __init__(self, ids: Mapping[int, list[int]], samples: Sequence[Sample], shape: Shape,
               run: Callable[[Pack], tuple[jax.Array, list[LayerCache]]], *, parts: int = 1):
    """Queues samples; `ids` are the prompts' tokens by number, without the common prefix; `parts`: see `pack_shape`."""
    self._ids, self._shape, self._run, self._parts = ids, shape, run, parts
    by_prompt = collections.defaultdict(list)
    for sample in samples:
      by_prompt[sample.prompt].append(sample)
    self._waiting = list(by_prompt.items())
    self._current: PrefilledPack | None = None

  def __bool__(self) -> bool:
    return bool(self._waiting) or self._current is not None

  def take(self, count: int) -> tuple[list[tuple[int, Sample]], PrefilledPack]:
    """Takes at most `count` samples, with their prompts' places in a pack, and that pack; runs one if needed."""
    current = self._current or self._next()
    samples = [current.waiting.popleft() for _ in range(min(count, len(current.waiting)))]
    self._current = current if current.waiting else None
    return samples, current

  def _next(self) -> PrefilledPack:
    """Packs and runs prompts by first-fit decreasing among those that wait longest."""
    size = _LOOKAHEAD + self._shape.prompts
    window, self._waiting = self._waiting[:size], self._waiting[size:]
    rows: list[list[int]] = [[] for _ in range(self._shape.rows)]
    room, packed = [self._shape.length] * self._shape.rows, set()
    for i in sorted(range(len(window)), key=lambda i: -len(self._ids[window[i][0]])):
      length = len(self._ids[window[i][0]])
      row = next((r for r, free in enumerate(room) if free >= length), None)
      if row is not None and len(packed) < self._shape.prompts:
        rows[row].append(i)
        room[row] -= length
        packed.add(i)
    self._waiting = [w for i, w in enumerate(window) if i not in packed] + self._waiting
    chosen = [window[i] for row in rows for i in row]
    pack = pack_prompts([[self._ids[window[i][0]] for i in row] for row in rows], self._shape.halve_to(
        sum(map(bool, rows)), len(chosen), self._parts))
    waiting = collections.deque((place, sample) for place, (_, samples) in enumerate(chosen) for sample in samples)
    return PrefilledPack(pack, self._run(pack), waiting)


def pack_prompts(rows: Sequence[Sequence[Sequence[int]]], shape: Shape) -> Pack:
  """Concatenates the prompts of each row into a pack."""
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
  """Chooses the shape of packs.

  Args:
    lengths: lengths of the prompts without the common prefix.
    parts: number of devices that split the rows; rows are a multiple of it.
    cpu: whether they run on a CPU.

  >>> pack_shape([40]), pack_shape([60] * 100), pack_shape([900, 30])
  (Shape(rows=1, length=64, prompts=4), Shape(rows=4, length=256, prompts=64), Shape(rows=1, length=1024, prompts=64))
  """
  total, longest = sum(lengths), max(lengths, default=1)
  length = round_up_slots(max(longest, min(_MIN_ROW_LENGTH, total)))
  limit = max(1, (_PREFILL_TOKENS_CPU if cpu else _PREFILL_TOKENS) // (length * parts))
  wanted = math.ceil(total / (length * parts))
  power = 1 << (max(1, wanted) - 1).bit_length()
  rows = parts * min(1 << (limit.bit_length() - 1), power * 3 // 4 if power > 2 and wanted <= power * 3 // 4 else power)
  return Shape(rows, length, max(1, rows * length // _TOKENS_PER_PROMPT))


def common_prefix(ids: Sequence[Sequence[int]], samples: int) -> int:
  """Returns the length of the common prefix of all prompts, 0 if it is short; leaves each prompt its last token.

  >>> common_prefix([list(range(40)) + [1, 2], list(range(40)) + [3]], 2), common_prefix([[1, 2, 3], [1, 2, 4]], 2)
  (40, 0)
  """
  if samples < 2 or not ids:
    return 0
  first, last = min(ids), max(ids)  # the prefix of the extremes in lexical order is common to all
  limit = min(map(len, ids)) - 1
  count = next((i for i in range(limit) if first[i] != last[i]), limit)
  return count if count >= _MIN_PREFIX else 0


def group_by_prefix(ids: Sequence[Sequence[int]], *, least: int = 1) -> list[list[int]]:
  """Groups prompts by what they begin with, such as the worked examples of several tasks.

  Prompts that all begin alike, or share less than a third of their tokens, are one group. So are those whose beginning
  fewer than `least` prompts have: the last samples of each group leave rows idle.

  Returns:
    The indices of each group's prompts, ascending.

  >>> first, second = [*range(70)], [*range(100, 190)]
  >>> group_by_prefix([[*first, 1], [*second, 1], [*first, 2], [*second, 2], [7, 8]])
  [[0, 2], [1, 3], [4]]
  >>> group_by_prefix([[*first, 1], [*first, 2], [7, 8]], least=3)
  [[0, 1, 2]]
  """
  everything = [*range(len(ids))]
  if len(ids) <= least or len(ids) < 3:
    return [everything] if everything else []
  order = sorted(everything, key=ids.__getitem__)
  arrays = [np.asarray(ids[i]) for i in order]
  shared = [_count_equal(a, b) for a, b in itertools.pairwise(arrays)]
  long = [count for count in shared if count >= _MIN_GROUP_PREFIX]
  usual = np.median(long) if long else 0
  if 3 * sum(long) < sum(map(len, ids)) or 2 * min(shared) >= usual:
    return [everything]
  ends = [i + 1 for i, count in enumerate(shared) if 2 * count < usual]
  families = [sorted(order[begin:end]) for begin, end in zip([0, *ends], [*ends, len(ids)], strict=True)]
  groups = sorted(family for family in families if len(family) >= max(2, least))
  rest = sorted(i for family in families if len(family) < max(2, least) for i in family)
  return [*groups, rest] if rest else groups


def _count_equal(first: np.ndarray, second: np.ndarray) -> int:
  """Counts the tokens with which both begin."""
  size = min(len(first), len(second))
  differs = np.flatnonzero(first[:size] != second[:size])
  return int(differs[0]) if len(differs) else size


def round_up_prefix(length: int) -> int:
  """Rounds the length of a prefix, which each step reads, up to a number of slots: finer than `round_up_slots` if long.

  >>> [round_up_prefix(n) for n in (1, 65, 129, 1025)]
  [64, 128, 192, 1152]
  """
  return min(round_up_slots(length), -(-length // _PREFIX_STEP) * _PREFIX_STEP)


def round_up_slots(length: int) -> int:
  """Rounds a number of tokens up to a number of slots: 64, 128, 192, 256, 384, 512, 768, ...

  >>> [round_up_slots(n) for n in (1, 65, 200, 257, 1500)]
  [64, 128, 256, 384, 1536]
  """
  if length <= 2 * _MIN_SLOTS:
    return -(-max(1, length) // _MIN_SLOTS) * _MIN_SLOTS
  power = 1 << (length - 1).bit_length()
  return power * 3 // 4 if length <= power * 3 // 4 else power


def compute_max_slots(length: int) -> int:
  """Returns the number of slots beyond which a cache of `length` tokens need not grow: a multiple of 64."""
  return -(-max(1, length) // _MIN_SLOTS) * _MIN_SLOTS


def choose_rows(batch_size: int, samples: int) -> int:
  """Returns the number of rows for `samples` samples: those that are decoded at once."""
  return min(batch_size, 1 << (max(1, samples) - 1).bit_length())


def list_row_counts(rows: int, max_new_tokens: int, parts: int = 1) -> list[int]:
  """Returns the numbers of rows that `rows` can shrink to, ascending, and `rows`; all multiples of `parts`.

  >>> list_row_counts(64, 256), list_row_counts(12, 256), list_row_counts(64, 40)
  ([8, 16, 32, 64], [8, 12], [16, 64])
  """
  smallest = -(-_MIN_ROWS // parts) * parts
  shares = _ROW_SHARES if max_new_tokens >= _LONG_ANSWER else _ROW_SHARES_SHORT
  sizes = {max(smallest, math.ceil(rows * share / parts) * parts) for share in shares}
  return sorted({*(n for n in sizes if n < rows), rows})


def choose_row_count(sizes: Sequence[int], num_running: int) -> int:
  """Returns the smallest of the ascending `sizes` that holds `num_running` samples."""
  return sizes[bisect.bisect_left(sizes, num_running)]
