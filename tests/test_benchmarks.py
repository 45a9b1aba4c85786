"""The benchmarks of the sampler run at their smallest size, and show what a process of their own died of."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent


def _run(file: str, *flags: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
      [sys.executable, f"benchmarks/{file}", *flags], cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)},
      capture_output=True, text=True, check=False)


def test_the_smallest_shape_runs_and_a_failure_is_shown(tmp_path: Path) -> None:
  flags = ("sampling.py", f"--workdir={tmp_path}", "--shape=tiny", "--repeats=1", "--batch_size=2",
           "--workloads=equal", "--notransformers")
  done = _run(*flags, "--dtypes=float32")
  assert done.returncode == 0, done.stderr
  assert "| equal | float32 | imm_jax | 256 | 128 |" in done.stdout
  failed = _run(*flags, "--dtypes=int8")
  assert failed.returncode == 1
  assert "compute_dtype='int8': expected one of" in failed.stderr


def test_greedy_texts_are_those_of_transformers() -> None:
  pytest.importorskip("torch")
  done = _run("greedy_texts.py", "--model=tiny", "--task=stories", "--questions=3", "--max_new_tokens=8",
              "--batch_size=2")
  assert done.returncode == 0, done.stderr
  assert "native and transformers: 3 of 3 texts are equal in every character" in done.stdout
