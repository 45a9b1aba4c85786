"""Checkpoint folders in and out, against transformers and the safetensors library."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors as library
import transformers

from imm_jax.model import hf, hub, safetensors

torch = pytest.importorskip("torch")

TINY = hub.resolve("tiny")


def _stored(folder: Path) -> dict[str, dict[str, Any]]:
  """Name -> dtype, shape and bytes of all tensors of a folder, as the library reads them."""
  tensors = {}
  for file in sorted(folder.glob("*.safetensors")):
    tensors.update(library.deserialize(file.read_bytes()))
  return tensors


@pytest.mark.parametrize("shard", [None, 20_000], ids=["one-file", "shards"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["qwen2-tied", "llama"])
def test_a_loaded_and_saved_checkpoint_is_the_same_to_the_byte(
    checkpoint, tmp_path: Path, kind: str, dtype: torch.dtype, shard: int | None) -> None:
  _, folder = checkpoint(kind, dtype=dtype)
  options = {} if shard is None else {"max_shard_bytes": shard}
  first, second = tmp_path / "first", tmp_path / "second"
  hf.save(hf.load(folder)[1], first, like=folder, **options)
  assert _stored(first) == _stored(folder)
  hf.save(hf.load(first)[1], second, like=first, **options)
  files = {f.name: f.read_bytes() for f in first.iterdir()}
  assert files == {f.name: f.read_bytes() for f in second.iterdir()}
  assert sum(name.endswith(".safetensors") for name in files) == 1 if shard is None else len(files) > 4


def test_shards_hold_at_most_their_size_and_the_index_says_where_tensors_are(checkpoint, tmp_path: Path) -> None:
  _, folder = checkpoint("qwen2-untied")
  hf.save(hf.load(folder)[1], tmp_path / "out", max_shard_bytes=20_000)
  index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
  weight_map, total = {}, 0
  for file in sorted((tmp_path / "out").glob("*.safetensors")):
    sizes = {name: len(t["data"]) for name, t in library.deserialize(file.read_bytes())}
    assert sum(sizes.values()) <= 20_000
    weight_map.update(dict.fromkeys(sizes, file.name))
    total += sum(sizes.values())
  assert index == {"metadata": {"total_size": total}, "weight_map": weight_map}
  assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_tensor_larger_than_a_shard_has_its_own_file(checkpoint, tmp_path: Path) -> None:
  _, folder = checkpoint("llama")
  hf.save(hf.load(folder)[1], tmp_path / "out", max_shard_bytes=1)
  assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(_stored(folder))
  assert _stored(tmp_path / "out") == _stored(folder)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_tied_head_that_is_stored_too_is_written_too(checkpoint, tmp_path: Path, dtype: torch.dtype | None) -> None:
  _, folder = checkpoint("qwen2-tied", dtype=dtype)
  want = hf.load(folder)[1]
  tensors = {name: np.array(x) for name, x in safetensors.read(folder / "model.safetensors").items()}
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  safetensors.write(folder / "model.safetensors", [(n, x.dtype, x.shape, lambda x=x: [x]) for n, x in tensors.items()])
  loaded = hf.load(folder)[1]
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded, want))
  assert hf.check_bytes(folder) == (len(tensors), [])
  hf.save(loaded, tmp_path / "out", like=folder)
  assert _stored(tmp_path / "out") == _stored(folder)
  hf.save(jax.tree.map(lambda x: x.astype(jnp.float32), loaded), tmp_path / "kept", like=folder, keep_dtypes=True)
  assert _stored(tmp_path / "kept") == _stored(folder)


@pytest.mark.parametrize("kind", ["qwen2-tied", "llama"])
def test_transformers_loads_saved_shards(checkpoint, tmp_path: Path, kind: str) -> None:
  model, folder = checkpoint(kind)
  hf.save(hf.load(folder)[1], tmp_path / "out", like=folder, max_shard_bytes=20_000)
  loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / "out", dtype=torch.float32, output_loading_info=True)
  assert not report["missing_keys"]
  assert not report["unexpected_keys"]
  want, got = model.state_dict(), loaded.state_dict()
  assert got.keys() == want.keys()
  assert all(torch.equal(got[name], want[name]) for name in want)


def test_config_and_tokenizer_files_are_copied_unchanged_and_nothing_else(tmp_path: Path) -> None:
  source, out = tmp_path / "source", tmp_path / "out"
  shutil.copytree(TINY, source)
  extra = {"merges.txt": b"#version\r\na b\r\n", "vocab.json": b"{}", "chat_template.jinja": "é {{x}}".encode()}
  for name, content in {**extra, "optimizer.pt": b"x", "README.md": b"x"}.items():
    (source / name).write_bytes(content)
  hf.save(hf.load(source)[1], out, like=source)
  copied = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", *extra)
  assert {f.name for f in out.iterdir()} == {"model.safetensors", *copied}
  assert all((out / name).read_bytes() == (source / name).read_bytes() for name in copied)


def test_layers_are_stacked_in_order_and_place_is_asked_for_every_parameter(checkpoint) -> None:
  model, folder = checkpoint("llama")
  seen, device = {}, jax.sharding.SingleDeviceSharding(jax.devices()[0])
  _, params = hf.load(folder, place=lambda path, shape: seen.setdefault(path, shape) and device)
  state = model.state_dict()
  for i in range(2):
    want = state[f"model.layers.{i}.mlp.down_proj.weight"].numpy()
    np.testing.assert_array_equal(params["layers"]["mlp"]["down_proj"]["weight"][i], want)
  assert len(seen) == len(jax.tree.leaves(params)) == 12
  assert seen["lm_head.weight"] == params["lm_head"]["weight"].shape


def test_dtype_converts_every_tensor(checkpoint) -> None:
  _, folder = checkpoint("qwen2-tied")
  stored, converted = hf.load(folder)[1], hf.load(folder, dtype=jnp.bfloat16)[1]
  for a, b in zip(jax.tree.leaves(stored), jax.tree.leaves(converted), strict=True):
    assert b.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(a).astype(ml_dtypes.bfloat16), np.asarray(b))
