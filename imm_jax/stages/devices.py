"""Chooses the mesh of a run, and hands accelerators over between training and vLLM's server."""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from imm_jax.errors import PreemptedError, ResourceError
from imm_jax.model import hf, hub, published, sharding
from imm_jax.runs import runlog
from imm_jax.runtime import hardware, signals
from imm_jax.training import preemption

_POLL_S = 0.2


def make_mesh(config: ml_collections.ConfigDict) -> Mesh:
  """Returns the mesh over all devices that the config describes.

  Raises:
    UserError: when it does not fit the devices.
  """
  return sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor,
                            hidden_size=_hidden_size(config.model))


@functools.cache
def _hidden_size(model: str) -> int:
  return (published.find_config(model) or hf.read_config(hub.resolve(model))).hidden_size


def starts_server(config: ml_collections.ConfigDict) -> bool:
  """Returns whether stages start a vLLM server, which takes this machine's accelerators while it samples."""
  return config.sampler.kind == "vllm" and not config.sampler.vllm.urls


def reserve_accelerators(config: ml_collections.ConfigDict) -> None:
  """Keeps this process on the CPU if stages start a vLLM server; call it before the first use of jax.

  A process holds the accelerators' memory from its first use of jax until it ends. So only processes that last for one
  stage use them: the one that `call` starts, and vLLM's server.
  """
  if starts_server(config):
    jax.config.update("jax_platforms", "cpu")


def call(config: ml_collections.ConfigDict, function: Callable[..., Any], *args: Any) -> Any:
  """Calls `function(*args)` with the machine's accelerators: in this process, or in one that ends with the call.

  Args:
    config: settings of the run; they decide which of the two (see `reserve_accelerators`).
    function: a module's function; it, its arguments and its result must be picklable, to reach another process.
    *args: its arguments.

  Raises:
    PreemptedError: after SIGTERM, which is passed on to the process.
    ResourceError: when the process was killed.
  """
  if not starts_server(config):
    return function(*args)
  context = multiprocessing.get_context("spawn")  # a forked process would share this one's jax
  with preemption.watch() as stop_requested, futures.ProcessPoolExecutor(
      1, context, _initialize, (runlog.get_log_file(),)) as pool:
    with _blocking_interrupts():  # Ctrl-C is handled by this process alone; the other inherits the blocked signal
      started = pool.submit(os.getpid)
    process, passed_on = None, False
    try:
      process = started.result()
      running = pool.submit(function, *args)
      while not futures.wait([running], timeout=_POLL_S).done:
        if stop_requested.is_set() and not passed_on:
          os.kill(process, signal.SIGTERM)
          passed_on = True
      return running.result()
    except KeyboardInterrupt:
      if process:  # a process that is still starting ends by itself
        os.kill(process, signal.SIGKILL)
      raise
    except futures.process.BrokenProcessPool as e:
      if passed_on:
        raise PreemptedError(f"terminated by SIGTERM; {signals.resume_hint()}") from e
      raise ResourceError("the process that had the accelerators was killed, possibly out of memory; repeat the "
                          "command to resume") from e


@contextlib.contextmanager
def _blocking_interrupts() -> Iterator[None]:
  """Delays Ctrl-C for the length of a block; a process that is started in the block never gets it."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _initialize(log: Path | None) -> None:
  """Makes a child process append to its parent's log, and end when the parent does, which may have been killed."""

  def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

  runlog.follow(log)
  threading.Thread(target=end_with_parent, daemon=True).start()


def describe_devices(config: ml_collections.ConfigDict) -> tuple[str, list[str]]:
  """Returns the platform (`cpu`, `gpu`, `tpu`) and jax's name of each device's kind, after a check of the mesh.

  Raises:
    UserError: when the config's mesh does not fit the devices.
    ResourceError: when there is no platform that JAX_PLATFORMS names.
  """
  with hardware.explain_missing_platform():
    make_mesh(config)
  return jax.default_backend(), [d.device_kind for d in jax.devices()]
