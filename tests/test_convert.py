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
from imm_jax.model import decoder, hf, hub, safetensors

torch = pytest.importorskip("torch")

REPO = Path(__file__).parent.parent


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


@pytest.mark.parametrize("kind", ["qwen2-untied", "qwen3", "llama3.1"])
def test_logits_are_compared_with_transformers(checkpoint, kind: str) -> None:
  _, source = checkpoint(kind)
  found = convert.compare_logits(source)
  assert found.max_error < 2e-5
  assert found.kl < 1e-6
  assert found.agreement > 0.99


def test_verify_finds_arithmetic_that_differs(checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
  """A wrong RoPE theta is what ports get wrong most."""
  _, source = checkpoint("llama3")
  convert.verify(source)
  read_config = hf.read_config
  wrong = lambda folder: read_config(folder).__class__(**{**vars(read_config(folder)), "rope_theta": 1e4})
  monkeypatch.setattr(hf, "read_config", wrong)
  with pytest.raises(UserError, match="logits differ from transformers'"):
    convert.verify(source)


def test_verify_finds_errors_that_only_show_late_in_the_context(checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
  """Frequencies of which every other one is off by a unit in the last place."""
  _, source = checkpoint("llama3", head_dim=64, max_position_embeddings=131_072)
  convert.verify(source)
  exact = decoder.rope_frequencies
  monkeypatch.setattr(decoder, "rope_frequencies", lambda config: np.where(
      np.arange(32) % 2, np.nextafter(exact(config), np.float32(2)), exact(config)))
  with pytest.raises(UserError, match="logits differ from transformers'"):
    convert.verify(source)


def test_verify_finds_a_tokenizer_that_is_larger_than_the_embedding(
    checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
  _, source = checkpoint("llama2")
  folder = shutil.copytree(source, tmp_path / "copy")
  rows = hf.read_config(folder).vocab_size
  convert.verify(folder)
  assert "no tokenizer beside the weights" in capsys.readouterr().out
  for ids in (rows, rows + 1):
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": [{"id": 0, "content": "<end>", "special": True, "single_word": False,
                                            "lstrip": False, "rstrip": False, "normalized": False}],
        "model": {"type": "WordLevel", "vocab": {"<end>": 0, **{f"w{i}": i for i in range(1, ids)}},
                  "unk_token": "w1"}}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}))
    if ids == rows:
      convert.verify(folder)
      assert f"the tokenizer's {rows} ids fit the embedding's {rows} rows" in capsys.readouterr().out
    else:
      with pytest.raises(UserError, match=f"ids up to {rows}, the embedding only {rows} rows"):
        convert.verify(folder)


def test_check_bytes_finds_a_tensor_that_comes_back_otherwise(checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
  _, source = checkpoint("qwen2-tied")
  assert hf.check_bytes(source) == (len(safetensors.read(source / "model.safetensors")), [])
  fill = hf._fill

  def wrong(reader, entry, bounds, out):
    fill(reader, entry, bounds, out)
    if out.shape == (24, 48):  # a key projection, or a value's
      out[-1, -1] = np.nextafter(out[-1, -1], 9)

  monkeypatch.setattr(hf, "_fill", wrong)
  with pytest.raises(UserError, match=r"k_proj\.weight' would not come back"):
    hf.check_bytes(source)


def test_what_follows_from_the_rest_is_named_as_left_out(checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
  _, source = checkpoint("qwen2-tied")
  tensors = {name: np.array(x) for name, x in safetensors.read(source / "model.safetensors").items()}
  tensors["model.rotary_emb.inv_freq"] = np.ones(6, np.float32)
  safetensors.write(source / "model.safetensors", [(n, x.dtype, x.shape, lambda x=x: [x]) for n, x in tensors.items()])
  convert.verify(source)
  assert "not written, since they follow from the rest: model.rotary_emb.inv_freq" in capsys.readouterr().out


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
