"""The devices of a run, and who has them."""

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


def mesh_of(config: ml_collections.ConfigDict) -> Mesh:
  """The devices of a run."""
  return sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor,
                            hidden_size=_hidden_size(config.model))


@functools.cache
def _hidden_size(model: str) -> int:
  return (published.find_config(model) or hf.read_config(hub.resolve(model))).hidden_size


def starts_server(config: ml_collections.ConfigDict) -> bool:
  """Whether stages start a vLLM server of their own, which takes this machine's accelerators while it samples."""
  return config.sampler.kind == "vllm" and not config.sampler.vllm.urls


def reserve_accelerators(config: ml_collections.ConfigDict) -> None:
  """Keeps this process on the CPU, before its first use of jax, where accelerators go from hand to hand.

  A process has their memory from its first use of jax until it ends. So none that lasts touches them: `call` trains in
  a process of its own, and vLLM's server is one.
  """
  if starts_server(config):
    jax.config.update("jax_platforms", "cpu")


def call(config: ml_collections.ConfigDict, function: Callable[..., Any], *args: Any) -> Any:
  """`function(*args)` with the accelerators of this machine: here, or in a process that gives them back by its end.

  Args:
    config: of the run.
    function: of a module; it, its arguments and its result go to and from the process.
    *args: of it.

  Raises:
    PreemptedError: after SIGTERM, which is passed on.
    UserError: when the process was killed.
  """
  if not starts_server(config):
    return function(*args)
  context = multiprocessing.get_context("spawn")  # a fork would share this process's jax
  with preemption.watch() as stop_requested, futures.ProcessPoolExecutor(
      1, context, _begin, (runlog.current_file(),)) as pool:
    with _blocking_interrupts():  # Ctrl-C is this process's to handle; the other one inherits that
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
      if process:  # one that only starts soon ends by itself
        os.kill(process, signal.SIGKILL)
      raise
    except futures.process.BrokenProcessPool as e:
      if passed_on:
        raise PreemptedError(f"told to stop (SIGTERM); {signals.RESUME_HINT}") from e
      raise ResourceError("the process that had the accelerators was killed, for want of memory perhaps; the same "
                          "command goes on after what was finished") from e


@contextlib.contextmanager
def _blocking_interrupts() -> Iterator[None]:
  """For the length of a block Ctrl-C waits; a process that is started in it never gets one."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(log: Path | None) -> None:
  """Has this process write to its parent's log, and end when that is gone, which may have been killed."""

  def watch() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

  runlog.follow(log)
  threading.Thread(target=watch, daemon=True).start()


def describe_devices(config: ml_collections.ConfigDict) -> tuple[str, list[str]]:
  """(platform, kind of each device); raises UserError where the config's mesh does not fit them."""
  with hardware.explain_missing_platform():
    mesh_of(config)
  return jax.default_backend(), [d.device_kind for d in jax.devices()]
