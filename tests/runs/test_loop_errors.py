"""The command when something is wrong: bad flags, models and folders, no right sample, a kill, a second process."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from imm_jax.runs import status
from tests import REPO, TINY
from tests.runs.helpers import command, one_line, start


@pytest.mark.full
def test_no_right_sample_stops_the_round(environment: dict[str, str], tmp_path: Path):
  """It keeps the samples."""
  # One token is never a whole answer.
  done = start(tmp_path / "run", environment, "--config.sample.max_new_tokens=1")
  assert done.returncode == 1
  assert one_line(done.stderr).startswith("error: ")
  assert "none of 72 samples is right (72 cut at max_new_tokens" in done.stderr
  assert status.read(tmp_path / "run").state == "failed"
  assert "none of 72 samples is right" in status.read(tmp_path / "run").why
  assert " ERROR error: " in (tmp_path / "run/log.txt").read_text()
  samples = (tmp_path / "run/round_0/samples.jsonl").read_bytes()
  assert len(samples.splitlines()) == 72
  more = ("--config.sample.max_new_tokens=1", "--config.rounds=1", "--config.data.skip_empty")
  done = start(tmp_path / "run", environment, *more)
  assert done.returncode == 0, done.stderr
  assert "round_0/train.jsonl: nothing to train on: the round hands on the model that it started from" in done.stdout
  assert (tmp_path / "run/round_0/samples.jsonl").read_bytes() == samples
  for name in ("sft", "merged"):
    weights = tmp_path / "run/round_0" / name / "model.safetensors"
    assert weights.read_bytes() == (TINY / "model.safetensors").read_bytes()


@pytest.mark.full
@pytest.mark.parametrize(("flag", "expected"), [
    ("--config.merge.base_wieght=0.4", "no key 'merge.base_wieght'; did you mean 'merge.base_weight'?"),
    ("--config.merge.auto.questions=5 --config.task.questions=9", "no key 'task.questions'; did you mean 'task."),
    ("--config.rounds=abc", "--config.rounds='abc': expected a whole number"),
    ("--config.merge.drop_rate=1.0", "drop_rate=1.0: expected 0 <= drop_rate < 1"),
    ("--config.task.name=storys", "did you mean stories?"),
    ("--config.mesh.fsdp=3", "does not fit 1 device"),
    ("--config.model=/no/such/folder", "no such checkpoint folder"),
    ("--config.model=", "name is empty"),
    (f"--workdir={REPO / 'README.md'}", "is a file"),
    ("--config=configs/none.py", "configs/none.py"),
])
def test_bad_flags_end_in_one_line(flag: str, expected: str, environment: dict[str, str], tmp_path: Path):
  done = start(tmp_path / "run", environment, "--config.sft.accumulation=2", *re.split(r" (?=--)", flag))
  assert done.returncode == 1
  assert expected in one_line(done.stderr)
  assert not (tmp_path / "run" / "base").exists()


@pytest.fixture
def model(tmp_path: Path) -> Path:
  return Path(shutil.copytree(TINY, tmp_path / "model"))


@pytest.mark.full
@pytest.mark.parametrize(("damage", "expected"), [
    (lambda m: (m / "model.safetensors").unlink(), "model.safetensors: missing"),
    (lambda m: os.truncate(m / "model.safetensors", 100_000), "truncated"),
    (lambda m: (m / "config.json").write_text("{"), "config.json: is not JSON"),
    (lambda m: (m / "tokenizer.json").unlink(), "tokenizer"),
], ids=["no-weights", "half-weights", "no-json", "no-tokenizer"])
def test_a_damaged_base_model_ends_in_one_line(damage, expected: str, model: Path, environment: dict[str, str],
                                               tmp_path: Path):
  damage(model)
  done = start(tmp_path / "run", environment, f"--config.model={model}")
  assert done.returncode == 1
  assert expected in one_line(done.stderr)


@pytest.mark.full
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_folder_that_holds_other_things_is_refused(environment: dict[str, str], tmp_path: Path, dry_run: bool):
  (tmp_path / "report").mkdir()
  (tmp_path / "report/thesis.txt").write_text("mine")
  done = start(tmp_path, environment, *(["--dry_run"] if dry_run else []))
  assert done.returncode == 1
  assert "is not empty and no run directory" in one_line(done.stderr)
  assert (tmp_path / "report/thesis.txt").read_text() == "mine"


@pytest.mark.full
def test_the_wrong_config_file_is_one_line(environment: dict[str, str], tmp_path: Path):
  done = start(tmp_path / "run", environment, f"--config={REPO / 'configs/tiny_pretrain.py'}")
  assert done.returncode == 1
  assert "error: " in one_line(done.stderr)
  (tmp_path / "bad.py").write_text((REPO / "configs/tiny.py").read_text().replace(
      "return config", "config.rounds = '3'; return config"))
  done = start(tmp_path / "run", environment, f"--config={tmp_path / 'bad.py'}")
  assert done.returncode == 1
  assert "config" in one_line(done.stderr)


def test_kill_while_a_file_is_replaced(tmp_path: Path):
  """The moment before the last move is the worst one."""
  script = ("import os, signal, sys, pathlib; from imm_jax import files; path = pathlib.Path(sys.argv[1]);"
            "files.write_text(path, 'old'); os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
            "files.write_text(path, 'new')")
  subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")], cwd=REPO, check=False)
  assert (tmp_path / "file").read_text() == "old"


def test_an_unwritable_run_directory_is_refused(environment: dict[str, str], tmp_path: Path):
  (tmp_path / "file").write_text("")
  done = start(tmp_path / "file" / "run", environment)
  assert done.returncode == 1
  assert "cannot be written" in one_line(done.stderr)


@pytest.mark.full
def test_two_processes_cannot_share_a_run_directory(environment: dict[str, str], tmp_path: Path):
  first = subprocess.Popen(command(tmp_path / "run"), cwd=REPO, env=environment, stdout=subprocess.PIPE,
                           stderr=subprocess.DEVNULL, text=True)
  try:
    first.stdout.readline()  # its first stage has begun
    second = start(tmp_path / "run", environment)
  finally:
    first.kill()
    first.wait()
    first.stdout.close()
  assert second.returncode == 1
  assert "another process is running in it" in one_line(second.stderr)
