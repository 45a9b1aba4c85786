"""Feeds batches to the devices; grain prefetches them.

The order is that of `packing.PackedBatches`, whatever the number of processes: each process builds only the rows that
its devices hold.
"""

from typing import Any

import grain
import jax
from jax.sharding import Mesh, NamedSharding

from imm_jax.model.sharding import BATCH
from imm_jax.training.packing import Batch, PackedBatches

_READ_AHEAD = 4


class Input:
  """Iterates over the batches of a run as arrays on a mesh, split over `data` and `fsdp`.

  `state` is the position, serializable as JSON; `Input(batches, mesh, state)` resumes from it.
  """

  def __init__(self, batches: PackedBatches, mesh: Mesh, state: dict[str, Any] | None = None):
    self._sharding = NamedSharding(mesh, BATCH)
    self._shape = (batches.rows, batches.row_length)
    rows = [index[0].indices(batches.rows)
            for index in self._sharding.addressable_devices_indices_map(self._shape).values()]
    self._first = min(begin for begin, _, _ in rows)
    source = _Rows(batches, self._first, max(end for _, end, _ in rows))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_READ_AHEAD)
    self._iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))
    if state is not None:
      self._iterator.set_state(state)

  @property
  def state(self) -> dict[str, Any]:
    """Returns the position after the last batch that was returned."""
    return self._iterator.get_state()

  def __iter__(self) -> "Input":
    return self

  def __next__(self) -> dict[str, jax.Array]:
    return {name: jax.make_array_from_callback(self._shape, self._sharding, lambda index, x=x: self._local(x, index))
            for name, x in next(self._iterator).items()}

  def _local(self, rows: Any, index: tuple[slice, ...]) -> Any:
    begin, end, _ = index[0].indices(self._shape[0])
    return rows[begin - self._first:end - self._first]


class _Rows:
  """Serves rows `first` to `last` of every batch as a grain source."""

  def __init__(self, batches: PackedBatches, first: int, last: int):
    self._batches, self._first, self._last = batches, first, last

  def __len__(self) -> int:
    return len(self._batches)

  def __getitem__(self, step: int) -> Batch:
    return self._batches.part(step, self._first, self._last)
