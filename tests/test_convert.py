"""Conversion between HF and orbax, and the checks of `--verify`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from imm_jax import convert
from imm_jax.errors import UserError
from imm_jax.model import hf, hub, safetensors
from tests import REPO

torch = pytest.importorskip("torch")



@pytest.mark.parametrize("kind", ["qwen2-tied", "qwen3", "llama3.1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_orbax_and_back_gives_every_byte(checkpoint, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
  _, source = checkpoint(kind, dtype=dtype)
  convert.to_orbax(source, tmp_path / "orbax")
  convert.from_orbax(tmp_path / "orbax", tmp_path / "back")
  before, after = (safetensors.read(f / "model.safetensors") for f in (source, tmp_path / "back"))
  assert before.keys() == after.keys()
  assert all(before[name].tobytes() == after[name].tobytes() for name in before)
  assert (tmp_path / "back/config.json").read_bytes() == (source / "config.json").read_bytes()


def test_check_bytes_finds_changes(checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
  """A tensor that comes back otherwise is found."""
  _, source = checkpoint("qwen2-tied")
  assert hf.check_round_trip(source) == (len(safetensors.read(source / "model.safetensors")), [])
  fill = hf._read_into

  def wrong(reader, entry, bounds, out):
    fill(reader, entry, bounds, out)
    if out.shape == (24, 48):  # a key projection, or a value's
      out[-1, -1] = np.nextafter(out[-1, -1], 9)

  monkeypatch.setattr(hf, "_read_into", wrong)
  with pytest.raises(UserError, match=r"k_proj\.weight' would not come back"):
    hf.check_round_trip(source)


def test_what_is_no_orbax_checkpoint_is_named(tmp_path: Path) -> None:
  with pytest.raises(UserError, match="expected params/"):
    convert.from_orbax(tmp_path, tmp_path / "out")
  convert.to_orbax(hub.resolve("tiny"), tmp_path / "orbax")
  config = json.loads((tmp_path / "orbax/hf/config.json").read_text())
  (tmp_path / "orbax/hf/config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
  with pytest.raises(UserError, match="is no orbax checkpoint of what"):
    convert.from_orbax(tmp_path / "orbax", tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_a_damaged_orbax_checkpoint_is_one_line(tmp_path: Path) -> None:
  """In a process of its own: orbax leaves coroutines behind that nobody awaits."""
  convert.to_orbax(hub.resolve("tiny"), tmp_path / "orbax")
  shutil.rmtree(tmp_path / "orbax/params/d")
  done = subprocess.run([sys.executable, "-m", "imm_jax.convert", f"--source={tmp_path / 'orbax'}", "--to=hf",
                         f"--out={tmp_path / 'out'}"], cwd=REPO, capture_output=True, text=True, check=False)
  assert done.returncode == 1, done.stderr
  assert [line for line in done.stderr.splitlines() if line.startswith("error: ") and "is no orbax checkpoint" in line]
  assert "Traceback" not in done.stderr
  assert not (tmp_path / "out").exists()
