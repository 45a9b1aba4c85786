"""Several processes as one run, on loopback, two faked devices each."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imm_jax.model import safetensors
from tests import REPO

SMALL = ("--config.rounds=1", "--config.task.questions_per_round=24", "--config.task.eval_questions=8",
         "--config.task.ood=('groups',)", "--config.sample.batch_size=12", "--config.eval.batch_size=8",
         "--config.sft.epochs=4", "--config.sft.global_batch=8", "--config.sft.log_every=1",
         "--config.sft.save_interval=2", "--config.sft.accumulation=1", "--config.analysis.examples=0",
         "--config.analysis.drift=0")
# Where importance, entropy and drift are measured too.
MEASURED = ("--config.analysis.examples=6", "--config.analysis.drift=2")


@pytest.fixture(scope="session")
def cache() -> dict[str, str]:
  """Processes share compiled code, so that a start costs seconds."""
  return {"JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"]}


class Run:
  """The processes of one run."""

  def __init__(self, workdir: Path, count: int, environment: dict[str, str], *extra: str, devices: int = 2,
               own_workdirs: bool = False, folders: list[Path] | None = None):
    with socket.socket() as s:
      s.bind(("localhost", 0))
      port = s.getsockname()[1]
    self.logs = [workdir.with_name(f"{workdir.name}-{i}.log") for i in range(count)]
    self.processes = []
    for i, log in enumerate(self.logs):
      here = workdir / str(i) if own_workdirs else workdir
      joined = (f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={i}")
      environment = environment | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                                   "JAX_PLATFORMS": "cpu"}
      with log.open("w") as f:
        self.processes.append(subprocess.Popen(
            [sys.executable, "-m", "imm_jax.main", f"--config={REPO / 'configs/tiny.py'}", f"--workdir={here}", *SMALL,
             *extra, *(joined if count > 1 else ())], cwd=folders[i] if folders else REPO, stdout=f,
            stderr=subprocess.STDOUT, env=os.environ | environment))

  def wait(self, seconds: float = 400) -> list[int]:
    """The exit codes."""
    end = time.monotonic() + seconds
    try:
      return [p.wait(max(0.1, end - time.monotonic())) for p in self.processes]
    finally:
      for p in self.processes:
        p.kill()

  @property
  def said(self) -> list[str]:
    return [log.read_text() for log in self.logs]


@pytest.fixture
def start(cache: dict[str, str], tmp_path: Path) -> Callable[..., Run]:
  return lambda name, count, *extra, **options: Run(tmp_path / name, count, cache, *extra, **options)


def finish(run: Run) -> None:
  assert run.wait() == [0] * len(run.processes), "\n".join(text[-2000:] for text in run.said)


def losses(workdir: Path) -> list[float]:
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  steps = [line for line in lines if line["stage"] == "round_0/sft"]
  assert [line["step"] for line in steps] == list(range(len(steps)))
  return [line["loss"] for line in steps]


def weights(workdir: Path, kind: str = "sft") -> dict[str, np.ndarray]:
  return safetensors.read(workdir / "round_0" / kind / "model.safetensors")


def assert_same_training(a: Path, b: Path) -> None:
  np.testing.assert_allclose(losses(a), losses(b), rtol=1e-4, atol=1e-5)
  left, right = weights(a), weights(b)
  for name in left:
    x, y = left[name].astype(np.float64), right[name].astype(np.float64)
    assert np.linalg.norm(x - y) <= 1e-3 * np.linalg.norm(x), name


@pytest.fixture(scope="module")
def alone(cache: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The same run in one process with four devices."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  finish(Run(workdir, 1, cache, *MEASURED, devices=4))
  return workdir


@pytest.mark.full
def test_two_processes_give_the_run_of_one(alone: Path, start: Callable[..., Run], tmp_path: Path):
  """Sampling, filter, training, export, merge, evaluation and analysis; process 0 alone writes and prints."""
  run = start("two", 2, *MEASURED)
  finish(run)
  workdir = tmp_path / "two"
  read = lambda root: [json.loads(line) for line in (root / "round_0/samples.jsonl").read_text().splitlines()]
  assert read(workdir) == read(alone)
  assert_same_training(alone, workdir)
  assert len(losses(workdir)) >= 6
  names = lambda root: sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and "tb" not in p.parts)
  assert names(workdir) == names(alone)
  assert "stages were run" in run.said[0]
  assert "round_0" not in run.said[1]
  ours, theirs = (json.loads((root / "round_0/analysis.json").read_text()) for root in (alone, workdir))
  assert ours["importance"]["examples"] == 6
  np.testing.assert_allclose(ours["importance"]["layers"], theirs["importance"]["layers"], rtol=1e-4)
  assert ours["diversity"] == pytest.approx(theirs["diversity"], rel=1e-5)
  ours, theirs = (json.loads((root / "round_0/drift.json").read_text())["models"] for root in (alone, workdir))
  for kind in ("sft", "merged"):
    for task, found in ours[kind].items():
      assert found == pytest.approx(theirs[kind][task], rel=2e-3, abs=1e-6)


@pytest.mark.slow
def test_resumed_on_other_process_counts(alone: Path, start: Callable[..., Run], tmp_path: Path):
  """A run that is killed goes on with other numbers of processes."""
  workdir = tmp_path / "run"
  states = workdir / "round_0/sft_state"
  for count, killed, enough in ((2, 1, 2), (4, 0, 4)):
    run = start("run", count, "--config.sft.log_every=2")
    began = time.monotonic()
    while not (states / str(enough)).is_dir() and time.monotonic() < began + 300:
      assert run.processes[killed].poll() is None, run.said
      time.sleep(0.02)
    assert (states / str(enough)).is_dir()
    run.processes[killed].send_signal(signal.SIGKILL)
    ended = time.monotonic()
    codes = run.wait()
    assert all(codes), run.said  # none is left behind, none believes that all is well
    assert time.monotonic() < ended + 120
  finish(start("run", 1))
  assert_same_training(alone, workdir)
  assert not states.exists()


@pytest.mark.full
@pytest.mark.parametrize("failing", [0, 1])
def test_all_processes_end_with_the_first_error(start: Callable[..., Run], tmp_path: Path, failing: int):
  """One host's copy of the model is damaged; the others wait for it in a collective."""
  for i in range(2):
    shutil.copytree(REPO / "imm_jax/assets/tiny", tmp_path / str(i) / "model")
  os.truncate(tmp_path / str(failing) / "model/model.safetensors", 100_000)
  run = start("run", 2, "--config.model=model", folders=[tmp_path / str(i) for i in range(2)])
  assert run.wait(120) == [1, 1], run.said
  for i, said in enumerate(run.said):
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert "model.safetensors: truncated" in errors[0]
    assert ("another process failed first: process" in errors[0]) == (i != failing)


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_stops_all(start: Callable[..., Run], tmp_path: Path):
  states = tmp_path / "run/round_0/sft_state"
  long = ("--config.sft.epochs=60", "--config.sft.save_interval=1000")
  run = start("run", 2, *long, "--config.profile=0:2")
  began = time.monotonic()
  while '"round_0/sft"' not in _text(tmp_path / "run/metrics.jsonl") and time.monotonic() < began + 300:
    time.sleep(0.02)
  run.processes[1].send_signal(signal.SIGTERM)
  assert run.wait() == [143, 143], run.said
  assert "terminated by SIGTERM after step" in run.said[0]
  stopped, = (int(p.name) for p in states.iterdir() if p.name.isdigit())
  assert len(losses(tmp_path / "run")) == stopped
  assert len(list((tmp_path / "run/profile").rglob("perfetto_trace.json.gz"))) == 2
  finish(start("run", 2, *long))
  assert len(losses(tmp_path / "run")) > stopped


def _text(path: Path) -> str:
  return path.read_text() if path.exists() else ""


@pytest.mark.full
def test_unshared_run_directory_is_refused(start: Callable[..., Run]):
  run = start("run", 2, own_workdirs=True)
  assert run.wait() == [1, 1], run.said
  assert all("not all hosts see the same run directory" in said for said in run.said)


@pytest.mark.full
@pytest.mark.parametrize(("arguments", "environment", "expected"), [
    (("--distributed=on",), {}, "do not find each other"),
    (("--num_processes=2", "--process_id=2", "--coordinator=localhost:1"), {}, "do not find each other"),
    ((), {"SLURM_NTASKS": "two"}, "is no number"),
    ((), {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "9"},
     "do not find each other")])
def test_processes_that_cannot_join_end_in_one_line(arguments: tuple[str, ...], environment: dict[str, Any],
                                                    expected: str, tmp_path: Path):
  done = subprocess.run([sys.executable, "-m", "imm_jax.main", f"--config={REPO / 'configs/tiny.py'}",
                         f"--workdir={tmp_path / 'run'}", *arguments], cwd=REPO, env=os.environ | environment,
                        capture_output=True, text=True, check=False)
  assert done.returncode == 1
  errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  assert len(errors) == 1, done.stderr
  assert expected in errors[0]
  assert "Traceback" not in done.stderr
