"""What `imm verify` finds in a run directory, above all in that of a run that was killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import tiny
from imm_jax import files, integrity
from imm_jax.report import live
from imm_jax.runs import metrics, status
from imm_jax.runs.run import Stage
from imm_jax.runs.rundir import RunDir
from imm_jax.runs.verification import Findings, check_run
from tests import REPO
from tests.runs.helpers import command


def name_uncovered(found: Findings, name: str) -> bool:
  """Whether a file is said not to have been checked, by its own name or by that of a folder."""
  named = [*found.unchecked, *(note.split(": ")[0] for note in found.notes)]
  return any(name == other or (other.endswith("/") and name.startswith(other)) for other in named)


def flip_everywhere(root: Path, rng: random.Random, times: int = 1) -> tuple[set[str], set[str]]:
  """Flips bits of every file, one at a time; returns the files of which it was found and those said to be unchecked."""
  found, uncovered = set(), set()
  before = check_run(root)
  assert not before.differing
  for path in [path for path in files.list_files(root) if path.stat().st_size]:
    name, whole = str(path.relative_to(root)), path.read_bytes()
    for _ in range(times):
      flipped = bytearray(whole)
      flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
      path.write_bytes(flipped)
      wrong = check_run(root)
      if name in wrong.differing:
        assert len(wrong.differing) == 1 or name == "run.json"
        found.add(name)
      else:
        assert name_uncovered(wrong, name), name
        uncovered.add(name)
    path.write_bytes(whole)
  assert check_run(root) == before
  return found, uncovered


def make_run(root: Path, killed: Path) -> None:
  """Makes a run of two stages; `killed` is what a kill in the second one leaves."""
  stages = [Stage("base/eval", (), {"a": 1}, "", lambda out, _: _write(root, out, "base/eval")),
            Stage("round_0/samples.jsonl", ("base/eval",), {}, "", lambda out, _: _write(
                root, out, "round_0/samples.jsonl", killed), scratch=str(root / "round_0/.samples.jsonl.sampling"))]
  names = [stage.name for stage in stages]
  with RunDir(root, tiny.get_config()) as directory:
    directory.begin(stages, {}, rerun=False)
    with status.StatusWriter(root, names) as writer, live.Live(root, names) as page:
      for stage in stages:
        writer.set_stage(stage.name)
        directory.run(stage, {})
        page.update()


def _write(root: Path, out: Path, stage: str, killed: Path | None = None) -> dict[str, int]:
  with metrics.StageMetrics(root, stage) as writer:
    for step in range(5):
      writer.write(step, loss=1.0)
  if killed:
    (root / "round_0/.samples.jsonl.sampling").mkdir(parents=True, exist_ok=True)
    (root / "round_0/.samples.jsonl.sampling/done").write_text("a half")
  files.write_text(out, f"{stage}\n")
  if killed and not killed.exists():
    shutil.copytree(root, killed)
  return {}


def test_flips_in_a_killed_run(tmp_path: Path) -> None:
  """Each is found, or its file is named as unchecked; the end of a run covers what its kill did not."""
  root, killed = tmp_path / "run", tmp_path / "killed"
  make_run(root, killed)
  assert check_run(root) == ([], {}, [])
  assert flip_everywhere(root, random.Random(0))[1] == set()
  before = check_run(killed)
  growing = {name for name in before.unchecked if name.startswith("tb/round_0_samples")} | {"metrics.jsonl"}
  half = {"round_0/.samples.jsonl.part", "round_0/.samples.jsonl.sampling/"}
  assert {*before.unchecked} == growing | half | {"status.json"}
  found, uncovered = flip_everywhere(killed, random.Random(1), times=8)
  assert {"run.json", "config.json", "manifest.json", "metrics.jsonl", "base/eval", "report/index.html"} <= found
  assert {"status.json", "metrics.jsonl"} <= uncovered
  assert not any(name in uncovered for name in ("run.json", "config.json", "manifest.json", "base/eval"))
  assert all(name_uncovered(before, name) for name in uncovered)
  make_run(killed, tmp_path / "not")
  assert check_run(killed) == ([], {}, [])


def test_stages_run_again_stay_covered(tmp_path: Path) -> None:
  """At every moment: their lines are cut out of the metrics, and their events are removed."""
  root, killed = tmp_path / "run", tmp_path / "killed"
  make_run(root, tmp_path / "first")
  (root / "round_0/samples.jsonl").unlink()
  make_run(root, killed)
  found = check_run(killed)
  assert not found.differing
  assert "metrics.jsonl" in found.unchecked
  assert check_run(root) == ([], {}, [])
  (root / "base/eval").unlink()
  make_run(root, tmp_path / "third")
  assert check_run(root) == ([], {}, [])


def test_strays_are_named(tmp_path: Path) -> None:
  """So are stages that left the run, without a mention of every file of theirs."""
  root = tmp_path / "run"
  make_run(root, tmp_path / "killed")
  (root / "notes.txt").write_text("mine")
  for name in ("round_1/sft/model.safetensors", "round_1/samples.jsonl", "round_0/sft/config.json", "report/own.csv",
               "cache/0123/stories.jsonl"):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("left")
  found = check_run(root)
  assert (found.differing, found.unchecked) == ([], {"report/own.csv": 1})
  assert [note.split(": ")[0] for note in found.notes] == ["cache/", "notes.txt", "round_0/sft/",
                                                              "round_1/"]


def test_training_states_are_sorted(tmp_path: Path) -> None:
  """Into those that are covered, and what is beside them."""
  states = tmp_path / "round_0/sft_state"
  for name in ("4/state", "4/extra", "6/state", "8.orbax-checkpoint-tmp/state"):
    (states / name).parent.mkdir(parents=True, exist_ok=True)
    (states / name).write_text("whole")
  (states / "thesis.txt").write_text("mine")
  (states / f"2{integrity.SEAL}").write_text("{}")
  integrity.write_digests(states / f"4{integrity.SEAL}", states, [states / "4/state"])
  files.write_text(tmp_path / "run.json", json.dumps({"stages": {}}))
  files.write_text(tmp_path / "config.json", json.dumps({"sft": {"state_dir": "gs://bucket/states"}}))
  integrity.seal(tmp_path, "run.json", "config.json", create=True)
  found = check_run(tmp_path)
  place = "round_0/sft_state"
  assert not found.differing
  assert found.unchecked == {f"{place}/6/": 1, f"{place}/8.orbax-checkpoint-tmp/": 1, f"{place}/2.digest.json": 1}
  said = "\n".join(found.notes)
  for line in (f"{place}/4/extra: was not there when the training state was written", f"{place}/6/: has no digests",
               f"{place}/8.orbax-checkpoint-tmp/: a training state that was not written to its end",
               f"{place}/thesis.txt: is no training state", "in gs://bucket/states"):
    assert line in said
  (states / "4/state").write_text("while")
  assert check_run(tmp_path).differing == [f"{place}/4/state"]


@pytest.mark.parametrize(("damage", "code", "line"), [
    ((), 0, "unchanged"), (("report/index.html",), 1, "1 differ"),
    (("manifest.json",), 2, "nothing that could be checked differs; "),
    (("manifest.json", "base/eval"), 1, "1 differ; ")])
def test_verify_says_what_it_left_out(tmp_path: Path, damage: tuple[str, ...], code: int, line: str) -> None:
  root = tmp_path / "run"
  make_run(root, tmp_path / "killed")
  for name in damage:
    (root / name).unlink()
  done = subprocess.run([sys.executable, "-m", "imm_jax.verify", str(root)], cwd=REPO, capture_output=True, text=True,
                        check=False)
  assert done.returncode == code, done.stderr
  assert f"{root}: {line}" in done.stdout.splitlines()[-1]
  assert ("files were not checked: " in done.stdout) == ("manifest.json" in damage)


@pytest.mark.full
def test_flips_after_sigkill_in_sft(environment: dict[str, str], tmp_path: Path) -> None:
  """With states that the trainer wrote; all that is named as unchecked is what was being written."""
  root, rng = tmp_path / "run", random.Random(0)
  small = command(root, "--config.rounds=1", "--config.sft.save_interval=1", "--config.sft.epochs=9",
                  "--config.sft.max_to_keep=2")
  with subprocess.Popen(small, cwd=REPO, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                        start_new_session=True) as process:
    while process.poll() is None and len(list((root / "round_0/sft_state").glob(f"*{integrity.SEAL}"))) < 2:
      time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    said = process.stderr.read()
  assert process.returncode == -signal.SIGKILL, said
  found, uncovered = flip_everywhere(root, rng, times=2)
  assert {"run.json", "config.json", "manifest.json", "report/index.html", "round_0/samples.jsonl",
          "round_0/train.jsonl"} <= found
  assert any("/state/" in name for name in found)
  growing = ("log.txt", "metrics.jsonl", "tb/round_0_sft/", "status.json")
  assert all(name.startswith(("round_0/sft_state/", *growing)) for name in uncovered), uncovered
  done = subprocess.run(small, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert check_run(root) == ([], {}, [])
