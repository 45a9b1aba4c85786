"""Runs of the command in a process of its own, and what they leave behind."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from imm_jax.model import safetensors
from tests import REPO

# Small enough for seconds; the model, the stages and the code are those of configs/tiny.py.
SMALL = ("--config.rounds=2", "--config.task.questions_per_round=24", "--config.task.eval_questions=8",
         "--config.task.ood=('groups',)", "--config.sample.batch_size=12", "--config.eval.batch_size=8",
         "--config.sft.epochs=2", "--config.sft.global_batch=4", "--config.sft.log_every=2",
         "--config.sft.save_interval=2", "--config.analysis.examples=0", "--config.analysis.drift=0")
TIMED = ("seconds", "time", "tokens_per_s", "step_s", "input_wait_s", "memory_gib")


def command(workdir: Path, *extra: str) -> list[str]:
  return [sys.executable, "-m", "imm_jax.main", f"--config={REPO / 'configs/tiny.py'}",
          f"--workdir={workdir}", *SMALL, *extra]


def start(workdir: Path, environment: dict[str, str], *extra: str) -> subprocess.CompletedProcess:
  return subprocess.run(command(workdir, *extra), cwd=REPO, env=environment, capture_output=True, text=True,
                        check=False)


def contents(workdir: Path) -> dict[str, object]:
  """Every file of a run, less what measures time."""
  found: dict[str, object] = {}
  for path in sorted(p for p in workdir.rglob("*") if p.is_file()):
    name = str(path.relative_to(workdir))
    # They hold times: of every record, of every stage.
    if name.startswith("tb/") or name in (
        "report/index.html", "report/stages.csv", "manifest.json", "status.json", "log.txt"):
      continue
    if path.name in ("run.json", "metrics.jsonl"):
      records = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else json.loads(
          path.read_text())
      found[name] = without_times(records)
    else:
      found[name] = path.read_bytes()
  return found


def without_times(value: object) -> object:
  if isinstance(value, dict):
    return {k: without_times(v) for k, v in value.items() if k not in TIMED}
  return [without_times(v) for v in value] if isinstance(value, list) else value


def assert_same_run(a: Path, b: Path) -> None:
  left, right = contents(a), contents(b)
  assert left.keys() == right.keys()
  assert [name for name in left if left[name] != right[name]] == []


def one_line(stderr: str) -> str:
  """The error; progress bars may stand before it."""
  assert "Traceback" not in stderr
  lines = [line for line in stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
  assert len(lines) == 1, stderr
  return lines[0]


def weights(folder: Path) -> dict[str, np.ndarray]:
  """A checkpoint in float64."""
  return {name: value.astype(np.float64) for name, value in safetensors.read(folder / "model.safetensors").items()}
