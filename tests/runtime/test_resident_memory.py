"""Freed memory goes back to the system."""

from types import SimpleNamespace

import numpy as np

from imm_jax.runtime import resident_memory


def test_memory_in_reference_cycles_is_returned():
  """Such as that of a sampler, which would otherwise hold a model while the next stage runs."""
  holder = SimpleNamespace(array=np.ones(25_000_000))  # 191 MiB
  holder.itself = holder
  before = resident_memory.read_current()
  del holder
  resident_memory.release_freed()
  assert resident_memory.read_current() < before - 150 * 2**20
