"""Checkpoint folders in and out, against transformers and the safetensors library."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors as library
import transformers

from imm_jax.errors import UserError
from imm_jax.merging.on_disk import CheckpointSource
from imm_jax.model import checkpoint_folder, hf, safetensors
from tests import TINY

torch = pytest.importorskip("torch")



def _stored(folder: Path) -> dict[str, dict[str, Any]]:
  """Name -> dtype, shape and bytes of all tensors of a folder, as the library reads them."""
  tensors = {}
  for file in sorted(folder.glob("*.safetensors")):
    tensors.update(library.deserialize(file.read_bytes()))
  return tensors


@pytest.mark.parametrize("shard", [None, 20_000], ids=["one-file", "shards"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["qwen2-tied", "llama"])
def test_saving_restores_every_byte(
    checkpoint, tmp_path: Path, kind: str, dtype: torch.dtype, shard: int | None) -> None:
  """A checkpoint that is loaded and saved is the same to the byte."""
  _, folder = checkpoint(kind, dtype=dtype)
  options = {} if shard is None else {"max_shard_bytes": shard}
  first, second = tmp_path / "first", tmp_path / "second"
  hf.save(hf.load(folder)[1], first, like=folder, **options)
  assert _stored(first) == _stored(folder)
  hf.save(hf.load(first)[1], second, like=first, **options)
  files = {f.name: f.read_bytes() for f in first.iterdir()}
  assert files == {f.name: f.read_bytes() for f in second.iterdir()}
  assert sum(name.endswith(".safetensors") for name in files) == 1 if shard is None else len(files) > 4


def test_shard_sizes(checkpoint, tmp_path: Path) -> None:
  """Shards hold at most their size, and the index says where tensors are."""
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


def test_large_tensor_has_its_own_file(checkpoint, tmp_path: Path) -> None:
  """It is larger than a shard."""
  _, folder = checkpoint("llama")
  hf.save(hf.load(folder)[1], tmp_path / "out", max_shard_bytes=1)
  assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(_stored(folder))
  assert _stored(tmp_path / "out") == _stored(folder)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_stored_tied_head_is_written(checkpoint, tmp_path: Path, dtype: torch.dtype | None) -> None:
  """A tied head that is stored, too, is written, too."""
  _, folder = checkpoint("qwen2-tied", dtype=dtype)
  want = hf.load(folder)[1]
  _rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
  loaded = hf.load(folder)[1]
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded, want))
  assert hf.check_round_trip(folder) == (len(_stored(folder)), [])
  hf.save(loaded, tmp_path / "out", like=folder)
  assert _stored(tmp_path / "out") == _stored(folder)
  hf.save(jax.tree.map(lambda x: x.astype(jnp.float32), loaded), tmp_path / "kept", like=folder, keep_dtypes=True)
  assert _stored(tmp_path / "kept") == _stored(folder)


def _rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
  tensors = {name: np.array(x) for name, x in safetensors.read(folder / "model.safetensors").items()}
  change(tensors)
  safetensors.write(folder / "model.safetensors", [(n, x.dtype, x.shape, lambda x=x: [x]) for n, x in tensors.items()])


def test_tied_head_names(checkpoint, tmp_path: Path) -> None:
  """vLLM looks for no other name."""
  model, folder = checkpoint("qwen2-tied", dtype=torch.bfloat16)
  want, before = hf.load(folder)[1], _stored(folder)
  _rewrite(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
  loaded = hf.load(folder)[1]
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded, want))
  assert hf.check_round_trip(folder) == (len(before), [])
  hf.save(jax.tree.map(lambda x: x.astype(jnp.float32), loaded), tmp_path / "out", like=folder, keep_dtypes=True)
  assert _stored(tmp_path / "out") == before
  with CheckpointSource({"stored as the head": folder, "as the embedding": tmp_path / "out"}) as both:
    assert set(both.order) == before.keys()
  read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
  assert all(torch.equal(read.state_dict()[name], x) for name, x in model.state_dict().items())


def test_mixed_dtypes(checkpoint, tmp_path: Path) -> None:
  """Layers of several dtypes are promoted, and written as they were."""
  _, folder = checkpoint("llama", dtype=torch.bfloat16)
  norm, up = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"
  _rewrite(folder, lambda t: t.update({norm: t[norm].astype(np.float32) * np.float32(1.001),
                                       up: t[up].astype(np.float16)}))
  tensors = safetensors.read(folder / "model.safetensors")
  params = hf.load(folder)[1]["layers"]
  for stacked, name in ((params["input_layernorm"]["weight"], "model.layers.{}.input_layernorm.weight"),
                        (params["mlp"]["up_proj"]["weight"], "model.layers.{}.mlp.up_proj.weight")):
    assert stacked.dtype == np.float32
    for i in range(2):
      np.testing.assert_array_equal(stacked[i], tensors[name.format(i)].astype(np.float32))
  assert params["self_attn"]["q_proj"]["weight"].dtype == jnp.bfloat16
  assert hf.check_round_trip(folder) == (len(tensors), [])
  hf.save(hf.load(folder)[1], tmp_path / "out", like=folder, keep_dtypes=True)
  assert _stored(tmp_path / "out") == _stored(folder)


def test_index_may_name_unneeded_tensors(checkpoint, tmp_path: Path) -> None:
  """The index may name what no shard holds and nothing needs."""
  _, source = checkpoint("qwen2-tied")
  want, folder = hf.load(source)[1], tmp_path / "shards"
  hf.save(want, folder, like=source, max_shard_bytes=20_000)
  path = folder / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  shard = index["weight_map"]["model.norm.weight"]
  index["weight_map"] |= {"lm_head.weight": shard, "model.layers.0.self_attn.rotary_emb.inv_freq": shard}
  path.write_text(json.dumps(index))
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), hf.load(folder)[1], want))
  with CheckpointSource({"a": source, "b": folder}) as both:
    assert both.order == [name for name, _ in sorted(checkpoint_folder.read_entries(source).items(),
                                                     key=lambda e: checkpoint_folder.model_order(e[0]))]
  index["weight_map"]["model.extra.weight"] = shard
  path.write_text(json.dumps(index))
  with pytest.raises(UserError, match=r"index.json: disagrees with the shards on model\.extra\.weight; copy"):
    hf.load(folder)


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


def test_side_files_are_copied(tmp_path: Path) -> None:
  """Files of the config and the tokenizer are copied unchanged, and nothing else is."""
  source, out = tmp_path / "source", tmp_path / "out"
  shutil.copytree(TINY, source)
  (source / "additional_chat_templates").mkdir()
  extra = {"merges.txt": b"#version\r\na b\r\n", "vocab.json": b"{}", "chat_template.jinja": "é {{x}}".encode(),
           "additional_chat_templates/tool_use.jinja": b"{{x}}"}
  for name, content in {**extra, "optimizer.pt": b"x", "README.md": b"x"}.items():
    (source / name).write_bytes(content)
  hf.save(hf.load(source)[1], out, like=source)
  copied = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", *extra)
  assert {str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()} == {"model.safetensors", *copied}
  before = checkpoint_folder.digest(out)
  (out / "additional_chat_templates/tool_use.jinja").write_text("{{y}}")
  assert checkpoint_folder.digest(out) != before
  (out / "additional_chat_templates/tool_use.jinja").write_text("{{x}}")
  assert all((out / name).read_bytes() == (source / name).read_bytes() for name in copied)


def test_stacking_order(checkpoint) -> None:
  """Layers are stacked in order, and `place` is asked for every parameter."""
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
