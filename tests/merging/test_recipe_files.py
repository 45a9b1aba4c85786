"""What mergekit's reader accepts is accepted and means the same; what makes no sense is named in one line."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from imm_jax.errors import UserError
from imm_jax.merging import mergekit, registry
from tests.merge_folders import read
from tests.merging.recipe_models import merged, save


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
  return save(tmp_path / "a", 0), save(tmp_path / "b", 1)


def recipe(tmp_path: Path, text: str | dict):
  path = tmp_path / "recipe.yml"
  path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
  return mergekit.read(path)


def linear(*models: object, weights=(1, 1), **more) -> dict:
  return {"merge_method": "linear", "models": [{"model": m if isinstance(m, dict) else str(m), "parameters": {
      "weight": w}} for m, w in zip(models, weights, strict=False)], **more}


def test_models_may_be_written_in_all_of_mergekits_forms(pair, tmp_path: Path, monkeypatch, capsys):
  seen = []
  monkeypatch.setattr("imm_jax.merging.recipe_models.hub.resolve", lambda name: seen.append(name) or pair[0])
  forms = ["p", {"model": "p"}, {"model": {"path": "p"}}, {"path": "p"}, {"model": {"path": "p", "revision": "r"}},
           "p@r", {"model": "p@r"}, "p+l", {"model": "p", "lora": "l"}, {"model": {"path": "p"}, "lora": "l"},
           {"model": {"path": "p"}, "lora": {"path": "l", "revision": "r"}}, {"model": "p", "lora": None,
                                                                              "override_architecture": "X"}]
  expected = ["p", "p", "p", "p", "p@r", "p@r", "p@r", "p+l", "p+l", "p+l", "p+l@r", "p"]
  for form in forms:
    recipe(tmp_path, linear(form))
  assert seen == expected
  assert "models[0].model.override_architecture has no effect" in capsys.readouterr().err
  monkeypatch.chdir(tmp_path)
  for form in ("a@main", {"path": "a", "revision": "main"}, {"model": {"path": "a", "revision": "main"}},
               {"model": "a@main", "lora": "a@r"}, "a@v1+a@v2"):
    recipe(tmp_path, linear(form))
  assert seen[len(expected):] == ["a", "a", "a", "a+a", "a+a"]
  assert "models[0].model: revision 'main' has no effect on a folder" in capsys.readouterr().err


@pytest.mark.parametrize("spelling", ["{a}/", "{a}/../a", "link", "a", "./a"])
def test_a_base_is_known_however_it_is_spelled(spelling: str, pair, tmp_path: Path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "link").symlink_to(pair[0])
  both = [{"model": str(folder)} for folder in pair]
  base = spelling.format(a=pair[0])
  made = recipe(tmp_path, {"merge_method": "slerp", "base_model": base, "models": both, "parameters": {"t": 0.5}})
  assert list(made.models) == ["base", "models[1]"]
  assert made.donor == made.models["base"]  # equal paths, so that it counts as one model everywhere
  made = recipe(tmp_path, {"merge_method": "model_stock", "base_model": base,
                           "models": [*both, {"model": str(save(tmp_path / "c", 2))}]})
  assert list(made.models) == ["base", "models[1]", "models[2]"]
  made = recipe(tmp_path, {"merge_method": "slerp", "base_model": base, "parameters": {"t": 0.5}, "slices": [
      {"sources": [{**entry, "layer_range": [0, 2]} for entry in both]}]})
  assert list(made.models) == ["base", "sources[1]"]


@pytest.mark.parametrize("text", [
    "merge_method: linear\nmerge_method: ties\n", "a: {b: [{c: 1, 'c': 2}]}\n", "a: 1\n---\nb: 1\nb: 2\n"])
def test_a_key_that_stands_twice_is_named(text: str, tmp_path: Path):
  with pytest.raises(UserError, match=r"recipe\.yml: '(merge_method|c|b)' is duplicated in one mapping \(line \d\)"):
    recipe(tmp_path, text)


@pytest.mark.parametrize("value", [True, [0.5, False], [{"filter": "mlp", "value": True}, {"value": 1}]])
def test_true_and_false_are_no_numbers(value: object, pair, tmp_path: Path):
  with pytest.raises(UserError, match="expected a number, a list of numbers, or a list of filters"):
    recipe(tmp_path, linear(*pair, weights=(value, 1)))


def test_keys_of_ones_own_have_no_effect_and_a_line_says_so(pair, tmp_path: Path, capsys):
  text = f"""
x: &p {{weight: 0.5}}
remarks: [made on a Monday]
merge_method: linear
models:
  - {{model: {pair[0]}, parameters: *p, remark: the first}}
  - {{model: {pair[1]}, parameters: {{<<: *p}}}}
slices: []
"""
  assert recipe(tmp_path, text).options["weights"] == [0.5, 0.5]
  notes = capsys.readouterr().err
  assert all(f"{key} is not known and has no effect" in notes for key in ("x", "remarks", "models[0].remark"))


@pytest.mark.parametrize(("change", "expected"), [
    ({"merge_methods": "ties"}, "merge_methods is not supported; did you mean merge_method?"),
    ({"dtpye": "float32"}, "dtpye is not supported; did you mean dtype?"),
    ({"density": 0.5}, "density is not supported here; "),  # it belongs under parameters
    ({"merge_method": ["ties"]}, "merge_method=['ties']: did you mean ties?"),
    ({"merge_method": "fisher"}, "give --method=fisher with --models and --fishers"),
    ({"base_model": {"model": {"path": "x"}, "lora": 5}}, "base_model.lora=5: expected a folder or a hub id"),
    ({"base_model": {"model": {"revision": "x"}}}, "base_model.model.path=None: expected a folder or a hub id"),
    ({"base_model": {"model": {"path": 5}}}, "base_model.model.path=5: expected a folder"),
    ({"base_model": {"model": {"path": "x", "revision": 5}}}, "base_model.model.revision=5: expected a text"),
    ({"base_model": ["A"]}, "base_model=['A']: expected a folder"),
    ({"models": [{"model": None, "parameters": {"weight": 1}}]}, "models[0].model=None: expected a folder"),
    ({"models": [{"model": "A", "weight": 1}]}, "models[0].weight is not supported here"),
    ({"models": [{"model": "A", "layer_range": [0, 1]}]}, "models[0].layer_range is not supported here"),
    ({"tokenizer": {"source": "base", "tokens": ["w1"]}}, "tokenizer.tokens: expected a mapping from tokens"),
    ({"tokenizer": {"tokens": {"w": 1}}}, "tokenizer.tokens.w: expected a mapping with source or force"),
    ({"tokenizer": {"tokens": {"w": {"source": {"kind": "model_token", "model": "A", "token_id": "x"}}}}},
     "tokens.w.source.token_id='x': expected a number of a row"),
    ({"tokenizer": {"tokens": {"w": {"source": {"kind": "model_token", "token": "x"}}}}},
     "tokens.w.source.model=None: expected a folder"),
    ({"tokenizer": {"tokens": {"w": {"source": "A", "force": "maybe"}}}}, "tokens.w.force='maybe': expected true or"),
    ({"tokenizer": {"pad_to_multiple_of": True}}, "tokenizer.pad_to_multiple_of=True: expected a number of rows"),
    ({"tokenizer": {"pad_to_multiple_of": 0}}, "tokenizer.pad_to_multiple_of=0: expected a number of rows, 1 or more"),
    ({"tokenizer": ["a"]}, "tokenizer: expected a mapping with source"),
    ({"parameters": {"normalize": [{"filter": "mlp", "value": False}]}}, "the same for all tensors")])
def test_what_a_recipe_has_wrong_is_one_line(change: dict, expected: str, pair, tmp_path: Path):
  text = yaml.safe_dump({**linear(*pair), **change}).replace(": A\n", f": {pair[0]}\n")
  with pytest.raises(UserError) as error:
    recipe(tmp_path, text)
  assert expected in str(error.value)


@pytest.mark.parametrize(("value", "expected"), [
    (1.0, True), (0, False), ("no", False), ("true", True), ([{"value": False}], False), ([True, True], True),
    ([{"filter": "mlp", "value": True}], True),
    ([{"filter": "mlp", "value": 0}, {"filter": "*", "value": False}], False)])
def test_flags_are_read_as_mergekit_reads_them(value: object, expected: bool, pair, tmp_path: Path):
  assert recipe(tmp_path, linear(*pair, parameters={"normalize": value})).options["normalize"] is expected


def test_float64_widens_what_is_written(pair, tmp_path: Path):
  narrow = merged(tmp_path, linear(*pair, weights=(0.3, 0.9)), "narrow")
  for name, x in merged(tmp_path, linear(*pair, weights=(0.3, 0.9), out_dtype="float64"), "wide").items():
    assert x.dtype == np.float64
    np.testing.assert_array_equal(x, narrow[name].astype(np.float64))


def test_a_slice_may_be_empty(pair, tmp_path: Path):
  slices = [{"sources": [{"model": str(folder), "layer_range": layers}]}
            for folder, layers in ((pair[0], [0, 3.0]), (pair[1], [2, 2]), (pair[0], [3, 4]))]
  got = merged(tmp_path, {"merge_method": "passthrough", "slices": slices})
  expected = read(pair[0])
  assert got.keys() == expected.keys()
  assert all((got[name] == x).all() for name, x in expected.items())
  with pytest.raises(UserError, match="none of them has a layer"):
    recipe(tmp_path, {"merge_method": "passthrough", "slices": slices[1:2]})


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear", "ties", "breadcrumbs"])
def test_a_density_of_0_leaves_a_model_out(method: str, pair, tmp_path: Path):
  c = save(tmp_path / "c", 2)
  own = lambda model, density: {"model": str(model), "parameters": {"weight": 0.5, "density": density}}
  made = {"merge_method": method, "base_model": str(pair[0]), "parameters": {"normalize": False},
          "models": [own(pair[1], [0, 0, 1, 1]), own(c, 0)]}
  base, other = map(read, pair)
  for name, x in merged(tmp_path, made).items():
    kept = "layers.2" in name or "layers.3" in name
    expected = base[name] + 0.5 * (other[name] - base[name]) if kept else base[name]
    if "layers" in name:
      np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-6, err_msg=name)


def test_messages_say_which_slice(pair, tmp_path: Path):
  def slices(**second) -> dict:
    both = [{"model": str(folder), "layer_range": [0, 2]} for folder in pair]
    return {"merge_method": "slerp", "base_model": str(pair[0]), "slices": [
        {"sources": both, "parameters": {"t": 0.5}}, {"sources": both, **second}]}

  with pytest.raises(UserError, match=r"yml: slices\[1\]\.parameters\.t is missing"):
    recipe(tmp_path, slices())
  with pytest.raises(UserError, match=r"^slices\[1\]: ties: densities=2\.0 at "):
    merged(tmp_path, {**slices(parameters={"density": 2}), "merge_method": "ties", "parameters": {"weight": 1}})
  assert list(recipe(tmp_path, slices(parameters={"t": 0.1})).models) == [
      "slices[0].base", "slices[0].sources[1]", "slices[1].base", "slices[1].sources[1]"]


def test_a_parameter_for_all_models_in_one_of_them_is_noted(pair, tmp_path: Path, capsys):
  made = linear(*pair)
  made["models"][1]["parameters"]["normalize"] = False
  assert recipe(tmp_path, made).options == {"weights": [1.0, 1.0]}
  assert "models[1].parameters.normalize has no effect: it is one for all models" in capsys.readouterr().err


def test_the_number_of_models_in_words():
  words = {name: registry.METHODS[name].count_in_words for name in ("linear", "model_stock", "nuslerp", "slerp")}
  assert words == {"linear": "1 or more models", "model_stock": "2 or more models", "nuslerp": "2 models",
                   "slerp": "1 model"}
