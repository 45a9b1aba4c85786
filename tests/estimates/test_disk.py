"""What a run is said to take of the disk, against sizes counted by hand; `runs.test_loop` compares with a run."""

import shutil
from pathlib import Path

import pytest

from configs import tiny
from imm_jax.estimates import disk
from imm_jax.estimates.shapes import Expected
from imm_jax.model import hf
from imm_jax.model.decoder import count_params
from tests import TINY

MODEL = hf.read_config(TINY)
COUNT = count_params(MODEL)
EXPECTED = Expected(8, "blockwise", 44, 35.0, 28.0)


def test_checkpoints_and_states_by_hand():
  config = tiny.get_config()
  config.task.questions_per_round, config.sft.save_interval, config.merge.sweep = 400, 10, (0.2, 0.6)
  whole = sum((TINY / name).stat().st_size for name in ("model.safetensors", "config.json", "generation_config.json",
                                                        "tokenizer.json", "tokenizer_config.json"))
  found = disk.estimate(config, MODEL, EXPECTED, TINY)
  # Of each round the tuned, the merged, and two of the sweep; two states stand while a third is written.
  assert (found.num_checkpoints, found.checkpoint, found.models) == (3 * 4, whole, 3 * 4 * whole)
  assert (found.state, found.num_states) == (12 * COUNT, 3)
  assert found.final - found.models - found.answers == pytest.approx(5e5)
  assert found.peak == pytest.approx(found.final - 4 * whole + 3 * 12 * COUNT)
  config.sft.ema, config.sft.stop_share, config.sft.intervention = True, 0.1, "weight_masking"
  config.sft.save_interval, config.sft.export = 10_000, "float32"
  found = disk.estimate(config, MODEL, EXPECTED)  # of a base that is not here
  assert (found.state, found.num_states) == ((12 + 4 + 8 + 1) * COUNT, 1)
  assert found.models == 3 * (2 * 4 * COUNT + 3 * 2 * COUNT)
  config.sft.state_dir = "gs://bucket/states"
  assert disk.estimate(config, MODEL, EXPECTED).peak == disk.estimate(config, MODEL, EXPECTED).final


def test_line_gives_free_space_and_states(tmp_path: Path):
  """A line says how much is free and where training states are."""
  config = tiny.get_config()
  assert " free\n  up to 1 training state of 9.9 MiB during" in disk.describe(
      config, MODEL, EXPECTED, tmp_path / "yet/to/be", TINY)
  config.sft.state_dir = "/scratch"
  assert disk.describe(config, MODEL, EXPECTED, tmp_path).endswith(" during SFT, in /scratch")


def test_scarce_space_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  """What the run has written already is no longer needed."""
  config = tiny.get_config()
  peak = disk.estimate(config, MODEL, EXPECTED).peak
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(peak) - 1000))
  warning = f"warning: more than is free for {tmp_path}"
  assert disk.describe(config, MODEL, EXPECTED, tmp_path).endswith(warning)
  (tmp_path / "written").write_bytes(b"x" * 2000)
  assert warning not in disk.describe(config, MODEL, EXPECTED, tmp_path)
