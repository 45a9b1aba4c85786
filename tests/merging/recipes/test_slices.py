"""Recipes of slices: depth, heads, and models that do not fit each other or the config that the output takes."""

import json
from pathlib import Path

import numpy as np
import pytest

from imm_jax.errors import UserError
from tests.merge_folders import read
from tests.merging.recipe_models import SHAPES, merged, save, source


def stack(*folders: Path, **more) -> dict:
  """Two layers of each model."""
  return {"merge_method": "passthrough", **more, "slices": [
      {"sources": [source(folder, [2 * i, 2 * i + 2])]} for i, folder in enumerate(folders)]}


@pytest.mark.parametrize(("method", "parameters"), [
    ("lines", {"weight": 1, "alpha": 0.0, "beta": 1.0}),
    ("iimm", {"importance": [1, 2, 3, 4], "base_weight": 0.5, "drop_rate": 0})])
def test_depth_is_that_of_the_output_in_slices_too(method: str, parameters: dict, pair, tmp_path: Path):
  made = {"merge_method": method, "base_model": str(pair[0]), "parameters": parameters}
  whole, *others = (merged(tmp_path, made | {"slices": [{"sources": [source(m, ends) for m in pair]} for ends in cut]},
                          str(len(cut))) for cut in ([[0, 4]], [[0, 2], [2, 4]], [[0, 0], [0, 4], [4, 4]]))
  for other in others:
    for name, x in whole.items():
      np.testing.assert_array_equal(other[name], x)
  base, other = map(read, pair)
  for i, scale in enumerate((0, 1 / 3, 2 / 3, 1) if method == "lines" else (0.2, 0.4, 0.6, 0.8)):
    name = f"model.layers.{i}.mlp.up_proj.weight"
    np.testing.assert_allclose(whole[name], base[name] + scale * (other[name] - base[name]), rtol=1e-5, atol=1e-6)


def test_head_is_of_the_last_slice(pair, tmp_path: Path, capsys: pytest.CaptureFixture):
  """mergekit writes no head for a tied last slice, so that an untied output lacks one."""
  shapes = {name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"}
  a, b = (save(tmp_path / f"tied{i}", i, shapes, tie_word_embeddings=True) for i in (2, 3))
  for first, head in ((pair[0], read(b)["model.embed_tokens.weight"]), (a, None)):
    out = tmp_path / f"from-{first.name}"
    got = merged(tmp_path, stack(first, b), out.name)
    np.testing.assert_array_equal(got["model.embed_tokens.weight"], read(first)["model.embed_tokens.weight"])
    np.testing.assert_array_equal(got.get("lm_head.weight"), head)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is (head is None)
    assert ("both are the first slice's" in capsys.readouterr().err) == (head is None)


def reshaped(**changes: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
  """The shapes of a model with another one, or none, for tensors whose names contain a key."""
  shapes = {name: next((shape for part, shape in changes.items() if part in name), shape)
            for name, shape in SHAPES.items()}
  return {name: shape for name, shape in shapes.items() if shape is not None}


@pytest.mark.parametrize(("shapes", "expected"), [
    (reshaped(up_proj=(5, 8)), "has model.layers.N.mlp.up_proj.weight (5, 8), not (6, 8)"),
    (reshaped(lm_head=(16, 8)), "has lm_head.weight (16, 8), not (12, 8)"),
    (reshaped(norm=(9,)), "has model.norm.weight (9,), not (8,)"),
    (reshaped(up_proj=None), "lacks model.layers.N.mlp.up_proj.weight"),
    (reshaped(norm=None), "lacks model.norm.weight"),
    (SHAPES | {f"model.layers.{i}.mlp.up_proj.bias": (6,) for i in range(4)}, "has model.layers.N.mlp.up_proj.bias")])
def test_misfitting_slices_are_refused(shapes: dict, expected: str, pair, tmp_path: Path):
  """They are slices of models that do not fit."""
  other = save(tmp_path / "other", 2, shapes)
  for made, label, reference in (
      (stack(pair[0], other), f"slices[1].sources[0] ({other})", f"slices[0].sources[0] ({pair[0]})"),
      (stack(pair[0], other, base_model=str(pair[1])), f"slices[1].sources[0] ({other})", f"base_model ({pair[1]})"),
      ({"merge_method": "passthrough", "base_model": str(pair[0]), "models": [{"model": str(other)}]},
       f"models[0] ({other})", f"base_model ({pair[0]})")):
    with pytest.raises(UserError) as error:
      merged(tmp_path, made)
    assert str(error.value).startswith(f"{label} does not fit {reference}, whose config.json the output takes: it ")
    assert expected in str(error.value)


def test_donor_must_fit(pair, tmp_path: Path):
  """The base whose config the output takes has to fit though it is no input."""
  whole = {"merge_method": "passthrough", "models": [{"model": str(pair[0])}]}
  for made in (whole, stack(*pair)):
    for name, config in (("family", {"model_type": "gpt2"}), ("heads", {"num_attention_heads": 4})):
      donor = tmp_path / name
      _ = donor.exists() or save(donor, 2, **config)
      with pytest.raises(UserError, match=r"has (model_type|num_attention_heads)=.* in config\.json, base_model has"):
        merged(tmp_path, {**made, "base_model": str(donor)})
  tied = save(tmp_path / "tied", 2, reshaped(lm_head=None), tie_word_embeddings=True)
  for i, made in enumerate((whole, stack(*pair))):
    assert "lm_head.weight" in merged(tmp_path, {**made, "base_model": str(tied)}, str(i))


def test_layers_may_be_of_several_forms_in_one_model(tmp_path: Path):
  """As those of attention and others that alternate, or the first ones of a mixture of experts."""
  shapes = {"model.embed_tokens.weight": (12, 8)}
  for i in range(4):
    shapes |= {f"model.layers.{i}.{'ab'[i % 2]}": (2 + i % 2, 4), f"model.layers.{i}.w": (2 + i // 2, 4)}
  a, b = (save(tmp_path / name, i, shapes) for i, name in enumerate("ab"))
  assert "model.layers.3.b" in merged(tmp_path, stack(a, b))
