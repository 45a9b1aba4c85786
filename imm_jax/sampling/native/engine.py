"""The native sampler as an engine: each process samples its share of the prompts on its own devices."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from jax.sharding import Mesh

from imm_jax.model import checkpoint_folder, sharding
from imm_jax.runtime import distributed, hardware
from imm_jax.sampling import Completion, Prompt, Sampler
from imm_jax.sampling.native import parts
from imm_jax.sampling.native.sampler import NativeSampler


class Distributed:
  """Implements `Sampler` over all processes with a native sampler in each."""

  def __init__(self, sampler: NativeSampler, *, digest: str, rows: int):
    """Takes a digest of the model's folder and compute dtype (used on process 0), and the rows decoded at once."""
    self._sampler, self._digest, self._rows = sampler, digest, rows

  def generate(self, prompts: Sequence[Prompt], *, journal: Path | None = None, label: str = "sample", **options: Any,
               ) -> list[list[Completion]]:
    """Samples as `Sampler.generate` says; the completions are valid only on process 0."""
    return parts.generate(self._sampler.generate, prompts, journal=journal, model=self._digest, rows=self._rows,
                          label=label, **options)


@contextlib.contextmanager
def open_sampler(config: ml_collections.ConfigDict, model: Path, *, batch_size: int, scratch: Path,
                 mesh: Callable[[], Mesh]) -> Iterator[Sampler]:
  """Opens a native sampler; see `engines`."""
  del scratch
  dtype = hardware.compute_dtype(config.sample.compute_dtype)
  sampler = NativeSampler(model, compute_dtype=dtype, batch_size=batch_size, mesh=sharding.local_mesh(mesh()),
                          kernel=config.sampler.attention)
  digest = f"{checkpoint_folder.digest(model)} in {dtype}" if distributed.is_main() else ""
  yield Distributed(sampler, digest=digest, rows=batch_size)


def check_engine(config: ml_collections.ConfigDict) -> None:
  """Raises nothing: the native sampler runs wherever jax does."""
