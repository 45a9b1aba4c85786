"""Examples of different lengths into rows of one length.

A batch holds `global_batch` examples, packed by first fit (longest first) into rows; segment ids keep the examples of a
row apart. The number of rows is the same in every step, so the step compiles once. A batch is a pure function of
(examples, seed, step): nothing has to be saved to go on from any step.

Axes: R rows of a batch, T row length.
"""

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

  >>> examples = [TokenizedExample([1, 2], [3]), TokenizedExample([4], [5, 6])]
  >>> batches = PackedBatches(examples, epochs=1, global_batch=2, row_length=8, seed=0)
  >>> batches[0]["segment_ids"].tolist()
  [[1, 1, 1, 2, 2, 2, 0, 0]]
  """

  def __init__(self, examples: Sequence[TokenizedExample], *, epochs: int, global_batch: int, row_length: int,
               seed: int | Sequence[int], row_multiple: int = 1):
    """Plans the run.

    Args:
      examples: none longer than a row.
      epochs: passes over the examples, each in its own order.
      global_batch: examples of a step; the last step of an epoch may hold fewer.
      row_length: tokens of a row.
      seed: of the order.
      row_multiple: rows of a batch are a multiple of this (devices times accumulation steps).

    Raises:
      ValueError: when there is no example, or one is longer than a row.
    """
    if not examples:
      raise ValueError("there is no example to train on")
    lengths = np.array([len(e.prompt) + len(e.response) for e in examples])
    if lengths.max() > row_length:
      raise ValueError(f"example {int(lengths.argmax())} has {int(lengths.max())} tokens, a row holds {row_length}")
    self._examples = examples
    self._row_length = row_length
    self._plan: list[list[list[int]]] = []
    for epoch in range(epochs):
      order = np.random.default_rng([*np.atleast_1d(seed), epoch]).permutation(len(examples))
      for start in range(0, len(examples), global_batch):
        self._plan.append(_first_fit(order[start:start + global_batch], lengths, row_length))
    rows = max(len(step) for step in self._plan)
    self.rows = -(-rows // row_multiple) * row_multiple
    self.padding = 1 - epochs * int(lengths.sum()) / (len(self._plan) * self.rows * row_length)

  def __len__(self) -> int:
    return len(self._plan)

  def __getitem__(self, step: int) -> Batch:
    shape = (self.rows, self._row_length)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids")}
    batch["weights"] = np.zeros(shape, np.float32)
    for r, row in enumerate(self._plan[step]):
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


def _first_fit(indices: np.ndarray, lengths: np.ndarray, row_length: int) -> list[list[int]]:
  """Rows of example indices; each example goes to the first row with room, long examples first."""
  rows: list[list[int]] = []
  room: list[int] = []
  for index in sorted(indices.tolist(), key=lambda i: -lengths[i]):
    row = next((r for r, free in enumerate(room) if free >= lengths[index]), None)
    if row is None:
      rows.append([])
      room.append(row_length)
      row = -1
    rows[row].append(index)
    room[row] -= int(lengths[index])
  return rows
