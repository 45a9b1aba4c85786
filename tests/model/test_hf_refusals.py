"""What is no whole checkpoint folder, or does not fit its config.json, is refused in one line that names it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy as library_numpy

from imm_jax.errors import UserError
from imm_jax.model import hf

torch = pytest.importorskip("torch")

Q0, UP1 = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"


def _edit(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
  tensors = library_numpy.load_file(folder / "model.safetensors")
  change(tensors)
  library_numpy.save_file(tensors, folder / "model.safetensors")


def _rename(tensors: dict[str, np.ndarray], prefix: str) -> None:
  for name in list(tensors):
    tensors[prefix + name] = tensors.pop(name)


def _refusal(folder: Path) -> str:
  """The one line with which loading or checking this folder is refused."""
  with pytest.raises(UserError) as error:
    hf.load(folder)
  with pytest.raises(UserError) as checked:
    hf.check_folder(folder)
  assert str(checked.value) == str(error.value)
  assert "\n" not in str(error.value)
  assert str(error.value).startswith(str(folder))
  return str(error.value)


def test_stored_tied_head_must_be_equal(checkpoint) -> None:
  """A tied head that is stored, too, must equal the embedding."""
  _, folder = checkpoint("qwen2-tied")
  _edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
  message = _refusal(folder)
  assert "lm_head.weight differs" in message
  assert '"tie_word_embeddings": false' in message
  _edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].astype(np.float16)}))
  assert "lm_head.weight is float16 (61, 48) and model.embed_tokens.weight float32 (61, 48)" in _refusal(folder)
  _edit(folder, lambda t: [t.pop("lm_head.weight"), t.pop("model.embed_tokens.weight")])
  assert "missing model.embed_tokens.weight" in _refusal(folder)


def test_old_rotary_frequencies_are_ignored(checkpoint) -> None:
  """Rotary frequencies in old checkpoints are ignored where they stand."""
  _, folder = checkpoint("llama")
  _edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
                                    "model.rotary_emb.inv_freq": np.ones(4, np.float32)}))
  assert hf.check_round_trip(folder).left_out == [
      "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
  _edit(folder, lambda t: t.update({"foo.rotary_emb.inv_freq": np.ones(4, np.float32)}))
  assert "unknown foo.rotary_emb.inv_freq" in _refusal(folder)


def test_missing_files_are_named(checkpoint, tmp_path: Path) -> None:
  assert "no such checkpoint folder" in _refusal(tmp_path / "nowhere")
  _, folder = checkpoint("llama")
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  (folder / "pytorch_model.bin").unlink()
  for name in ("consolidated.00.pth", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin"):
    (folder / name).write_bytes(b"x")
    assert f"pickle checkpoint ({name})" in _refusal(folder)
    (folder / name).unlink()
  for name in ("training_args.bin", "scheduler.pth"):  # what a trainer leaves beside is no checkpoint
    (folder / name).write_bytes(b"x")
  assert "model.safetensors: missing" in _refusal(folder)
  for name, words in (("x.gguf", "found only weights in GGUF (x.gguf)"), ("model.fp16.safetensors", "a name that is"),
                      ("consolidated.safetensors", "another form"), ("model-00001-of-00002.safetensors", "shards (")):
    (folder / name).write_bytes(b"x")
    assert words in _refusal(folder)
    (folder / name).unlink()
  (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
  assert f"is a LoRA adapter of org/base, not a whole model; give org/base+{folder}" in _refusal(folder)
  (folder / "adapter_config.json").unlink()
  (folder / "config.json").unlink()
  assert "config.json: missing; expected a checkpoint folder" in _refusal(folder)
  (folder / "x.gguf").write_bytes(b"x")
  assert "config.json: missing; found only weights in GGUF (x.gguf)" in _refusal(folder)


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.pop(Q0), [f"missing {Q0}"]),
    (lambda t: t.update({"model.extra.weight": np.ones(2, np.float32)}), ["unknown model.extra.weight"]),
    (lambda t: t.update({UP1: t[UP1].T.copy()}), [UP1, "(48, 80)", "(80, 48)"]),
    (lambda t: t.update({UP1: t[UP1][0]}), [UP1, "(48,)", "(80, 48)"]),
    (lambda t: t.update({Q0: t[Q0].astype(np.int32)}), [Q0, "int32"]),
    (lambda t: t.update({Q0: t[Q0].astype(np.float64)}), [Q0, "float64", "float32"]),
    (lambda t: (t.pop(Q0), t.pop("lm_head.weight")), [f"missing {Q0}", "missing lm_head.weight"]),
    (lambda t: _rename(t, "_orig_mod."), ["names of its tensors begin with '_orig_mod.model.' where 'model.' is"]),
    (lambda t: _rename(t, "language_model."), ["begin with 'language_model.model.' where"]),
    (lambda t: [t.update({n.removeprefix("model."): t.pop(n)}) for n in list(t)], ["lack a prefix where 'model.' is"]),
    (lambda t: t.update({Q0.replace(".weight", ".qweight"): t.pop(Q0)}), ["q_proj.qweight says that its weights are"]),
], ids=["missing", "unknown", "transposed", "too-few-axes", "integers", "float64", "all-problems", "compiled",
        "of-another", "inner", "gptq"])
def test_misfitting_tensors_are_named(
    checkpoint, change: Callable[[dict[str, np.ndarray]], Any], words: list[str]) -> None:
  """They do not fit the config."""
  _, folder = checkpoint("llama")
  _edit(folder, change)
  message = _refusal(folder)
  assert all(word in message for word in words), message


def test_a_long_list_of_problems_is_cut(checkpoint) -> None:
  _, folder = checkpoint("llama", num_hidden_layers=7)
  _edit(folder, lambda t: [t.pop(name) for name in list(t) if "layers" in name])
  message = _refusal(folder)
  assert message.endswith(f" and {7 * 9 - 50} more")
  assert message.count("missing model.layers.") == 50


@pytest.mark.parametrize(("damage", "words"), [
    (lambda b: b[:-1], "truncated"),
    (lambda b: b[:len(b) // 2], "truncated"),
    (lambda b: b[:100], "not a whole safetensors file"),
    (lambda b: b[:5], "not a whole safetensors file"),
    (lambda b: b"", "not a whole safetensors file"),
    (lambda b: b[:8] + b"x" + b[9:], "header is damaged"),
    (lambda b: b[:9] + b"\xff" + b[10:], "header is damaged"),
    (lambda b: b"\x02" + bytes(7) + b"[]", "header is damaged"),
    (lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run `git lfs pull`"),
], ids=["last-byte", "half", "in-header", "in-prefix", "empty", "not-json", "not-utf8", "not-an-object", "lfs-pointer"])
def test_a_damaged_file_is_named(checkpoint, damage: Callable[[bytes], bytes], words: str) -> None:
  _, folder = checkpoint("llama")
  file = folder / "model.safetensors"
  file.write_bytes(damage(file.read_bytes()))
  message = _refusal(folder)
  assert message.startswith(str(file))
  assert words in message


def test_damaged_shards_and_indices_are_named(checkpoint, tmp_path: Path) -> None:
  _, source = checkpoint("llama")
  folder = tmp_path / "sharded"
  hf.save(hf.load(source)[1], folder, like=source, max_shard_bytes=20_000)
  index, shard = folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))[1]
  whole = shard.read_bytes()
  shard.unlink()
  assert str(shard) in _refusal(folder)
  shard.write_bytes(whole[:-1])
  assert f"{shard}: truncated" in _refusal(folder)
  # A shard that holds another one's tensors.
  shutil.copyfile(sorted(folder.glob("*.safetensors"))[0], shard)
  assert "is also in" in _refusal(folder)
  first, *_ = weight_map = json.loads(index.read_text())["weight_map"]
  twice = json.dumps({"weight_map": weight_map}).replace(f'"{first}"', f'"{first}": "x", "{first}"', 1)
  for text in (twice, "{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}',
               '{"weight_map": {"a": ["b"]}}'):
    index.write_text(text)
    assert _refusal(folder).startswith(str(index))


def test_single_file_beside_shards_is_refused(checkpoint, tmp_path: Path) -> None:
  """transformers would read the file, others the shards."""
  _, source = checkpoint("llama")
  params, folder = hf.load(source)[1], tmp_path / "both"
  hf.save(params, folder, like=source, max_shard_bytes=20_000)
  before = sorted(folder.iterdir())
  for options in ({}, {"max_shard_bytes": 20_000}):
    with pytest.raises(UserError, match=r"both: holds model.* already; give a new folder"):
      hf.save(params, folder, like=source, **options)
  assert sorted(folder.iterdir()) == before
  shutil.copyfile(source / "model.safetensors", folder / "model.safetensors")
  message = _refusal(folder)
  assert "both model.safetensors and model.safetensors.index.json" in message
  assert "remove the one" in message


def test_an_index_of_a_single_file_is_read(checkpoint) -> None:
  _, folder = checkpoint("llama")
  names = library_numpy.load_file(folder / "model.safetensors")
  config, expected = hf.load(folder)
  index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  assert hf.load(folder)[0] == config
  jax.tree.map(np.testing.assert_array_equal, hf.load(folder)[1], expected)
