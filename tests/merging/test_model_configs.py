"""What config.json says of the inputs, of models of several parts too, and what it says of the output."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from imm_jax import errors, merging
from imm_jax.errors import UserError
from imm_jax.merging.model_configs import check_compatible
from tests.merge_folders import read
from tests.merging.recipe_models import merged, save, source

TEXT = {"model_type": "gemma3_text", "num_hidden_layers": 4, "num_attention_heads": 4, "rope_theta": 1e6,
        "layer_types": ["a", "b", "c", "d"]}
VISION = {"model_type": "siglip", "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
TOWERS = {"language_model.model.embed_tokens.weight": (5, 2), "language_model.model.norm.weight": (2,),
          **{f"language_model.model.layers.{i}.up_proj.weight": (3, 2) for i in range(4)},
          **{f"vision_tower.encoder.layers.{i}.up_proj.weight": (3, 2) for i in range(2)}}


def parts(folder: Path, seed: int, shapes=TOWERS, text=None, vision=None, **top) -> Path:
  """A model with a config for each of its parts."""
  save(folder, seed, shapes)
  (folder / "config.json").write_text(json.dumps({
      "model_type": "gemma3", "text_config": {**TEXT, **(text or {})}, "vision_config": {**VISION, **(vision or {})},
      **top}))
  return folder


def linear(*folders: Path, weights=(1, 1), **more) -> dict:
  return {"merge_method": "linear", **more, "models": [{"model": str(folder), "parameters": {"weight": weight}}
                                                       for folder, weight in zip(folders, weights, strict=True)]}


@pytest.mark.parametrize(("change", "expected"), [
    ({"text": {"num_attention_heads": 2}}, "has num_attention_heads=2 in config.json"),
    ({"text": {"num_hidden_layers": 3}}, "has num_hidden_layers=3 in config.json"),
    ({"vision": {"hidden_act": "relu"}}, "has vision_config.hidden_act='relu' in config.json"),
    ({"vision": {"quantization_config": {"bits": 4}}}, "has vision_config.quantization_config in config.json")])
def test_configs_of_parts_are_compared(change: dict, expected: str, tmp_path: Path):
  a, b = parts(tmp_path / "a", 0), parts(tmp_path / "b", 1, **change)
  with pytest.raises(UserError) as error:
    merged(tmp_path, linear(a, b))
  assert f"models[1] ({b}) {expected}" in str(error.value)


def test_tolerable_differences_of_parts_are_said(tmp_path: Path, capsys: pytest.CaptureFixture):
  a, b = parts(tmp_path / "a", 0), parts(tmp_path / "b", 1, text={"rope_theta": 1e4, "sliding_window": None})
  flat = parts(tmp_path / "flat", 2)  # as other versions of transformers write it
  config = json.loads((flat / "config.json").read_text())
  text = {key: value for key, value in config.pop("text_config").items() if key != "model_type"}
  (flat / "config.json").write_text(json.dumps({**text, **config, "num_attention_heads": 4}))
  merged(tmp_path, linear(a, b, flat, weights=(1, 1, 1)))
  notes = capsys.readouterr().err
  assert "models[1] has other rotary embeddings in config.json than models[0]" in notes
  assert "models[2]" not in notes


@pytest.mark.parametrize("key", ["num_attention_heads", "encoder_attention_heads", "n_head", "n_heads", "num_heads",
                                 "num_kv_heads", "kv_n_heads", "v_head_dim", "activation_function", "hidden_act",
                                 "feed_forward_proj", "num_local_experts", "num_decoder_layers", "n_layers"])
def test_families_name_incompatible_keys_apart(key: str, tmp_path: Path):
  """A mean must not mix models of other heads or experts, whatever a family calls their number."""
  a, b = (save(tmp_path / name, i, **{key: value}) for i, (name, value) in enumerate((("a", 4), ("b", 2))))
  with pytest.raises(UserError, match=f"has {key}=2 in config.json, models"):
    merged(tmp_path, linear(a, b))


@pytest.mark.parametrize(("a", "b", "expected"), [
    ({"norm_eps": 1e-5}, {"norm_eps": 1e-2}, "models[1] has norm_eps=0.01 in config.json, models[0] 1e-05"),
    ({"layernorm_epsilon": 1}, {"layernorm_epsilon": 2}, "models[1] has layernorm_epsilon=2"),
    ({"rotary_dim": 4}, {"rotary_dim": 8}, "models[1] has rotary_dim=8"),
    ({"rope_local_base_freq": 1e4}, {"rope_local_base_freq": 1e5}, "models[1] has rope_local_base_freq=100000.0"),
    ({"rotary_pct": 0.25}, {"rope_parameters": {"partial_rotary_factor": 0.25}}, ""),
    ({"rotary_pct": 0.25}, {"rotary_pct": 1.0}, "models[1] has other rotary embeddings"),
    ({"rotary_pct": 0.25}, {"partial_rotary_factor": 0.5}, "models[1] has other rotary embeddings"),
    ({"rope_theta": 1e4}, {"rope_theta": None, "rotary_emb_base": 1e6}, "models[1] has other rotary embeddings"),
    ({"layer_types": ["a", "b"]}, {"layer_types": ["b", "a"]}, "models[1] has other layer_types in config.json"),
    ({"mlp_only_layers": [1]}, {"mlp_only_layers": [2]}, "models[1] has other mlp_only_layers in config.json"),
    ({"steps": 1}, {"steps": 2}, "")],
    ids=["norm-eps", "layernorm-epsilon", "rotary-dim", "local-base", "equal-share", "other-pct", "other-factor",
         "other-theta", "layer-types", "mlp-only-layers", "training-steps"])
def test_differing_keys_are_noted(a: dict, b: dict, expected: str, tmp_path: Path, capsys):
  """What may differ is noted whatever a family calls it."""
  errors.print_once.cache_clear()
  check_compatible({f"models[{i}]": save(tmp_path / str(i), i, **config) for i, config in enumerate((a, b))})
  notes = capsys.readouterr().err
  assert expected in notes if expected else "note" not in notes


def test_lists_go_over_the_layers_of_each_stack(tmp_path: Path):
  folder = parts(tmp_path / "a", 0)
  tree = read(folder)
  got = merged(tmp_path, linear(folder, weights=([0.0, 1.0],), parameters={"normalize": False}))
  for stack, count in (("language_model.model.layers", 4), ("vision_tower.encoder.layers", 2)):
    for i in range(count):
      name = f"{stack}.{i}.up_proj.weight"
      np.testing.assert_allclose(got[name], tree[name] * (i / (count - 1)), rtol=1e-6)
  zeros, ones = ({name: np.full_like(x, v) for name, x in tree.items()} for v in (0, 1))
  scaled = merging.lines(zeros, [ones], weights=1, alpha=0.0, beta=1.0)
  assert scaled["vision_tower.encoder.layers.1.up_proj.weight"][0, 0] == 1
  assert scaled["language_model.model.layers.1.up_proj.weight"][0, 0] == np.float32(1 / 3)


def test_importance_is_of_one_stack():
  tree = {name: np.zeros(shape, np.float32) for name, shape in TOWERS.items()}
  with pytest.raises(ValueError, match="importance: the names have several stacks of layers"):
    merging.iimm(tree, tree, tree, base_weight=0.5, drop_rate=0.0, importance=[1.0] * 4, key=jax.random.key(0))


def passthrough(*ranges: tuple[Path, list[int]]) -> dict:
  return {"merge_method": "passthrough", "slices": [{"sources": [source(*pair)]} for pair in ranges]}


def test_slices_of_several_stacks_are_refused(tmp_path: Path):
  a, b = parts(tmp_path / "a", 0), parts(tmp_path / "b", 1)
  with pytest.raises(UserError, match=r"several stacks of layers \(language_model\.model\.layers, vision_tower"):
    merged(tmp_path, passthrough((a, [0, 3]), (b, [1, 4])))


def test_slices_edit_the_nested_text_config(tmp_path: Path):
  text_only = {name: shape for name, shape in TOWERS.items() if not name.startswith("vision")}
  a, b = (parts(tmp_path / name, i, text_only) for i, name in enumerate("ab"))
  merged(tmp_path, passthrough((a, [0, 3]), (b, [1, 4])))
  config = json.loads((tmp_path / "out/config.json").read_text())
  assert config["text_config"]["num_hidden_layers"] == 6
  assert config["text_config"]["layer_types"] == ["a", "b", "c", "b", "c", "d"]
  assert "num_hidden_layers" not in config
  assert config["vision_config"] == VISION


def test_last_slice_gives_the_tail(tmp_path: Path):
  """What follows the layers is the last slice's, in any family."""
  shapes = {"gpt_neox.embed_in.weight": (5, 2), "embed_out.weight": (5, 2), "gpt_neox.final_layer_norm.weight": (2,),
            **{f"gpt_neox.layers.{i}.w": (2, 2) for i in range(2)}}
  a, b = (save(tmp_path / name, i, shapes, num_hidden_layers=2, layer_types=None) for i, name in enumerate("ab"))
  got = merged(tmp_path, passthrough((a, [0, 2]), (b, [0, 2])))
  first, last = read(a), read(b)
  np.testing.assert_array_equal(got["gpt_neox.embed_in.weight"], first["gpt_neox.embed_in.weight"])
  for name in ("embed_out.weight", "gpt_neox.final_layer_norm.weight"):
    np.testing.assert_array_equal(got[name], last[name])


def test_only_lists_over_layers_are_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture):
  shapes = {"model.embed_tokens.weight": (5, 2), **{f"model.layers.{i}.w": (2, 2) for i in range(2)}}
  a, b = (save(tmp_path / name, i, shapes, num_hidden_layers=2, layer_types=[name, name.upper()], eos_token_id=[7, 8],
               architectures=["A", "B"], mlp_only_layers=[i], layer_gains=[1, 2]) for i, name in enumerate("ab"))
  merged(tmp_path, passthrough((a, [0, 2]), (b, [1, 2]), (b, [1, 2])))
  config = json.loads((tmp_path / "out/config.json").read_text())
  assert (config["num_hidden_layers"], config["layer_types"]) == (4, ["a", "A", "B", "B"])
  assert config["mlp_only_layers"] == [0, 2, 3]
  assert (config["eos_token_id"], config["architectures"], config["layer_gains"]) == ([7, 8], ["A", "B"], [1, 2])
  assert "layer_gains seems to have an entry for each layer" in capsys.readouterr().err


def test_the_dtype_in_config_is_that_of_the_weights(tmp_path: Path):
  wide = save(tmp_path / "wide", 0, torch_dtype="float32")
  tree = {name: x.astype(ml_dtypes.bfloat16) for name, x in read(save(tmp_path / "narrow", 1)).items()}
  narrow = save(tmp_path / "bfloat16", 0, tree=tree, torch_dtype="bfloat16", text_config={"dtype": "bfloat16"})
  for made, dtype in ((linear(wide, narrow, base_model=str(narrow)), "float32"),
                      (linear(narrow, wide, base_model=str(wide)), "bfloat16"),
                      (linear(wide, narrow, base_model=str(narrow), dtype="float16"), "float16")):
    got = merged(tmp_path, made, f"to-{dtype}")
    config = json.loads((tmp_path / f"to-{dtype}" / "config.json").read_text())
    assert {x.dtype.name for x in got.values()} == {config["torch_dtype"]} == {dtype}
    assert config.get("text_config", {}).get("dtype", dtype) == dtype


def test_missing_config_is_the_only_complaint(tmp_path: Path, capsys: pytest.CaptureFixture):
  """A model without config.json is named, and nothing else is said."""
  a, b = save(tmp_path / "a", 0), save(tmp_path / "b", 1)
  (b / "config.json").unlink()
  with pytest.raises(UserError, match=r"b/config\.json: cannot be read"):
    merged(tmp_path, linear(a, b))
  assert "note" not in capsys.readouterr().err
