"""Servers that run elsewhere: restarting them with a command of the user, waiting for them, and what they serve."""

import shlex
import subprocess
import tempfile
import time
from pathlib import Path

from imm_jax.errors import UserError
from imm_jax.sampling.vllm.client import Server, ServerError

_POLL_S = 2.0


def restart(command: str, folder: Path, timeout: float) -> None:
  """Runs the user's command that restarts remote servers."""
  with tempfile.TemporaryFile() as output:  # not a pipe, which its background processes would keep open
    try:
      words = [word.replace("{model}", str(folder.resolve())) for word in shlex.split(command)]
      code = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=timeout,
                            check=False).returncode
    except (OSError, ValueError, subprocess.TimeoutExpired) as e:
      raise UserError(f"config.sampler.vllm.restart={command!r}: {e}") from e
    if code:
      output.seek(0)
      raise UserError(f"config.sampler.vllm.restart={command!r}: ended with exit code {code}: "
                      f"{output.read().decode(errors='replace').strip()[-500:]}")


def served_folder(server: Server) -> str:
  """Returns the folder that a server says it has loaded its weights from when it started."""
  return str(server.model().get("root"))


def wait_for(server: Server, timeout: float) -> str:
  """Blocks until a remote server is ready, and returns its folder; raises ServerError after `timeout` seconds."""
  end = time.monotonic() + timeout
  while True:
    try:
      server.check_health()
      return served_folder(server)
    except ServerError:
      if time.monotonic() > end:
        raise
      time.sleep(_POLL_S)
