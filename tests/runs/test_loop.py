"""The command end to end: what a run leaves behind, resume after kills and a full disk, damaged run directories."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from imm_jax import files
from imm_jax.errors import Exit, UserError
from imm_jax.estimates import disk, shapes
from imm_jax.model import hf, safetensors
from imm_jax.runs import status
from imm_jax.runs.verification import check_run
from imm_jax.training import states as training_states
from tests import REPO, TINY
from tests.runs.helpers import assert_same_run, command, contents, one_line, start

# KILLS=10 KILL_SEED=1 in the environment kills at other moments, and more often.
KILLS = int(os.environ.get("KILLS", "3"))


@pytest.fixture(scope="session")
def finished(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
  workdir = tmp_path_factory.mktemp("runs") / "imm"
  done = start(workdir, environment)
  assert done.returncode == 0, done.stderr
  # Every model is another one, or the tests below would compare copies of the base.
  models = [TINY, *(workdir / f"round_{t}" / kind for t in range(2) for kind in ("sft", "merged"))]
  assert len({(m / "model.safetensors").read_bytes() for m in models}) == 5
  return workdir


def test_run_leaves_the_documented_files(finished: Path):
  for name in ("config.json", "run.json", "metrics.jsonl", "tb", "base/eval/stories.jsonl", "round_0/samples.jsonl",
               "round_0/train.jsonl", "round_0/sft/model.safetensors", "round_1/merged/config.json",
               "round_1/merged/tokenizer.json", "round_1/eval/sft/groups.jsonl", "round_1/eval/merged/stories.jsonl",
               "round_1/analysis.json", "report/index.html", "report/accuracy.png", "report/accuracy.csv"):
    assert (finished / name).exists(), name
  assert not list(finished.rglob("*.part"))
  assert not list(finished.rglob("sft_state"))
  assert status.read(finished).state == "finished"
  log = (finished / "log.txt").read_text()
  assert " INFO round_1/merged: done in " in log
  assert "report: " in log
  assert "%|" not in log
  assert (finished / "round_1/merged/config.json").read_bytes() == (TINY / "config.json").read_bytes()


def test_it_takes_of_the_disk_about_what_is_said(finished: Path):
  config = ml_collections.ConfigDict(json.loads((finished / "config.json").read_text()))
  model = hf.read_config(TINY)
  said = disk.estimate(config, model, shapes.estimate(config, model, TINY), TINY)
  assert files.count_bytes(finished) == pytest.approx(said.final, rel=0.1)


def test_training_data_is_the_right_samples_once(finished: Path):
  samples = [json.loads(line) for line in (finished / "round_0/samples.jsonl").read_text().splitlines()]
  train = [json.loads(line) for line in (finished / "round_0/train.jsonl").read_text().splitlines()]
  assert len(samples) == 24 * 3
  assert {s["temperature"] for s in samples} == {0.2, 0.4, 0.6}
  right = {(s["question"], s["text"]) for s in samples if float(s["span"] or "nan") == float(s["gold"])}
  assert len(train) == len(right)
  assert {(t["question"], t["response"]) for t in train} == right


def test_merged_weights_follow_the_equations(finished: Path):
  """By eq. 5 and 6 an entry is the base's (dropped), or has moved by its share of the rescaled delta."""
  base, tuned, merged = (
      safetensors.read(folder / "model.safetensors")
      for folder in (TINY, finished / "round_0/sft", finished / "round_0/merged"))
  moved = (1 - json.loads((finished / "config.json").read_text())["merge"]["base_weight"]) / (1 - 13107 / 65536)
  for name in base:
    b, t, m = (x[name].astype(np.float64) for x in (base, tuned, merged))
    error = np.minimum(abs(m - b), abs(m - (b + moved * (t - b))))
    assert (error <= 2**-8 * np.maximum(abs(m), abs(b)) + 1e-30).all(), name


@pytest.mark.full
def test_killed_run_ends_in_the_same_bits(finished: Path, environment: dict[str, str], tmp_path: Path):
  """It may be killed at any moment."""
  rng, kills, workdir = random.Random(int(os.environ.get("KILL_SEED", "0"))), 0, tmp_path / "killed"
  stages = len(json.loads((finished / "run.json").read_text())["stages"])
  while kills < KILLS:
    process = subprocess.Popen(command(workdir), cwd=REPO, env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    # A random moment within one of the first stages that this process works on.
    for _ in range(rng.randint(1, 3)):
      if not process.stdout.readline():
        break
    time.sleep(rng.uniform(0, 1.5))
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
      kills += 1
    process.wait()
    process.stdout.close()
    record = workdir / "run.json"
    if record.exists() and len(json.loads(record.read_text())["stages"]) == stages and kills < KILLS:
      shutil.rmtree(workdir / "round_1")  # nothing left to kill: take the last round away again
  done = start(workdir, environment)
  assert done.returncode == 0, done.stderr
  assert_same_run(finished, workdir)


@pytest.mark.full
def test_finished_run_can_be_continued(finished: Path, environment: dict[str, str], tmp_path: Path):
  """Started again it does nothing."""
  workdir = tmp_path / "copy"
  shutil.copytree(finished, workdir)
  again = start(workdir, environment)
  assert "0 of 15 stages were run" in again.stdout
  plan = start(workdir, environment, "--config.rounds=3", "--dry_run")
  assert plan.returncode == 0
  assert plan.stdout.count("to do") == 7 + 1  # the stages of round 2, and the sum
  fewer = start(workdir, environment, "--config.rounds=1")
  assert fewer.returncode == 1
  assert "config.rounds was 2 and is 1 now" in fewer.stderr


@pytest.mark.full
def test_lost_outputs_are_made_again(finished: Path, environment: dict[str, str], tmp_path: Path):
  """So are changed ones, and the reason is given."""
  workdir = tmp_path / "copy"
  shutil.copytree(finished, workdir)
  weights = workdir / "round_1/merged/model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-100])
  (workdir / "round_0/train.jsonl").unlink()
  done = start(workdir, environment)
  assert done.returncode == 0, done.stderr
  assert "round_1/merged: run again, because its output has another size" in done.stdout
  assert "round_0/train.jsonl: run again, because its output is missing" in done.stdout
  assert_same_run(finished, workdir)


@pytest.mark.slow
def test_real_uses_gold_and_star_continues(environment: dict[str, str], tmp_path: Path):
  """`real` trains on gold answers, and `star` goes on from the tuned model."""
  real = start(tmp_path / "real", environment, "--config.method=real", "--config.rounds=1")
  assert real.returncode == 0, real.stderr
  train = [json.loads(line) for line in (tmp_path / "real/round_0/train.jsonl").read_text().splitlines()]
  assert len(train) == 24
  assert all("The answer is" in t["response"] for t in train)
  star = start(tmp_path / "star", environment, "--config.method=star")
  assert star.returncode == 0, star.stderr
  record = json.loads((tmp_path / "star/run.json").read_text())["stages"]
  assert not (tmp_path / "star/round_0/merged").exists()
  assert record["round_1/sft"]["inputs"]["round_0/sft"] == record["round_0/sft"]["output"]


@pytest.mark.slow
def test_bfloat16_runs_repeat_bit_for_bit(environment: dict[str, str], tmp_path: Path):
  """They do so from any folder."""
  bfloat16 = ("--config.rounds=1", "--config.sft.compute_dtype=bfloat16", "--config.sample.compute_dtype=bfloat16")
  for name in ("a", "b"):
    done = subprocess.run(command(tmp_path / name, *bfloat16), cwd=tmp_path, env=environment, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
  assert_same_run(tmp_path / "a", tmp_path / "b")
  facts = json.loads((tmp_path / "a/run.json").read_text())["stages"]["round_0/sft"]["facts"]
  assert 0 < facts["last_loss"] < 3
  assert (tmp_path / "a/round_0/sft/model.safetensors").read_bytes() != (TINY / "model.safetensors").read_bytes()


def test_foreign_run_directory_is_refused(finished: Path, environment: dict[str, str]):
  """It belongs to another config."""
  before = contents(finished)
  done = start(finished, environment, "--config.seed=7")
  assert done.returncode == 1
  said = one_line(done.stderr)
  assert "made with another config (config.seed was 0 and is 7 now), which would run finished work again" in said
  assert "--rerun" in said
  assert contents(finished) == before


def test_every_flipped_byte_is_found(finished: Path, tmp_path: Path):
  """Of any file of a run that was stopped in its second SFT: by name, and before a training state is read."""
  root, rng = tmp_path / "run", random.Random(0)
  shutil.copytree(finished, root)
  identity = {"train": "a"}
  with training_states.Checkpoints(root / "round_1/sft_state", save_interval=1, max_to_keep=2,
                                   identity=identity) as states:
    for step in (1, 2):
      states.save(step, {"w": np.arange(5000.0) * step}, input={"next_index": step}, first_loss=1.0)
    states.wait()
  assert check_run(root) == ([], {}, [])
  paths = [p for p in sorted(root.rglob("*")) if p.is_file() and p.stat().st_size]
  states = [p for p in paths if "sft_state" in p.parts]
  for path in [*rng.sample(paths, 14), *rng.sample(states, 4), root / "run.json", root / "manifest.json"]:
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    path.write_bytes(flipped)
    wrong = check_run(root).differing
    assert str(path.relative_to(root)) in wrong
    assert len(wrong) == 1 or path.name == "run.json"
    if path.is_relative_to(root / "round_1/sft_state/2"):
      with training_states.Checkpoints(root / "round_1/sft_state", save_interval=1, max_to_keep=2,
                                       identity=identity) as states, pytest.raises(
                                           UserError, match=f"{path.name} differs"):
        states.latest()
    path.write_bytes(whole)
  (root / "round_0/train.jsonl").unlink()
  assert check_run(root).differing == ["round_0/train.jsonl"]
  (root / "manifest.json").unlink()
  assert "manifest.json is missing" in check_run(root).notes[0]
  assert {"run.json", "config.json", "log.txt", "metrics.jsonl", "report/index.html"} <= {*check_run(root).unchecked}
  record = root / "run.json"  # which nothing covers now
  record.write_text(record.read_text().replace('"output": "', '"output": "0', 1))
  assert sorted(check_run(root).differing) == ["base/eval", "round_0/train.jsonl"]
  done = subprocess.run([sys.executable, "-m", "imm_jax.verify", f"--workdirs={root}"], cwd=REPO, capture_output=True,
                        text=True, check=False)
  assert done.returncode == 1
  assert f"{root}/round_0/train.jsonl: differs from what was written" in done.stdout


@pytest.mark.full
@pytest.mark.parametrize(("file", "text", "expected"), [
    ("run.json", '{"stages": {"base/eval": {}}}', "damaged"), ("run.json", "[]", "expected a JSON object"),
    ("config.json", "[]", "expected a JSON object"), ("config.json", None, "missing")])
def test_a_damaged_run_directory_is_one_line(finished: Path, environment: dict[str, str], tmp_path: Path, file: str,
                                             text: str | None, expected: str):
  shutil.copytree(finished, tmp_path / "run")
  if text is None:
    (tmp_path / "run" / file).unlink()
  else:
    (tmp_path / "run" / file).write_text(text)
  done = start(tmp_path / "run", environment)
  assert done.returncode == 1
  assert expected in one_line(done.stderr)


@pytest.mark.full
@pytest.mark.parametrize(("interval", "where"), [
    (2, "sft_state: the training state"), pytest.param(100, "sft:", marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_loses_nothing(environment: dict[str, str], tmp_path: Path, interval: int,
                                                   where: str):
  """A tiny file size limit stands in for a full disk: the kernel refuses the write in the same place."""
  small = command(tmp_path / "run", "--config.rounds=1", f"--config.sft.save_interval={interval}")
  limited = ["bash", "-c", 'ulimit -f 1200; trap "" XFSZ; exec "$@"', "bash", *small]
  done = subprocess.run(limited, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == Exit.RESOURCES
  assert f"{where} cannot be written (File too large" in one_line(done.stderr)
  done = subprocess.run(small, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr


def test_merged_model_in_transformers(finished: Path):
  """It gives the same greedy tokens."""
  torch = pytest.importorskip("torch")
  from transformers import AutoModelForCausalLM

  from imm_jax.sampling import Prompt
  from imm_jax.sampling.native import NativeSampler
  from imm_jax.tasks import arithmetic, prompts

  folder = finished / "round_1" / "merged"
  questions = [prompts.build_prompt(e.question) for f in arithmetic.FAMILIES
               for e in arithmetic.generate(f, split="test", count=4, seed=1)]
  sampler = NativeSampler(folder, compute_dtype="float32", batch_size=8)
  ours = sampler.generate([Prompt(str(i), q) for i, q in enumerate(questions)], max_new_tokens=40)
  reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  assert hf.read_config(folder).num_layers == reference.config.num_hidden_layers
  for question, (completion,) in zip(questions, ours, strict=True):
    ids = sampler.tokenizer(question, return_tensors="pt")
    tokens = reference.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1]:]
    assert completion.num_tokens == len(tokens)
    assert completion.text == sampler.tokenizer.decode(tokens, skip_special_tokens=True)
