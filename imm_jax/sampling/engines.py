"""The sampling engines by `config.sampler.kind`; a new engine is a module and a line here.

An engine's module has two functions:

    open_sampler(config, model, *, batch_size, scratch, mesh) -> a context manager of a `Sampler`
    check_engine(config) -> None; raises UserError if the engine cannot run with this config

`model` is a checkpoint folder and `scratch` a folder for logs. `mesh()` returns this process's devices; an engine must
not call it before it needs them, because another process may hold them.
"""

import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path

import ml_collections
from jax.sharding import Mesh

from imm_jax.sampling import Sampler

# Module by kind; imported on first use.
ENGINES = {"native": "imm_jax.sampling.native.engine", "vllm": "imm_jax.sampling.vllm.engine"}


def open_sampler(config: ml_collections.ConfigDict, model: Path, *, batch_size: int, scratch: Path,
                 mesh: Callable[[], Mesh]) -> contextlib.AbstractContextManager[Sampler]:
  """Opens a sampler of a model with the engine that the config selects."""
  return _engine(config).open_sampler(config, model, batch_size=batch_size, scratch=scratch, mesh=mesh)


def check_engine(config: ml_collections.ConfigDict) -> None:
  """Raises UserError if the engine that the config selects cannot run."""
  _engine(config).check_engine(config)


def _engine(config: ml_collections.ConfigDict):
  return importlib.import_module(ENGINES[config.sampler.kind])
