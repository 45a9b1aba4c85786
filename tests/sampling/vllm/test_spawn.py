"""Starting and ending a local server, with a fake program in place of vLLM; and the output of `--check`."""

import functools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imm_jax.errors import ResourceError, UserError
from imm_jax.sampling.vllm import VllmSampler, check as vllm_check, client, server as vllm_server, supervisor
from imm_jax.sampling.vllm.client import Server
from imm_jax.sampling.vllm.server import SpawnedServer
from tests import TINY, fake_vllm
from tests.sampling.vllm.helpers import ends

if not Path("/proc/self/stat").exists():
  pytest.skip("needs Linux", allow_module_level=True)


@pytest.fixture
def spawn(python: str, tmp_path: Path) -> Callable[..., SpawnedServer]:
  return lambda mode="": SpawnedServer(python, TINY, dtype="float32", log=tmp_path / "logs" / "vllm.log",
                                       args=("--fake", mode) if mode else ())


def _wait_for_log(log: Path, pattern: str) -> str:
  """Waits for a match in the log and returns its group."""
  end = time.monotonic() + 20
  while time.monotonic() < end:
    if log.exists() and (result := re.search(pattern, log.read_text())):
      return result[1]
    time.sleep(0.05)
  raise AssertionError(f"{pattern} is not in {log}")


def test_a_server_ends_with_all_its_processes(
    spawn: Callable[..., SpawnedServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
  server = spawn("orphan")
  server.wait(30)
  assert server.model()["root"] == str(TINY.resolve())
  prompt = [1, 2, 3]
  (generated,) = server.complete(prompt, n=1, max_tokens=4, seed=0, temperature=1.0)
  assert generated.tokens == fake_vllm.tokens_of(prompt, 0, 1.0, 4)
  log = tmp_path / "logs" / "vllm.log"
  orphan = int(_wait_for_log(log, r"orphan (\d+)"))
  processes = [orphan, server._process.pid, *supervisor.descendants(server._process.pid)]
  assert len(set(processes)) == 3
  server.close()
  assert all(map(ends, processes))
  message = log.read_text()
  assert "'HF_HUB_OFFLINE': '1'" in message
  assert "XLA_FLAGS" not in message
  assert "PYTHONPATH" not in message


def test_failed_start_is_reported(spawn: Callable[..., SpawnedServer]) -> None:
  """The report has the server's errors."""
  server = spawn("dies")
  with pytest.raises(UserError, match=r"has ended while it started \(exit code 1\)") as error:
    server.wait(30)
  server.close()
  lines = str(error.value).splitlines()
  assert lines[2] == "  ValueError: no GPU here"  # long before the last lines
  assert lines[-1] == "  the worker failed"


def test_never_ready_server_is_ended(python: str, tmp_path: Path) -> None:
  """It is reported."""
  log = tmp_path / "vllm.log"
  message = r"is not ready after 2 s \(config.sampler.vllm.start_timeout\)\n(.*\n)*  the fake server"
  with pytest.raises(UserError, match=message):
    VllmSampler(TINY, python=python, args=("--fake", "never-healthy"), log=log, start_timeout=2)
  port = _wait_for_log(log, r"--port (\d+)")
  running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
  assert f"--port {port}" not in running


@pytest.mark.parametrize("killed", ["parent", "supervisor"])
def test_a_server_ends_when_its_watcher_is_killed(python: str, tmp_path: Path, killed: str) -> None:
  log = tmp_path / "vllm.log"
  program = (f"import pathlib, time\nfrom imm_jax.sampling.vllm.server import SpawnedServer\n"
             f"s = SpawnedServer({python!r}, pathlib.Path({str(TINY)!r}), dtype='float32', "
             f"log=pathlib.Path({str(log)!r}))\nprint(s._process.pid, flush=True)\ntime.sleep(600)")
  with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
    watcher = int(parent.stdout.readline())
    _wait_for_log(log, r"(the fake server)")
    processes = supervisor.descendants(watcher)
    assert processes
    os.kill(parent.pid if killed == "parent" else watcher, signal.SIGKILL)
    try:
      assert all(map(ends, processes))
    finally:
      parent.kill()


@pytest.mark.full
def test_taken_port_is_changed(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
  """A server whose port is taken is started on another."""
  start = functools.partial(vllm_server.start, python, TINY, start_timeout=30, dtype="float32", log=tmp_path / "log")
  free = vllm_server.find_port()
  with fake_vllm.FakeVllm("/another/model") as other, socket.socket() as silent:
    silent.bind(("127.0.0.1", 0))  # does not answer, but the server cannot listen there
    silent.listen()
    monkeypatch.setattr(client, "_CONNECT_TIMEOUT_S", 0.5)
    monkeypatch.setattr(client, "_QUICK_TIMEOUT_S", 0.5)
    ports = [other.http.server_port, silent.getsockname()[1], free]
    monkeypatch.setattr(vllm_server, "find_port", iter(ports).__next__)
    server = start()
    said = capfd.readouterr().err
    server.close()
    assert server.url == f"http://127.0.0.1:{free}"
    assert "another server ('/another/model') has taken the port; the vLLM server is started on another" in said
    assert f"http://127.0.0.1:{ports[1]}: another program has taken the port; the vLLM" in said
    monkeypatch.setattr(vllm_server, "find_port", lambda: other.http.server_port)
    with pytest.raises(ResourceError, match="has taken the port, and before that 2 others; give the same command"):
      start()


def test_temporary_log_is_removed(python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """It goes with its server, unless an error names it."""
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
  (tmp_path / "tmp").mkdir()
  sampler = VllmSampler(TINY, python=python, log=None, start=False)
  sampler.close()
  assert not [*(tmp_path / "tmp").iterdir()]  # nothing was started
  with VllmSampler(TINY, python=python, log=None):
    assert len([*(tmp_path / "tmp").glob("*/vllm.log")]) == 1
  assert not [*(tmp_path / "tmp").iterdir()]
  with pytest.raises(UserError) as error:
    VllmSampler(TINY, python=python, args=("--fake", "dies"), log=None)
  log, = (tmp_path / "tmp").glob("*/vllm.log")
  assert str(log) in str(error.value)


def test_hanging_server_is_given_up(
    spawn: Callable[..., SpawnedServer], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
  """Its end is not waited for without a limit."""
  server = spawn()
  server.wait(30)
  processes = [server._process.pid, *supervisor.descendants(server._process.pid)]
  os.kill(server._process.pid, signal.SIGSTOP)  # what should end the others hangs
  monkeypatch.setattr(vllm_server, "_END_TIMEOUT_S", 0.2)
  server.close()
  assert f"{processes[1]}, {processes[0]}" in capfd.readouterr().err
  assert all(map(ends, processes))


def test_a_killed_server_is_not_retried(spawn: Callable[..., SpawnedServer]) -> None:
  server = spawn()
  server.wait(30)
  assert server.alive()
  for process in supervisor.descendants(server._process.pid):
    os.kill(process, signal.SIGKILL)
  assert ends(server._process.pid)
  assert not server.alive()
  assert "the fake server" in server.log_tail()
  server.close()


def test_server_environment_lacks_jax() -> None:
  """A server is given no variables for JAX."""
  given = {"PATH": "/bin", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "x", "PYTHONPATH": "/here", "WORLD_SIZE": "2",
           "LD_LIBRARY_PATH": f"{sys.prefix}/lib/nvidia:/usr/local/cuda/lib64", "CUDA_VISIBLE_DEVICES": "0",
           "VLLM_CPU_KVCACHE_SPACE": "1"}
  built = vllm_server.environment("/venv/bin/python", given)
  assert built["LD_LIBRARY_PATH"] == "/usr/local/cuda/lib64"
  assert built["CUDA_VISIBLE_DEVICES"] == "0"
  assert built["VLLM_CPU_KVCACHE_SPACE"] == "1"
  assert not built.keys() & {"JAX_PLATFORMS", "XLA_FLAGS", "PYTHONPATH", "WORLD_SIZE"}


def test_check_describes_a_server() -> None:
  with fake_vllm.FakeVllm(TINY) as fake:
    message = vllm_check.describe_server(Server(fake.url))
    assert message == f"vLLM 0.0.fake, serves 'served' from {TINY}, context 256; reloads weights"
    fake.dev = False
    assert "cannot reload weights (start it with VLLM_SERVER_DEV_MODE=1" in vllm_check.describe_server(Server(fake.url))


@pytest.mark.full
@pytest.mark.parametrize(("flags", "said"), [
    (["--check", "--python=/no/such/python"], "config.sampler.vllm.python=/no/such/python: no such program"),
    (["--check", f"--python={sys.executable}"], "cannot be imported (ModuleNotFoundError: No module named 'vllm')"),
    (["--check", "--urls=http://127.0.0.1:1"], "no server can be used"),
    (["--check"], "give --check, and --python=PROGRAM or --urls=URL"),
])
def test_check_fails_with_one_line(flags: list[str], said: str) -> None:
  if said.startswith("cannot be imported") and _has_vllm():
    pytest.skip("this Python has vLLM")
  done = subprocess.run([sys.executable, "-m", "imm_jax.sampling.vllm", *flags], capture_output=True, text=True,
                        timeout=120, check=False)
  assert done.returncode == 1
  assert said in done.stderr
  assert "Traceback" not in done.stderr


def _has_vllm() -> bool:
  return subprocess.run([sys.executable, "-c", "import vllm"], capture_output=True, check=False).returncode == 0
