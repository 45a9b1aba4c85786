"""Whole runs of the methods that change SFT: to the end, killed and gone on to the same bits."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests import REPO, TINY
from tests.runs.helpers import assert_same_run, command, start, weights

QUICK = ("--config.task.eval_questions=4",)
STOPPED = ("--config.sft.ema=True", "--config.sft.stop_share=0.25", "--config.sft.epochs=3")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "more"), [("kl", STOPPED), ("l2_sp", ()), ("ema", ()), (
    "lora", ("--config.sft.lora_rank=4",))])
def test_killed_training_ends_in_the_same_bits(
    environment: dict[str, str], tmp_path: Path, method: str, more: tuple[str, ...]):
  given = (*QUICK, f"--config.method={method}", *more)
  whole = start(tmp_path / "whole", environment, *given)
  assert whole.returncode == 0, whole.stderr
  states = tmp_path / "killed/round_1/sft_state"
  process = subprocess.Popen(command(tmp_path / "killed", *given), cwd=REPO, env=environment,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
  while process.poll() is None and not list(states.glob("[0-9]*")):
    time.sleep(0.01)
  if process.poll() is None:
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()
  again = start(tmp_path / "killed", environment, *given)
  assert again.returncode == 0, again.stderr
  assert_same_run(tmp_path / "whole", tmp_path / "killed")
  _looks_right(tmp_path / "whole", method)
  shutil.rmtree(tmp_path / "whole")


def _looks_right(run: Path, method: str) -> None:
  stages = json.loads((run / "run.json").read_text())["stages"]
  metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  trained = [m for m in metrics if m["stage"] == "round_0/sft" and "loss" in m]
  assert ("base" in stages["round_1/sft"]["inputs"]) == (method in ("kl", "l2_sp"))
  assert all((method in m) == (method in ("kl", "l2_sp")) for m in trained)
  # A model begins at the base, so nothing pulls yet; then it has moved.
  if method in ("kl", "l2_sp"):
    assert 0 <= trained[0][method] < 1e-3 * trained[-1][method]
  facts = stages["round_0/sft"]["facts"]
  averages = method in ("kl", "ema")
  assert (run / "round_0/sft/ema/model.safetensors").exists() == ("round_0/eval/ema" in stages) == averages
  if method == "kl":
    losses = [m["held_out_loss"] for m in metrics if m["stage"] == "round_0/sft" and "held_out_loss" in m]
    assert facts["held_out_losses"] == [round(loss, 6) for loss in losses]
    assert losses[facts["best_epoch"] - 1] == min(losses)
  base, tuned = weights(TINY), weights(run / "round_0/sft")
  moved = {name: tuned[name] - base[name] for name in base if (tuned[name] != base[name]).any()}
  if method == "ema":
    average = weights(run / "round_0/sft/ema")
    size = lambda tree: sum(np.square(tree[name] - base[name]).sum() for name in base)
    assert 0 < size(average) < size(tuned)
  if method == "lora":
    assert {name.split(".")[-2] for name in moved} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                                       "down_proj"}
    for name, change in moved.items():  # of rank 4, but for the rounding of what is stored
      singular = np.linalg.svd(change, compute_uv=False)
      assert np.square(singular[4:]).sum() < 0.5 * np.square(singular).sum(), name
    assert (run / "round_1/sft/adapter/adapter_model.safetensors").exists()
