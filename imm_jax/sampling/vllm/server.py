"""Starts a local vLLM server in its own environment, on the loopback interface, and ends it with all its processes."""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from imm_jax.errors import ResourceError, UserError
from imm_jax.runtime import progress
from imm_jax.sampling.vllm import supervisor
from imm_jax.sampling.vllm.client import Server, ServerError

_POLL_S = 0.5
_LOCK_TIMEOUT_S = 90.0
# The supervisor takes up to 30 s to end a server.
_END_TIMEOUT_S = 60.0
# Starts of a server on one port after the other, if other programs take them.
_STARTS = 3
_LOG_LINES, _LOG_BYTES = 15, 1_000_000
# Matches the last line of a traceback, which may have a process's prefix.
_ERROR_LINE, _MAX_ERRORS = re.compile(r"\b[A-Z]\w*(?:Error|Exception): .*"), 5
# Variables for JAX or for this Python, and those of distributed runs (which torch would join).
_JAX = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "MEGASCALE_", "TF_", "PYTHON", "VIRTUAL_ENV")
_OTHER_RUNS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1",
             "PYTHONSAFEPATH": "1"}  # keeps `-m` from importing from the current directory


def find_python(python: str) -> str:
  """Returns the absolute path of an interpreter; raises UserError if there is none."""
  path = shutil.which(os.path.expanduser(python))
  if not path:
    raise UserError(f"config.sampler.vllm.python={python}: no such program; expected the python of an environment "
                    "with vLLM")
  return os.path.abspath(path)


def check_has_vllm(python: str) -> None:
  """Raises UserError if an interpreter does not exist or has no vLLM; does not import vLLM."""
  script = "import importlib.util as u; print('vllm', bool(getattr(u.find_spec('vllm'), 'origin', None)))"
  path = find_python(python)
  try:
    result = subprocess.run([path, "-c", script], capture_output=True, text=True, errors="replace", check=False,
                            timeout=60, env=environment(path, os.environ))
  except (OSError, subprocess.TimeoutExpired) as e:
    raise UserError(f"config.sampler.vllm.python={python}: cannot be run ({e})") from e
  if result.stdout.strip() != "vllm True":
    raise UserError(f"config.sampler.vllm.python={python}: no Python that has vLLM; `{python} -m pip install vllm`")


def environment(python: str, given: Mapping[str, str]) -> dict[str, str]:
  """Returns the environment of a child with another Python: `given` without variables meant for this process.

  >>> env = environment("/venv/bin/python", {"PATH": "/bin", "XLA_FLAGS": "--x", "HOME": "/home/me"})
  >>> env["PATH"], env["HOME"], "XLA_FLAGS" in env
  ('/venv/bin:/bin', '/home/me', False)
  """
  env = {k: v for k, v in given.items() if not k.startswith(_JAX) and k not in _OTHER_RUNS}
  # JAX's CUDA libraries are not those that torch was built for.
  libraries = [p for p in env.pop("LD_LIBRARY_PATH", "").split(":") if p and not p.startswith(sys.prefix + os.sep)]
  # vLLM compiles kernels with programs in the interpreter's folder.
  path = os.pathsep.join([os.path.dirname(python), env.get("PATH", os.defpath)])
  return {**env, "PATH": path, **({"LD_LIBRARY_PATH": ":".join(libraries)} if libraries else {}), **_SETTINGS}


class PortTakenError(UserError):
  """Reports that another program has taken a server's port before the server did."""


class SpawnedServer(Server):
  """Runs a server for a checkpoint in a child process."""

  def __init__(self, python: str, folder: Path, *, dtype: str, args: Sequence[str] = (), log: Path | None,
               connections: int = 1, timeout: float = 600.0, sleeps: bool = False):
    """Starts the server; `wait` returns once it is ready.

    Args:
      python: interpreter of an environment with vLLM.
      folder: HF checkpoint folder.
      dtype: dtype of weights and activations.
      args: more arguments of vLLM's server; they override ours except host and port.
      log: file for all output of the server; None for a temporary one, which goes with the server unless an error has
        named it.
      connections: see `Server`.
      timeout: see `Server`.
      sleeps: whether it can be put to sleep.

    Raises:
      UserError: when there is no such interpreter.
    """
    python = find_python(python)
    port = find_port()
    super().__init__(f"http://127.0.0.1:{port}", connections=connections, timeout=timeout)
    self._remove_log = None
    if log is None:
      log = Path(tempfile.mkdtemp(prefix="imm_jax-vllm-")) / "vllm.log"
      self._remove_log = weakref.finalize(self, shutil.rmtree, log.parent, ignore_errors=True)  # at exit at the latest
    self._log, self._folder = log, folder
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder.resolve()), "--dtype", dtype,
               "--generation-config", "vllm", "--served-model-name", "imm_jax",
               *["--enable-sleep-mode"] * sleeps, *args,
               "--host", "127.0.0.1", "--port", str(port)]
    with log.open("ab") as out:
      _lock_log(out)
      out.write(f"\n{time.strftime('%F %T')} {' '.join(command)}\n".encode())
      out.flush()
      self._begin = out.tell()
      # A new session, so that Ctrl-C at a terminal reaches only this process, which then ends the server.
      self._process = subprocess.Popen(
          [sys.executable, "-I", supervisor.__file__, str(os.getpid()), *command], stdin=subprocess.DEVNULL, stdout=out,
          stderr=subprocess.STDOUT, start_new_session=True,
          env=environment(python, os.environ) | ({"VLLM_SERVER_DEV_MODE": "1"} if sleeps else {}))

  def alive(self) -> bool:
    """Returns whether its process is running."""
    return self._process.poll() is None

  def log_tail(self) -> str:
    """Returns the errors and the last lines of its log, and the path of the log, which is kept from now on."""
    if self._remove_log:
      self._remove_log.detach()
    lines = self._lines()
    # The root cause comes first, far from the end: then one process after the other reports that it failed.
    matches = [_ERROR_LINE.search(line) for line in lines if "WARNING" not in line]
    errors = list(dict.fromkeys(match[0] for match in matches if match))[:_MAX_ERRORS]
    parts = [f"its errors in {self._log}:", *errors] if errors else []
    return "\n" + "\n  ".join([*parts, f"the last lines of {self._log}:", *lines[-_LOG_LINES:]])

  def wait(self, timeout: float) -> None:
    """Blocks until the server is ready.

    Raises:
      PortTakenError: when another program has its port.
      UserError: when it ends first, or takes longer than `timeout` seconds.
    """
    begin = time.monotonic()
    with progress.make_bar(None, "vLLM starts", "s", bar_format="{desc}: {n:.0f} s {postfix}") as bar:
      while True:
        try:
          self.check_health()
          served = self.model().get("root")
        except UserError as e:
          raise PortTakenError(f"another program answers at this port ({e})") from e
        except ServerError:
          if not self.alive():
            if any("address already in use" in line.lower() for line in self._lines()):
              raise PortTakenError(f"{self}: another program has taken the port") from None
            raise UserError(f"the vLLM server has ended while it started (exit code {self._process.returncode})"
                            f"{self.log_tail()}") from None
        else:
          if served != str(self._folder.resolve()):
            raise PortTakenError(f"{self}: another server ({served!r:.99}) has taken the port")
          return
        waited = time.monotonic() - begin
        if waited > timeout:
          raise UserError(f"the vLLM server is not ready after {timeout:g} s (config.sampler.vllm.start_timeout)"
                          f"{self.log_tail()}")
        bar.set_postfix_str("".join(self._lines()[-1:])[:100], refresh=False)
        bar.update(waited - bar.n)
        time.sleep(_POLL_S)

  def close(self) -> None:
    """Ends the server with all its processes; warns of processes that cannot be ended."""
    super().close()
    if self.alive():
      self._process.send_signal(signal.SIGTERM)
    try:
      self._process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
      left = [*supervisor.descendants(self._process.pid), self._process.pid]
      print(f"warning: processes of the vLLM server have not ended in {_END_TIMEOUT_S:g} s and are killed; they may "
            f"hold memory of a GPU as long as they are there: {', '.join(map(str, left))}", file=sys.stderr)
      for process in left:
        with contextlib.suppress(ProcessLookupError):
          os.kill(process, signal.SIGKILL)
      with contextlib.suppress(subprocess.TimeoutExpired):
        self._process.wait(1.0)
    if self._remove_log:
      self._remove_log()

  def _lines(self) -> list[str]:
    with self._log.open("rb") as f:
      size = f.seek(0, os.SEEK_END)
      f.seek(max(self._begin, size - _LOG_BYTES))
      return [line for line in f.read().decode(errors="replace").splitlines() if line.strip()]


def start(python: str, folder: Path, *, start_timeout: float, **options: Any) -> SpawnedServer:
  """Starts a server and blocks until it is ready; if another program takes its port first, starts it on another.

  Args:
    python: see `SpawnedServer`.
    folder: see `SpawnedServer`.
    start_timeout: seconds that a start may take.
    **options: see `SpawnedServer`.

  Raises:
    ResourceError: when other programs have taken every port that was tried.
    UserError: as `SpawnedServer.wait`; no process is left then.
  """
  for left in reversed(range(_STARTS)):
    server = SpawnedServer(python, folder, **options)
    try:
      server.wait(start_timeout)
      return server
    except BaseException as e:
      server.close()
      if not isinstance(e, PortTakenError):
        raise
      if not left:
        raise ResourceError(f"{e}, and before that {_STARTS - 1} others; give the same command again") from e
      print(f"warning: {e}; the vLLM server is started on another", file=sys.stderr)
  raise AssertionError("not reached")


def find_port() -> int:
  """Returns a port that is free now; vLLM takes it up to half a minute later."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def _lock_log(log: IO[bytes]) -> None:
  """Waits for an earlier server with this log, which may still hold a GPU after its run was killed."""
  end = time.monotonic() + _LOCK_TIMEOUT_S
  while True:
    try:
      fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the server's processes inherit it
      return
    except BlockingIOError:
      if time.monotonic() > end:
        raise UserError(f"{log.name}: the server of an earlier start still runs; end it") from None
      time.sleep(_POLL_S)
