"""Keeps a local server asleep between the samplers of a process, so that only the first one waits for its start.

A server that sleeps (vLLM's level 2) has no weights and no cache, so that training can use the memory of its GPUs. The
supervisor ends it with this process, whatever happens.
"""

import sys
from collections.abc import Hashable
from pathlib import Path

from imm_jax.errors import UserError
from imm_jax.sampling.vllm.client import ServerError
from imm_jax.sampling.vllm.server import SpawnedServer

_TIMEOUT_S = 120.0
# How it was started -> the server that sleeps, and the checkpoint that it last had.
_asleep: dict[Hashable, tuple[SpawnedServer, Path]] = {}


def put_to_sleep(launch_key: Hashable, server: SpawnedServer, folder: Path) -> bool:
  """Puts a server to sleep for the next `wake` with the same `launch_key`; returns whether it sleeps."""
  try:
    server.sleep(timeout=_TIMEOUT_S)
  except (ServerError, UserError) as e:
    print(f"warning: the vLLM server is ended, since it cannot be put to sleep ({e})", file=sys.stderr)
    return False
  try:
    end_all()
  finally:
    _asleep[launch_key] = server, folder
  return True


def wake(launch_key: Hashable, folder: Path, version: str, *, timeout: float) -> tuple[SpawnedServer, Path] | None:
  """Wakes the sleeping server with this launch key, with the weights in `folder`; ends one that was started otherwise.

  Args:
    launch_key: as given to `put_to_sleep`.
    folder: checkpoint of the same shape as the one before.
    version: name of its weights.
    timeout: seconds that each step may take.

  Returns:
    The server and the checkpoint that it had before, or None where a new server must be started.
  """
  end_all(but=launch_key)
  server, before = _asleep.pop(launch_key, (None, None))
  if server:
    try:
      server.wake(str(folder.resolve()), version, timeout=timeout)
    except (ServerError, UserError) as e:
      print(f"warning: the vLLM server that slept is started again ({e})", file=sys.stderr)
      server.close()
      return None
  return (server, before) if server else None


def end_all(*, but: Hashable = None) -> None:
  """Ends every server that sleeps, but for the one that was started like this; then raises the first error, if any."""
  failed: list[BaseException] = []
  for launch_key in [launch_key for launch_key in _asleep if launch_key != but]:
    try:
      _asleep.pop(launch_key)[0].close()
    except BaseException as e:  # the others hold memory, too
      failed.append(e)
  if failed:
    raise failed[0]
