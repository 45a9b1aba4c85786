"""How passes over packed batches are computed."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh


class Computation(NamedTuple):
  """Holds how passes over packed batches are computed; training, analyses and estimates share it.

  Attributes:
    mesh: devices; parameters are sharded by `sharding.RULES`.
    compute_dtype: dtype of activations.
    accumulation: number of parts that a batch is run in, one after the other.
    remat: one of `decoder.REMAT`; passes without gradients do not read it.
    attention: backend, from `attention.choose_backend`.
  """

  mesh: Mesh
  compute_dtype: jnp.dtype
  accumulation: int = 1
  remat: str = "none"
  attention: str = "xla"
