"""The benchmark of the sampler runs at its smallest size, and shows what a process of its own died of."""

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parent.parent


def _run(workdir: Path, *flags: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
      [sys.executable, "benchmarks/sampling.py", f"--workdir={workdir}", "--shape=tiny", "--repeats=1",
       "--batch_size=2", "--workloads=equal", "--notransformers", *flags],
      cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True, check=False)


def test_the_smallest_shape_runs_and_a_failure_is_shown(tmp_path: Path) -> None:
  done = _run(tmp_path, "--dtypes=float32")
  assert done.returncode == 0, done.stderr
  assert "| equal | float32 | imm_jax | 256 | 128 |" in done.stdout
  failed = _run(tmp_path, "--dtypes=int8")
  assert failed.returncode == 1
  assert "compute_dtype='int8': expected one of" in failed.stderr
