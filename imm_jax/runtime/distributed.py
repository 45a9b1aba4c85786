"""Lets several processes work on one run: they join, exchange values, wait for each other, and fail together.

All processes run the same program. Process 0 decides which stages run, and writes; the run directory is on a file
system that all of them share. Training uses the devices of all processes; in sampling each process answers its share of
the questions on its own devices.
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

from imm_jax.errors import Exit, LostError, UserError, exit_code, first_line

# Environment variables from which several processes follow: Slurm, GKE with TPUs, multi-slice, jax's own.
_SEVERAL = {"SLURM_NTASKS": lambda v: int(v) > 1, "TPU_WORKER_HOSTNAMES": lambda v: "," in v,
            "MEGASCALE_NUM_SLICES": lambda v: int(v) > 1, "JAX_NUM_PROCESSES": lambda v: int(v) > 1,
            "JAX_COORDINATOR_ADDRESS": bool}
# Time after which a process that ended is noticed.
_HEARTBEAT_S = 60
_POLL_S = 1.0
# Errors of a collective that mean that another process ended.
_LOST = re.compile(r"(?i)gloo|connection (closed|reset|refused)|heartbeat|unavailable|peer")
# Errors of the start that mean that other processes did not join in time.
_LATE = re.compile(r"DEADLINE_EXCEEDED|UNAVAILABLE")


def start(mode: str = "auto", *, coordinator: str | None = None, num_processes: int | None = None,
          process_id: int | None = None) -> None:
  """Joins the other processes of this run; call it before any other use of jax.

  Args:
    mode: `on`, `off`, or `auto`, which joins if the arguments or the environment speak of several processes.
    coordinator: host:port of process 0. The default of this and the next two arguments is JAX_COORDINATOR_ADDRESS,
      JAX_NUM_PROCESSES and JAX_PROCESS_ID, else what jax learns from Slurm, MPI, Kubernetes or Cloud TPU.
    num_processes: number of processes of the run.
    process_id: number of this process, from 0.

  Raises:
    UserError: when an argument or variable is wrong.
    LostError: when the other processes do not join.
  """
  number = lambda name: int(os.environ[name]) if os.environ.get(name) else None
  try:
    several = any(test(os.environ[name]) for name, test in _SEVERAL.items() if os.environ.get(name))
    num_processes = number("JAX_NUM_PROCESSES") if num_processes is None else num_processes
    process_id = number("JAX_PROCESS_ID") if process_id is None else process_id
  except ValueError as e:
    raise UserError(f"one of {', '.join(_SEVERAL)}, JAX_PROCESS_ID is no number ({e})") from e
  given = coordinator is not None or (num_processes or 1) > 1 or (process_id or 0) > 0
  if mode == "off" or (mode == "auto" and not given and not several):
    return
  if coordinator is not None and not re.fullmatch(r".+:\d{1,5}", coordinator):
    raise UserError(f"--coordinator={coordinator}: expected HOST:PORT of process 0")
  print(f"waiting for the other processes of this run{f' at {coordinator}' if coordinator else ''}", file=sys.stderr,
        flush=True)
  # jax's handler would swallow SIGTERM for the whole run; `training.preemption` handles it during training.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT_S)
  except (ValueError, RuntimeError, TypeError, IndexError) as e:
    cause = first_line(e)
    kind = LostError if _LATE.search(cause) else UserError
    raise kind(f"the processes of this run do not find each other ({cause}); give --coordinator=HOST:PORT, "
               "--num_processes and --process_id to each, or --distributed=off for a single process") from e


def is_main() -> bool:
  """Returns whether this is process 0, which writes and prints."""
  return jax.process_index() == 0


def count_processes() -> int:
  """Returns the number of processes."""
  return jax.process_count()


def barrier(name: str) -> None:
  """Waits until all processes have called this with the same name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def broadcast(value: Any) -> Any:
  """Returns process 0's `value`, of JSON types, on all processes."""
  if jax.process_count() == 1:
    return value
  data = np.frombuffer(json.dumps(value).encode(), np.uint8) if is_main() else np.zeros(0, np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
  data = data if is_main() else np.zeros(size, np.uint8)
  return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(data), np.uint8).tobytes())


def take_share(items: Sequence[Any]) -> Sequence[Any]:
  """Returns this process's part of a list: every n-th item, so that the parts are alike in size and kind."""
  return items[jax.process_index()::jax.process_count()]


def gather(items: Sequence[Any]) -> list[Any]:
  """Returns, on every process, the whole list from each one's results on its `take_share`; items are of JSON types."""
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
  """Checks that all hosts see the folder that process 0 created.

  Raises:
    UserError: when a host does not.
  """
  if jax.process_count() == 1:
    return
  marker = folder / f".shared-{broadcast(time.time_ns())}"
  if is_main():
    marker.touch()
  barrier("shared")
  is_shared = all(gather([marker.exists()]))
  if is_main():
    marker.unlink()
  if not is_shared:
    raise UserError(f"{folder}: not all hosts see the same run directory; give a --workdir on a file system that they "
                    "share (NFS, Filestore, a bucket mounted with gcsfuse)")


class FailTogether:
  """Ends all processes when one fails, with its error and exit code; use as a context manager.

  The first process to fail writes its error to a file beside the run directory. The others look for that file once a
  second, since they may be waiting for the failed process in a collective that never returns.
  """

  def __init__(self, root: Path):
    # Files that a killed process 0 left behind go first: others may fail as soon as they have this start's name.
    if is_main():
      for old in root.parent.glob(f".{root.name}.failed-*"):
        old.unlink(missing_ok=True)
    # Each start has its own name, so that a file of an earlier start does not end this one.
    self._file = root.with_name(f".{root.name}.failed-{broadcast(time.time_ns())}")
    self._done = threading.Event()
    self._ending = threading.Lock()

  def __enter__(self) -> "FailTogether":
    if jax.process_count() > 1:
      threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
    self._done.set()
    if jax.process_count() == 1 or not isinstance(error, Exception):  # none, or a signal that each handles
      return
    message, code = _describe_error(error), Exit.LOST if _is_lost_peer(error) else exit_code(error)
    first = self._read_first()
    if first is None and _is_lost_peer(error):
      time.sleep(2 * _POLL_S)  # a network file system may show the lost process's file late
      first = self._read_first()
    if first is None:
      # If this cannot be written, as on a full disk, the others lose this process and end, too.
      with contextlib.suppress(OSError):
        self._file.parent.mkdir(parents=True, exist_ok=True)
        part = self._file.with_name(f"{self._file.name}.{jax.process_index()}")
        part.write_text(f"{code:d} process {jax.process_index()}: {message}", encoding="utf-8")
        part.rename(self._file)
      self._exit(message, code)
    self._exit_after(first)

  def _read_first(self) -> tuple[int, str] | None:
    """Returns the exit code and the message of the process that failed first; None if there is none."""
    try:
      code, _, message = self._file.read_text(encoding="utf-8").partition(" ")
      return int(code), message
    except (OSError, ValueError):
      return None

  def _watch(self) -> None:
    while not self._done.wait(_POLL_S):
      first = self._read_first()
      if first is not None:
        self._exit_after(first)

  def _exit_after(self, first: tuple[int, str]) -> None:
    code, message = first
    self._exit(f"another process failed first: {message}", code)

  def _exit(self, message: str, code: int) -> None:
    self._ending.acquire()  # never released: of the main and the watching thread only one may print
    print(f"error: {message}", file=sys.stderr, flush=True)
    if is_main():
      time.sleep(4 * _POLL_S)  # the others abort if process 0 ends before they have read the error
      with contextlib.suppress(OSError):
        self._file.unlink(missing_ok=True)
    os._exit(code)  # threads of the collectives may never end


def _is_lost_peer(error: Exception) -> bool:
  """Returns whether a collective failed because another process ended."""
  return isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error)) is not None


def _describe_error(error: Exception) -> str:
  """Returns the message that all processes print; for a defect, the traceback."""
  if isinstance(error, UserError):
    return str(error)
  if _is_lost_peer(error):
    return ("another process of this run ended unexpectedly; repeat the command in all processes "
            f"({first_line(error)[:200]})")
  return "".join(traceback.format_exception(error))
