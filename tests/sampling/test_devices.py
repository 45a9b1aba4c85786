"""Checkpoints and the sampler on one, two and eight devices; as a program this file runs on eight."""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from imm_jax.model import hf, hub, safetensors, sharding
from imm_jax.sampling import Prompt
from imm_jax.sampling.native import NativeSampler, sampler as native

CONFIG = {"model_type": "llama", "hidden_act": "silu", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
          "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4,
          "rms_norm_eps": 1e-5, "rope_theta": 1e4}
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
CASES = [f"{dtype}-{'tied' if tied else 'untied'}" for dtype in DTYPES for tied in (True, False)]
MESHES = {"1": (1, 1, 1), "2": (1, 2, 1), "8": (1, 8, 1), "2x2x2": (2, 2, 2)}
SAMPLING = {"1": (1, 1, 1), "4x2": (4, 2, 1), "1x8": (1, 8, 1)}
PROMPTS = [Prompt(str(i), f"Tom has {i} apples and buys {i + 2} more.") for i in range(11)]


def _mesh(*sizes: int, first: int = 0) -> jax.sharding.Mesh:
  return jax.make_mesh(sizes, sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3,
                       devices=jax.devices()[first:first + int(np.prod(sizes))])


def _write(folder: Path, dtype: np.dtype, tied: bool) -> None:
  rng = np.random.default_rng(0)
  sizes = {"model.embed_tokens.weight": (64, 32), "model.norm.weight": (32,)}
  sizes |= {} if tied else {"lm_head.weight": (64, 32)}
  for i in range(3):
    sizes |= {f"model.layers.{i}.{name}.weight": size for name, size in {
        "input_layernorm": (32,), "post_attention_layernorm": (32,), "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (32, 32), "self_attn.v_proj": (32, 32), "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)}.items()}
  folder.mkdir(parents=True)
  safetensors.write(folder / "model.safetensors", [
      (name, dtype, size, lambda size=size: [rng.normal(size=size).astype(dtype)]) for name, size in sizes.items()])
  (folder / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": tied}))
  (folder / "tokenizer.json").write_text("{}\r\n")


def _stored(folder: Path) -> dict[str, np.ndarray]:
  return {name: x for file in folder.glob("*.safetensors") for name, x in safetensors.read(file).items()}


def _main(out: Path) -> None:
  """Runs on eight devices."""
  results: dict[str, Any] = {"read": {}, "texts": {}, "cache": {}, "devices": {}}
  fill, read = hf._read_into, []
  hf._read_into = lambda reader, entry, bounds, part: read.append(part.size) or fill(reader, entry, bounds, part)
  for case in CASES:
    dtype, tied = case.split("-")
    _write(out / case, DTYPES[dtype], tied == "tied")
    for name, sizes in MESHES.items():
      read.clear()
      _, params = hf.load(out / case, place=functools.partial(sharding.param_sharding, _mesh(*sizes)))
      results["read"][f"{case}/{name}"] = [sum(read), sum(leaf.size for leaf in jax.tree.leaves(params))]
      hf.save(params, out / f"{case}-{name}", like=out / case, max_shard_bytes=8000 if name == "8" else 10**9)
      # As after training: float32 in memory, written as it was stored.
      if dtype != "float16" and name != "1":
        place = functools.partial(sharding.param_sharding, _mesh(*sizes))
        _, params = hf.load(out / case, dtype=np.float32, place=place)
        hf.save(params, out / f"{case}-{name}-trained", like=out / case, keep_dtypes=True)
  decode, shapes = native.decode.decode, set()
  native.decode.decode = lambda params, prefix, state, *rest, **options: (
      shapes.add(state["caches"][0][0].addressable_shards[0].data.shape)
      or decode(params, prefix, state, *rest, **options))
  for name, sizes in SAMPLING.items():
    shapes.clear()
    sampler = NativeSampler(hub.resolve("tiny"), compute_dtype="float32", batch_size=8,
                            mesh=_mesh(*sizes, first=3 if name == "1" else 0))
    results["devices"][name] = sorted(device.id for device in jax.tree.leaves(sampler._params)[0].devices())
    done = sampler.generate(PROMPTS, max_new_tokens=24, num_samples=2, temperatures=(0.0, 2.0))
    results["texts"][name] = [[c.text for c in row] for row in done]
    results["cache"][name] = sorted(shapes)
  (out / "seen.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, run_on_devices: Callable[..., None]) -> Path:
  folder = tmp_path_factory.mktemp("devices")
  (folder / "stderr").write_text(run_on_devices(__file__, folder))
  return folder


@pytest.mark.full
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_any_mesh_restores_every_byte(out: Path, case: str, mesh: str) -> None:
  """A checkpoint comes back byte for byte from any mesh."""
  saved = [out / f"{case}-{mesh}", *out.glob(f"{case}-{mesh}-trained")]
  assert len(saved) == 1 + (mesh != "1" and not case.startswith("float16"))
  expected = _stored(out / case)
  for folder in saved:
    for name in ("config.json", "tokenizer.json"):
      assert (folder / name).read_bytes() == (out / case / name).read_bytes()
    actual = _stored(folder)
    assert actual.keys() == expected.keys()
    for tensor in expected:
      assert actual[tensor].dtype == expected[tensor].dtype
      assert actual[tensor].tobytes() == expected[tensor].tobytes(), tensor
  assert (len(list(saved[0].glob("*.safetensors"))) > 3) == (mesh == "8")


@pytest.mark.full
@pytest.mark.parametrize("mesh", MESHES)
def test_every_entry_is_read_once_on_every_mesh(seen: dict[str, Any], mesh: str) -> None:
  for case in CASES:
    read, size = seen["read"][f"{case}/{mesh}"]
    assert read == size


@pytest.mark.full
@pytest.mark.parametrize("mesh", ["4x2", "1x8"])
def test_texts_do_not_depend_on_the_mesh(seen: dict[str, Any], mesh: str) -> None:
  assert len({text for row in seen["texts"]["1"] for text in row}) > len(PROMPTS)
  assert seen["texts"][mesh] == seen["texts"]["1"]
  assert seen["devices"]["1"] == [3]


@pytest.mark.full
def test_the_cache_is_split_like_the_model(seen: dict[str, Any]) -> None:
  """Splits two key/value heads over two devices and eight rows over the rest."""
  whole = {tuple(shape[:2]) for shape in seen["cache"]["1"]}
  assert whole == {(8, 2)}
  assert {tuple(shape[:2]) for shape in seen["cache"]["4x2"]} == {(2, 1)}
  assert {tuple(shape[:2]) for shape in seen["cache"]["1x8"]} == {(2, 1)}


@pytest.mark.full
def test_xla_does_not_rematerialize_arrays(out: Path) -> None:
  """XLA warns if a sharding forces it to replicate an array."""
  assert "rematerialization" not in (out / "stderr").read_text()


if __name__ == "__main__":
  _main(Path(sys.argv[1]))
