"""Several runs as one experiment."""

import subprocess
import sys
from pathlib import Path

import ml_collections
import pytest

from configs import paper, tiny
from imm_jax import experiments
from imm_jax.errors import UserError
from tests import REPO
from tests.runs.helpers import SMALL


@pytest.mark.parametrize(("method", "before"), [("star", "round_1/sft"), ("imm", "round_1/merged"),
                                                ("ema", "round_1/sft/ema"), ("rest_em", "")])
def test_change_starts_at_the_sft_start(method: str, before: str, tmp_path: Path):
  """A weight change is counted from what SFT started from."""
  config = ml_collections.ConfigDict({"runs": {"a": tiny.get_config()}})
  config.runs.a.method = method
  analysis = ml_collections.ConfigDict({"kind": "weight_change", "run": "a", "model": "round_2/sft"})
  found = experiments._list_models(config, analysis, tmp_path)
  here = tmp_path / "a"
  assert found == {"before": str(here / before) if before else "tiny", "after": str(here / "round_2/sft")}


@pytest.mark.slow
def test_experiment_runs_in_folders(environment, tmp_path):
  """Each of its runs has one."""
  flags = [flag.replace("--config.", "--config.runs.tiny_stories.") for flag in SMALL]
  command = [sys.executable, "-m", "imm_jax.main", "--config=configs/paper.py:table=7,scale=tiny",
             f"--workdir={tmp_path / 'all'}", *flags, "--config.runs.tiny_stories.rounds=1"]
  of = lambda *more: subprocess.run([*command, *more], cwd=REPO, env=environment, capture_output=True, text=True,
                                    check=False)
  planned = of("--dry_run")
  assert planned.returncode == 0, planned.stderr
  assert "8 of 8 stages to do" in planned.stdout
  assert not (tmp_path / "all").exists()
  done = of()
  assert done.returncode == 0, done.stderr
  assert "table 7 of the paper at tiny scale, run 1 of 1: tiny_stories" in done.stdout
  assert (tmp_path / "all/tiny_stories/round_0/merged/model.safetensors").exists()
  planned = of("--dry_run").stdout
  assert "0 of 8 stages to do" in planned
  assert "by what stages took so far" in planned


def test_runs_start_servers_together_or_not_at_all():
  config = paper.get_config("table=5,scale=tiny")
  config.sampler.kind = "vllm"  # of all runs
  assert {run.sampler.kind for run in config.runs.values()} == {"vllm"}
  experiments.validate(config)
  config.runs.star_tiny_stories.sampler = config.sampler.copy_and_resolve_references()
  config.runs.star_tiny_stories.sampler.kind = "native"
  with pytest.raises(UserError, match="some start vLLM servers"):
    experiments.validate(config)
