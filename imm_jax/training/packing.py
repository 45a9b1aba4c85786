"""Examples of different lengths into rows of one length.

Each epoch's examples are packed by first fit, longest first, and its rows shuffled; steps take rows in that order. The
order follows from (examples, seed) alone, not from the machine, and a batch from (order, step): nothing but the step
has to be saved to go on from it.

Axes: R rows of a batch, T row length.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Batch = dict[str, np.ndarray]


class TokenizedExample(NamedTuple):
  """Token ids of a prompt and of the response that is learned."""

  prompt: list[int]
  response: list[int]


class PackedBatches:
  """The batches of a whole training run: `len(b)` steps, `b[i]` the batch of step i.

  A batch has int32 arrays [R, T]: `tokens`, `positions` and `segment_ids` (0 is padding), and float32 `weights` [R, T],
  1 where the token is learned.

  Attributes:
    rows: R.
    row_length: T.
    empty_rows: rows of every step that hold nothing, since R has to be a multiple.
    padding: share of all positions that hold nothing.
    per_step: examples of a step, on average.
    tokens_per_step: of those, padding not counted.
    squares_per_step: sum of the squares of their lengths.
    epoch_ends: of each epoch, the number of steps after which all its examples have been seen; a step may hold the last
      rows of one and the first of the next, or several epochs.

  >>> examples = [TokenizedExample([1, 2], [3]), TokenizedExample([4], [5, 6])]
  >>> batches = PackedBatches(examples, epochs=1, global_batch=2, row_length=8, seed=0)
  >>> batches[0]["segment_ids"].tolist()
  [[1, 1, 1, 2, 2, 2, 0, 0]]
  """

  def __init__(self, examples: Sequence[TokenizedExample], *, epochs: int, global_batch: int, row_length: int,
               seed: int | Sequence[int], row_multiple: int = 1, alone: bool = False):
    """Plans the run.

    Args:
      examples: none longer than a row.
      epochs: passes over the examples, each packed and ordered anew.
      global_batch: examples of a step, on average; a step has a fixed number of rows, which is chosen for that.
      row_length: tokens of a row.
      seed: of the order.
      row_multiple: R is a multiple of this (devices times accumulation steps); rows that are added for it are empty.
      alone: whether each example has a step of its own, in place of `global_batch` of them.

    Raises:
      ValueError: when there is no example, or one is longer than a row.
    """
    if not examples:
      raise ValueError("there is no example to train on")
    lengths = np.array([len(e.prompt) + len(e.response) for e in examples])
    if lengths.max() > row_length:
      raise ValueError(f"example {int(lengths.argmax())} has {int(lengths.max())} tokens, a row holds {row_length}")
    self._examples = examples
    self._pack = functools.partial(PackedBatches, examples, epochs=1, global_batch=global_batch, row_length=row_length,
                                   seed=seed)
    self._row_multiple = row_multiple
    self.row_length = row_length
    self._plan: list[list[int]] = []
    ends = []
    for epoch in range(epochs):
      rng = np.random.default_rng([*np.atleast_1d(seed), epoch])
      order = rng.permutation(len(examples))
      rows = [[i] for i in order.tolist()] if alone else _first_fit(order, lengths, row_length)
      self._plan += [rows[i] for i in rng.permutation(len(rows))]
      ends.append(len(self._plan))
    self._filled = 1 if alone else _rows_of_a_step(
        len(self._plan) * global_batch / (epochs * len(examples)), len(self._plan))
    self.rows = -(-self._filled // row_multiple) * row_multiple
    self.epoch_ends = [-(-end // self._filled) for end in ends]
    self.empty_rows = self.rows - self._filled
    self.padding = 1 - epochs * int(lengths.sum()) / (len(self) * self.rows * row_length)
    of_a_step = lambda total: epochs * float(total) / len(self)
    self.per_step = of_a_step(len(examples))
    self.tokens_per_step, self.squares_per_step = of_a_step(lengths.sum()), of_a_step((lengths**2).sum())

  def __len__(self) -> int:
    return -(-len(self._plan) // self._filled)

  def __getitem__(self, step: int) -> Batch:
    return self.part(step, 0, self.rows)

  def part(self, step: int, start: int, stop: int) -> Batch:
    """Rows start to stop of a step's batch."""
    shape = (stop - start, self.row_length)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids")}
    batch["weights"] = np.zeros(shape, np.float32)
    for r, row in enumerate(self._step(step)[start:stop]):
      begin = 0
      for segment, index in enumerate(row, 1):
        prompt, response = self._examples[index]
        # Nothing predicts a segment's first token, not even where a prompt is empty.
        learned, end = begin + max(1, len(prompt)), begin + len(prompt) + len(response)
        batch["tokens"][r, begin:end] = prompt + response
        batch["positions"][r, begin:end] = np.arange(end - begin)
        batch["segment_ids"][r, begin:end] = segment
        batch["weights"][r, learned:end] = 1
        begin = end
    return batch

  def one_epoch(self) -> "PackedBatches":
    """The batches of one pass over the same examples, packed as the first epoch is."""
    return self._pack(row_multiple=self._row_multiple)

  def one_by_one(self, row_multiple: int) -> "PackedBatches":
    """The batches of one pass over the same examples, of one example each."""
    return self._pack(row_multiple=row_multiple, alone=True)

  def members(self, step: int) -> list[int]:
    """Indices of the examples of a step, in order."""
    return sorted(index for row in self._step(step) for index in row)

  def _step(self, step: int) -> list[list[int]]:
    if not 0 <= step < len(self):
      raise IndexError(f"step {step} of {len(self)}")
    return self._plan[step * self._filled:(step + 1) * self._filled]


def _rows_of_a_step(wanted: float, available: int) -> int:
  """About as many as are wanted: a multiple of 2, 4 or 8 where that changes it by an eighth at most.

  Most meshes then divide it. It must not depend on the mesh itself, or the order of the data would.
  """
  rows = max(1, min(round(wanted), available))
  unit = 1 << min(3, max(0, rows.bit_length() - 3))
  return round(rows / unit) * unit


def _first_fit(indices: np.ndarray, lengths: np.ndarray, row_length: int) -> list[list[int]]:
  """Rows of example indices; each example goes to the first row with room, long examples first."""
  rows: list[list[int]] = []
  room = np.zeros(len(indices), np.int64)
  for index in indices[np.argsort(-lengths[indices], kind="stable")].tolist():
    fits = room[:len(rows)] >= lengths[index]
    row = int(fits.argmax()) if fits.any() else len(rows)
    if row == len(rows):
      rows.append([])
      room[row] = row_length
    rows[row].append(index)
    room[row] -= lengths[index]
  return rows
