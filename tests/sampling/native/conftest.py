"""Fixtures of the tests of the native sampler."""

import pytest

from imm_jax.sampling.native import sampler as native
from tests import TINY


@pytest.fixture(scope="module")
def sampler() -> native.NativeSampler:
  """Samples from the embedded model; a file's tests share what it has compiled."""
  return native.NativeSampler(TINY, compute_dtype="float32", batch_size=8)
