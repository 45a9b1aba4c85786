"""Packs examples of different lengths into rows of a fixed length.

Each epoch's examples are packed by first-fit decreasing, and its rows are shuffled; steps take rows in that order. The
order depends only on (examples, seed), not on the machine, and a batch only on (order, step), so that training resumes
from the step number alone.

Axes: R rows of a batch, T row length.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Batch = dict[str, np.ndarray]


class TokenizedExample(NamedTuple):
  """Holds the token ids of a prompt and of the response to learn."""

  prompt: list[int]
  response: list[int]


class PackedBatches:
  """Provides the batches of a whole training run: `len(b)` steps, `b[i]` is the batch of step i.

  A batch has int32 arrays [R, T] `tokens`, `positions` and `segment_ids` (0 is padding), and float32 `weights` [R, T],
  1 where the token is learned.

  Attributes:
    rows: R.
    row_length: T.
    empty_rows: rows of each step that are only padding, because R must be a multiple of `row_multiple`.
    padding: share of all positions that are padding.
    per_step: mean number of examples per step.
    tokens_per_step: mean number of tokens per step, without padding.
    squares_per_step: mean sum per step of the squared example lengths.
    epoch_ends: for each epoch, the number of steps after which all its examples have been seen; a step may span the
      end of one epoch and the start of the next, or several epochs.

  >>> examples = [TokenizedExample([1, 2], [3]), TokenizedExample([4], [5, 6])]
  >>> batches = PackedBatches(examples, epochs=1, global_batch=2, row_length=8, seed=0)
  >>> batches[0]["segment_ids"].tolist()
  [[1, 1, 1, 2, 2, 2, 0, 0]]
  """

  def __init__(self, examples: Sequence[TokenizedExample], *, epochs: int, global_batch: int, row_length: int,
               seed: int | Sequence[int], row_multiple: int = 1, one_per_step: bool = False):
    """Plans the run.

    Args:
      examples: examples to pack, none longer than a row.
      epochs: passes over the examples; each has its own packing and order.
      global_batch: desired mean number of examples per step; the fixed number of rows per step is chosen to match it.
      row_length: tokens per row.
      seed: seed of the order.
      row_multiple: R is rounded up to a multiple of this (devices times accumulation steps) with empty rows.
      one_per_step: whether each step holds a single example; `global_batch` is then ignored.

    Raises:
      ValueError: when there are no examples, or one is longer than a row.
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
      rows = [[i] for i in order.tolist()] if one_per_step else _pack_rows(order, lengths, row_length)
      self._plan += [rows[i] for i in rng.permutation(len(rows))]
      ends.append(len(self._plan))
    self._filled = 1 if one_per_step else _choose_rows(
        len(self._plan) * global_batch / (epochs * len(examples)), len(self._plan))
    self.rows = -(-self._filled // row_multiple) * row_multiple
    self.epoch_ends = [-(-end // self._filled) for end in ends]
    self.empty_rows = self.rows - self._filled
    self.padding = 1 - epochs * int(lengths.sum()) / (len(self) * self.rows * row_length)
    per_step = lambda total: epochs * float(total) / len(self)
    self.per_step = per_step(len(examples))
    self.tokens_per_step, self.squares_per_step = per_step(lengths.sum()), per_step((lengths**2).sum())

  def __len__(self) -> int:
    return -(-len(self._plan) // self._filled)

  def __getitem__(self, step: int) -> Batch:
    return self.part(step, 0, self.rows)

  def part(self, step: int, start: int, stop: int) -> Batch:
    """Returns rows `start` to `stop` of a step's batch."""
    shape = (stop - start, self.row_length)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids")}
    batch["weights"] = np.zeros(shape, np.float32)
    for r, row in enumerate(self._step(step)[start:stop]):
      begin = 0
      for segment, index in enumerate(row, 1):
        prompt, response = self._examples[index]
        # A segment's first token cannot be learned, even if the prompt is empty: nothing predicts it.
        learned, end = begin + max(1, len(prompt)), begin + len(prompt) + len(response)
        batch["tokens"][r, begin:end] = prompt + response
        batch["positions"][r, begin:end] = np.arange(end - begin)
        batch["segment_ids"][r, begin:end] = segment
        batch["weights"][r, learned:end] = 1
        begin = end
    return batch

  def to_single_epoch(self) -> "PackedBatches":
    """Returns the batches of a single pass over the same examples, packed like the first epoch."""
    return self._pack(row_multiple=self._row_multiple)

  def to_single_examples(self, row_multiple: int) -> "PackedBatches":
    """Returns the batches of a single pass over the same examples, with one example per batch."""
    return self._pack(row_multiple=row_multiple, one_per_step=True)

  def members(self, step: int) -> list[int]:
    """Returns the sorted indices of the examples of a step."""
    return sorted(index for row in self._step(step) for index in row)

  def _step(self, step: int) -> list[list[int]]:
    if not 0 <= step < len(self):
      raise IndexError(f"step {step} of {len(self)}")
    return self._plan[step * self._filled:(step + 1) * self._filled]


def _choose_rows(wanted: float, available: int) -> int:
  """Rounds the wanted number of rows to a multiple of 2, 4 or 8 if that changes it by at most an eighth.

  Most meshes then divide it. It must not depend on the mesh itself, or the order of the data would.
  """
  rows = max(1, min(round(wanted), available))
  unit = 1 << min(3, max(0, rows.bit_length() - 3))
  return round(rows / unit) * unit


def _pack_rows(indices: np.ndarray, lengths: np.ndarray, row_length: int) -> list[list[int]]:
  """Packs example indices into rows by first-fit decreasing."""
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
