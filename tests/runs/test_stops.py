"""The command, terminated in stages other than SFT."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imm_jax.runs import status
from tests import REPO
from tests.runs.helpers import command


@pytest.mark.full
def test_stop_in_any_stage(environment: dict[str, str], tmp_path: Path):
  """Terminated by a signal, a run ends soon, and goes on later."""
  root, term, kill = tmp_path / "run", signal.SIGTERM, signal.SIGKILL
  small = command(root, "--config.rounds=1")
  for stage, number, code, why in (
      ("base/eval", term, 143, "terminated"), ("round_0/samples.jsonl", term, 143, "terminated"),
      ("round_0/eval/sft", kill, -9, "was killed"), ("round_0/merged", term, 143, "terminated")):
    with subprocess.Popen(small, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          ) as process:
      for line in process.stdout:
        if line.startswith(f"{stage}: run"):
          break
      time.sleep(0.02)
      began = time.monotonic()
      process.send_signal(number)
      _, said = process.communicate()
    assert time.monotonic() - began < 15
    assert process.returncode == code, said
    assert ("terminated by SIGTERM; repeat the command to resume" in said) == (number == term)
    assert "Traceback" not in said
    found = status.read(root)
    assert (found.state, why in found.why) == ("stopped", True)
    assert f" INFO {stage}: run\n" in (root / "log.txt").read_text()
  dry = subprocess.run([*small, "--dry_run"], cwd=REPO, env=environment, capture_output=True, text=True, check=True)
  assert dry.stdout.startswith(f"{root}: stopped in round_0/")
  done = subprocess.run(small, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert status.read(root).state == "finished"
  assert (root / "log.txt").read_text().count("base/eval: run\n") == 2


@pytest.mark.parametrize("asked", ["cuda", "cpuu"])
def test_a_platform_that_is_not_there_is_one_line(asked: str, tmp_path: Path):
  if asked == "cuda" and Path("/dev/nvidiactl").exists():
    pytest.skip("there is one")
  commands = {"cpuu": ["imm_jax.main", f"--config={REPO / 'configs/tiny.py'}", f"--workdir={tmp_path / 'run'}"],
              "cuda": ["imm_jax.convert", "--source=tiny", f"--out={tmp_path / 'out'}", "--to=orbax"]}
  done = subprocess.run([sys.executable, "-m", *commands[asked]], cwd=REPO, capture_output=True, text=True, check=False,
                        env=os.environ | {"JAX_PLATFORMS": asked})
  assert done.returncode == 69
  assert done.stderr.startswith(f"error: JAX_PLATFORMS={asked}: not on this machine")
  assert len(done.stderr.splitlines()) == 1
  assert not list(tmp_path.iterdir())
