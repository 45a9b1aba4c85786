"""Work in a child process, which releases the accelerators when it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_collections
import pytest

from configs import tiny
from imm_jax.errors import UserError
from imm_jax.model import hf
from imm_jax.stages import devices
from tests import REPO

_SLEEP = """
import time
from configs import tiny
from imm_jax import cli
from imm_jax.stages import devices
config = tiny.get_config()
config.sampler.kind = "vllm"
devices.reserve_accelerators(config)
if __name__ == "__main__":
  cli.run(lambda: devices.call(config, time.sleep, 600))
"""


def _config(kind: str, *urls: str) -> ml_collections.ConfigDict:
  config = tiny.get_config()
  config.sampler.kind, config.sampler.vllm.urls = kind, urls
  return config


def test_child_works_with_a_local_server() -> None:
  """A child process works on devices only with a local server."""
  for config in (_config("native"), _config("vllm", "http://127.0.0.1:1")):
    assert devices.call(config, os.getpid) == os.getpid()
  assert devices.call(_config("vllm"), os.getppid) == os.getpid()


def test_errors_and_kills_of_the_child_are_reported(tmp_path: Path) -> None:
  with pytest.raises(UserError, match="no such checkpoint folder"):
    devices.call(_config("vllm"), hf.read_config, tmp_path / "none")
  with pytest.raises(UserError, match="had the accelerators was killed"):
    devices.call(_config("vllm"), os._exit, 9)


def _children(process: int) -> list[int]:
  return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_the_child_does_not_outlive_its_parent(number: int, tmp_path: Path) -> None:
  script = tmp_path / "script.py"
  script.write_text(_SLEEP)
  with subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True, env=os.environ | {
      "PYTHONPATH": str(REPO)}) as parent:
    end = time.monotonic() + 120
    worker = []  # it comes after multiprocessing's tracker of resources, and sleeps in one more thread
    while not worker and time.monotonic() < end:
      time.sleep(0.1)
      worker = [p for p in _children(parent.pid) if "spawn_main" in Path(f"/proc/{p}/cmdline").read_text()]
    time.sleep(1)
    parent.send_signal(number)
    message = parent.stderr.read()
  while time.monotonic() < end and Path(f"/proc/{worker[0]}").exists():
    time.sleep(0.1)
  assert not Path(f"/proc/{worker[0]}").exists()
  assert parent.returncode == {signal.SIGTERM: 143, signal.SIGKILL: -9, signal.SIGINT: 130}[number]
  assert ("terminated by SIGTERM" in message) == (number == signal.SIGTERM)
  assert "Traceback" not in message
