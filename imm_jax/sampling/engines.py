"""The engines that `config.sampler.kind` names; adding one is a module, and a line here.

An engine's module has two functions:

    opened(config, model, *, batch_size, scratch, mesh) -> a context manager of a `Sampler`
    check(config) -> None; a UserError says why the engine cannot run as the config has it

`model` is a checkpoint folder; `scratch` a folder for logs; `mesh` gives this process's devices, which must not be
asked for before the engine needs them, for another process may hold them.
"""

import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path

import ml_collections
from jax.sharding import Mesh

from imm_jax.sampling import Sampler

# By kind: the module, imported when it is asked for.
ENGINES = {"native": "imm_jax.sampling.native.engine", "vllm": "imm_jax.sampling.vllm.engine"}


def opened(config: ml_collections.ConfigDict, model: Path, *, batch_size: int, scratch: Path,
           mesh: Callable[[], Mesh]) -> contextlib.AbstractContextManager[Sampler]:
  """A sampler of a model, as the config has it."""
  return _engine(config).opened(config, model, batch_size=batch_size, scratch=scratch, mesh=mesh)


def check(config: ml_collections.ConfigDict) -> None:
  """Raises UserError when the engine that the config asks for cannot run."""
  _engine(config).check(config)


def _engine(config: ml_collections.ConfigDict):
  return importlib.import_module(ENGINES[config.sampler.kind])
