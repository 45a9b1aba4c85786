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


@pytest.mark.slow
def test_the_smallest_shape_runs_and_a_failure_is_shown() -> None:
  pytest.importorskip("torch")
  flags = ("sampling.py", "--workloads=stories", "--questions=3", "--max_new_tokens=8", "--rows=2", "--peer_rows=2")
  done = _run(*flags, "--transformers_questions=2")
  assert done.returncode == 0, done.stderr
  native, other = done.stdout.splitlines()[2:]
  assert native.startswith("| stories | native | 3 | ")
  assert native.endswith(" | 3 of 3 |")
  assert other.startswith("| stories | transformers | 2 | ")
  assert other.endswith(" | 2 of 2 |")
  failed = _run(*flags, "--dtype=int8", "--transformers_questions=0")
  assert failed.returncode == 1
  assert "compute_dtype='int8': expected one of" in failed.stderr


def test_greedy_texts_are_those_of_transformers() -> None:
  pytest.importorskip("torch")
  done = _run("greedy_texts.py", "--model=tiny", "--task=stories", "--questions=3", "--max_new_tokens=8",
              "--batch_size=2")
  assert done.returncode == 0, done.stderr
  assert "native and transformers: 3 of 3 texts are equal in every character" in done.stdout
