"""vLLM as an engine: process 0 uses a server that it starts, or remote servers."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from imm_jax.errors import UserError
from imm_jax.model import sharding
from imm_jax.runtime import distributed, hardware
from imm_jax.sampling import Completion, Prompt, Sampler
from imm_jax.sampling.vllm import server
from imm_jax.sampling.vllm.sampler import VllmSampler


class _Elsewhere:
  """Implements `Sampler` in processes other than the first, where it does nothing."""

  def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[list[Completion]]:
    """Samples as `Sampler.generate` says."""
    del prompts, options
    return []


@contextlib.contextmanager
def open_sampler(config: ml_collections.ConfigDict, model: Path, *, batch_size: int, scratch: Path,
                 mesh: Callable[[], Mesh]) -> Iterator[Sampler]:
  """Opens a sampler that uses vLLM; see `engines`. Writes vLLM's log to `scratch`. vLLM chooses its own batch size."""
  del batch_size
  if not distributed.is_main():
    yield _Elsewhere()
    return
  vllm = config.sampler.vllm
  spawns = not vllm.urls
  # A local server takes this machine's GPUs, which JAX is kept from seeing; remote servers have GPUs.
  dtype = hardware.compute_dtype(config.sample.compute_dtype, gpu=not spawns or Path("/dev/nvidiactl").exists())
  with VllmSampler(
      model, python=(vllm.python or sys.executable) if spawns else "", urls=vllm.urls, args=vllm.args,
      restart=vllm.restart, compute_dtype=dtype, concurrency=vllm.concurrency,
      timeout=vllm.timeout, start_timeout=vllm.start_timeout, tolerance=vllm.tolerance, sleep=vllm.sleep,
      # The scratch folder is removed with its stage, and a server that sleeps outlives that.
      log=None if vllm.sleep else scratch / "vllm.log",
      mesh=None if spawns else sharding.local_mesh(mesh()), start=False) as sampler:
    yield sampler


def check_engine(config: ml_collections.ConfigDict) -> None:
  """Raises UserError if a local server is needed but cannot be started."""
  if config.sampler.vllm.urls:
    return
  if config.sampler.vllm.python:
    server.check_has_vllm(config.sampler.vllm.python)
  elif not getattr(importlib.util.find_spec("vllm"), "origin", None):  # None for a mere folder named vllm
    raise UserError("config.sampler.kind=vllm, and this Python has no vLLM: give --config.sampler.vllm.python=PROGRAM, "
                    "the python of an environment that has it, or --config.sampler.vllm.urls, servers that run "
                    "elsewhere, or sample without vLLM: --config.sampler.kind=native")
  if jax.process_count() > 1:
    raise UserError(f"config.sampler.kind=vllm in a run of {jax.process_count()} processes needs servers on other "
                    "hosts (--config.sampler.vllm.urls): these have the accelerators")
