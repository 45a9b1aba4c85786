"""Several processes as one run: how they find each other, wait for each other, and fail together.

All of them run the same program. Process 0 decides what is run, and writes; the run directory lies on a file system
that all of them share. Training spreads over the devices of all; sampling takes each process's own, with its share of
the questions.
"""

import contextlib
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from imm_jax.errors import Exit, LostError, UserError, exit_code

# Where the environment says that there are several processes: Slurm, GKE with TPUs, multi-slice, jax's own variables.
_SEVERAL = {"SLURM_NTASKS": lambda v: int(v) > 1, "TPU_WORKER_HOSTNAMES": lambda v: "," in v,
            "MEGASCALE_NUM_SLICES": lambda v: int(v) > 1, "JAX_NUM_PROCESSES": lambda v: int(v) > 1,
            "JAX_COORDINATOR_ADDRESS": bool}
# A process that is gone is noticed after so long.
_HEARTBEAT_S = 60
_POLL_S = 1.0
# How a collective says that its other end is gone.
_LOST = re.compile(r"(?i)gloo|connection (closed|reset|refused)|heartbeat|unavailable|peer")
# And how one that waits for the others to join says that they have not come.
_LATE = re.compile(r"DEADLINE_EXCEEDED|UNAVAILABLE")


def start(mode: str = "auto", *, coordinator: str | None = None, num_processes: int | None = None,
          process_id: int | None = None) -> None:
  """Joins the other processes of this run, before any other use of jax.

  Args:
    mode: `on`, `off`, or `auto`, which joins where flags or the environment speak of several processes.
    coordinator: host:port of process 0; it, and the other two, default to what JAX_COORDINATOR_ADDRESS,
      JAX_NUM_PROCESSES and JAX_PROCESS_ID say, else to what jax finds out from Slurm, MPI, Kubernetes or Cloud TPU.
    num_processes: of the run.
    process_id: of this process, from 0.

  Raises:
    UserError: when the others cannot be found, with the cause.
  """
  number = lambda name: int(os.environ[name]) if os.environ.get(name) else None
  try:
    several = any(test(os.environ[name]) for name, test in _SEVERAL.items() if os.environ.get(name))
    num_processes = number("JAX_NUM_PROCESSES") if num_processes is None else num_processes
    process_id = number("JAX_PROCESS_ID") if process_id is None else process_id
  except ValueError as e:
    raise UserError(f"one of {', '.join(_SEVERAL)}, JAX_PROCESS_ID is no number ({e})") from e
  asked = coordinator is not None or (num_processes or 1) > 1 or (process_id or 0) > 0
  if mode == "off" or (mode == "auto" and not asked and not several):
    return
  if coordinator is not None and not re.fullmatch(r".+:\d{1,5}", coordinator):
    raise UserError(f"--coordinator={coordinator}: expected HOST:PORT of process 0")
  print(f"waiting for the other processes of this run{f' at {coordinator}' if coordinator else ''}", file=sys.stderr,
        flush=True)
  # Its handler would swallow SIGTERM as long as the run lasts; ours watches while it trains (`training.preemption`).
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT_S)
  except (ValueError, RuntimeError, TypeError, IndexError) as e:
    cause = str(e).strip().partition("\n")[0] or type(e).__name__
    kind = LostError if _LATE.search(cause) else UserError
    raise kind(f"the processes of this run do not find each other ({cause}); give --coordinator=HOST:PORT, "
               "--num_processes and --process_id to each, or --distributed=off for one process alone") from e


def is_main() -> bool:
  """Whether this is process 0, which writes and prints."""
  return jax.process_index() == 0


def count_processes() -> int:
  """How many processes there are."""
  return jax.process_count()


def barrier(name: str) -> None:
  """Returns when all processes are here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def broadcast(value: Any) -> Any:
  """What process 0 has for `value`, anything that json can write, on all of them."""
  if jax.process_count() == 1:
    return value
  data = np.frombuffer(json.dumps(value).encode(), np.uint8) if is_main() else np.zeros(0, np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
  data = data if is_main() else np.zeros(size, np.uint8)
  return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(data), np.uint8).tobytes())


def take_share(items: Sequence[Any]) -> Sequence[Any]:
  """This process's part of a list: every n-th, so that parts are alike."""
  return items[jax.process_index()::jax.process_count()]


def gather(items: Sequence[Any]) -> list[Any]:
  """Returns, on every process, the whole list from the results of each one's `take_share`; items must fit in JSON."""
  if jax.process_count() == 1:
    return list(items)
  data = np.frombuffer(json.dumps(items).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int64(data.size)).tolist()
  rows = multihost_utils.process_allgather(np.pad(data, (0, max(sizes) - data.size)))
  parts = [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
  whole: list[Any] = [None] * sum(map(len, parts))
  for i, part in enumerate(parts):
    whole[i::len(parts)] = part
  return whole


def check_shared(folder: Path) -> None:
  """Checks that all hosts see the folder that process 0 has made.

  Raises:
    UserError: when one does not.
  """
  if jax.process_count() == 1:
    return
  marker = folder / f".shared-{broadcast(time.time_ns())}"
  if is_main():
    marker.touch()
  barrier("shared")
  seen = all(gather([marker.exists()]))
  if is_main():
    marker.unlink()
  if not seen:
    raise UserError(f"{folder}: not all hosts see the same run directory; give a --workdir on a file system that they "
                    "share (NFS, Filestore, a bucket mounted with gcsfuse)")


class FailTogether:
  """Ends all processes when one fails, with that one's error and exit code; use as a context manager.

  The first to fail leaves its error in a file beside the run directory, where the others look once a second: they may
  wait for it in a collective that never ends.
  """

  def __init__(self, root: Path):
    if is_main():  # what a process 0 that was killed could not remove; first, as others may fail right after the name
      for old in root.parent.glob(f".{root.name}.failed-*"):
        old.unlink(missing_ok=True)
    # A name of its own for each start: what an earlier one has left must not end this one.
    self._file = root.with_name(f".{root.name}.failed-{broadcast(time.time_ns())}")
    self._done = threading.Event()
    self._ending = threading.Lock()

  def __enter__(self) -> "FailTogether":
    if jax.process_count() > 1:
      threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
    self._done.set()
    if jax.process_count() == 1 or not isinstance(error, Exception):  # told to stop
      return
    text, code = _describe_error(error), Exit.LOST if _is_lost_peer(error) else exit_code(error)
    first = self._read_first()
    if first is None and _is_lost_peer(error):
      time.sleep(2 * _POLL_S)  # on a network's file system what the lost one has left is seen late
      first = self._read_first()
    if first is None:
      # A full disk, say, is no reason to keep this process: the others lose it and end too.
      with contextlib.suppress(OSError):
        self._file.parent.mkdir(parents=True, exist_ok=True)
        part = self._file.with_name(f"{self._file.name}.{jax.process_index()}")
        part.write_text(f"{code:d} process {jax.process_index()}: {text}", encoding="utf-8")
        part.rename(self._file)
      self._exit(text, code)
    self._exit_after(first)

  def _read_first(self) -> tuple[int, str] | None:
    """The exit code of the process that failed first, and what it said."""
    try:
      code, _, said = self._file.read_text(encoding="utf-8").partition(" ")
      return int(code), said
    except (OSError, ValueError):
      return None

  def _watch(self) -> None:
    while not self._done.wait(_POLL_S):
      first = self._read_first()
      if first is not None:
        self._exit_after(first)

  def _exit_after(self, first: tuple[int, str]) -> None:
    code, said = first
    self._exit(f"another process failed first: {said}", code)

  def _exit(self, error: str, code: int) -> None:
    self._ending.acquire()  # for good: this and the watching thread may both get here, and one is to speak
    print(f"error: {error}", file=sys.stderr, flush=True)
    if is_main():
      time.sleep(4 * _POLL_S)  # the others abort where process 0 is gone before they have seen the error
      with contextlib.suppress(OSError):
        self._file.unlink(missing_ok=True)
    os._exit(code)  # threads of the collectives may never end


def _is_lost_peer(error: Exception) -> bool:
  """Whether a collective failed because another process is gone."""
  return isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error)) is not None


def _describe_error(error: Exception) -> str:
  """What the users of all processes are shown."""
  if isinstance(error, UserError):
    return str(error)
  if _is_lost_peer(error):
    return ("another process of this run is gone, killed perhaps; give the same command again "
            f"({str(error).strip().splitlines()[0][:200]})")
  return "".join(traceback.format_exception(error))
