"""What mergekit's reader accepts is accepted and means the same; what makes no sense is named in one line."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from imm_jax.errors import UserError
from imm_jax.merging import registry
from imm_jax.merging.recipes import mergekit
from tests.merge_folders import read
from tests.merging.recipe_models import merged, save


def recipe(tmp_path: Path, text: str | dict):
  path = tmp_path / "recipe.yml"
  path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
  return mergekit.read(path)


def linear(*models: object, weights=(1, 1), **more) -> dict:
  return {"merge_method": "linear", "models": [{"model": m if isinstance(m, dict) else str(m), "parameters": {
      "weight": w}} for m, w in zip(models, weights, strict=False)], **more}


def test_all_mergekit_forms_of_models(pair, tmp_path: Path, monkeypatch, capsys):
  """Models may be written in all of mergekit's forms."""
  seen = []
  monkeypatch.setattr("imm_jax.merging.recipes.models.hub.resolve", lambda name: seen.append(name) or pair[0])
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


def test_own_keys_are_noted(pair, tmp_path: Path, capsys):
  """Keys of the user's own have no effect, and a line says so."""
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


def a_slice(*sources: dict, **more) -> dict:
  """The keys of a recipe of one slice."""
  return {"models": None, "slices": [{"sources": list(sources)}], **more}


HALF = {"model": "A", "layer_range": [0, 2]}
# By what is wrong: keys that differ from those of the mean of A and B (None: left out), or a text; and what is said.
WRONG: dict[str, tuple[dict | str, str]] = {
    "no-yaml": ("merge_method: [1, 2", "is not YAML"),
    "unknown-method": ({"merge_method": "tiess"}, "merge_method='tiess': did you mean ties?"),
    "list-of-methods": ({"merge_method": ["ties"]}, "merge_method=['ties']: did you mean ties?"),
    "method-of-flags": ({"merge_method": "fisher"}, "give --method=fisher with --models and --fishers"),
    "misspelt-key": ({"base_modle": "A"}, "base_modle is not supported; did you mean base_model?"),
    "parameter-outside": ({"density": 0.5}, "density is not supported here; "),
    "dtype": ({"out_dtype": "int4"}, "dtype='int4'"),
    "experts": ({"gate_mode": "hidden", "experts": [{"source_model": "A"}]}, "a mixture of experts"),
    "no-models": ({"models": []}, "expected models or slices"),
    "models-and-slices": ({"slices": [{}]}, "expected models or slices, not both"),
    "modules-key": ({"models": None, "modules": {"text": {"moduls": 1}}},
                    "modules.text.moduls is not supported; did you mean models?"),
    "two-modules": ({"modules": {"vision": {}, "text": {}}}, "expected one module"),
    "no-base": ({"merge_method": "slerp"}, "base_model is missing; slerp needs one"),
    "base-lora": ({"base_model": {"model": {"path": "x"}, "lora": 5}},
                  "base_model.lora=5: expected a folder or a hub id"),
    "base-no-path": ({"base_model": {"model": {"revision": "x"}}},
                     "base_model.model.path=None: expected a folder or a"),
    "base-path": ({"base_model": {"model": {"path": 5}}}, "base_model.model.path=5: expected a folder"),
    "base-revision": ({"base_model": {"model": {"path": "x", "revision": 5}}},
                      "base_model.model.revision=5: expected a text"),
    "base-list": ({"base_model": ["A"]}, "base_model=['A']: expected a folder"),
    "no-model": ({"models": [{"model": None, "parameters": {"weight": 1}}]}, "models[0].model=None: expected a folder"),
    "weight-outside": ({"models": [{"model": "A", "weight": 1}]}, "models[0].weight is not supported here"),
    "layers-outside": ({"models": [HALF]}, "models[0].layer_range is not supported here"),
    "misspelt-parameter": ({"models": [{"model": "A", "parameters": {"wieght": 1}}]},
                           "wieght is not supported; did you mean weight?"),
    "misspelt-mergekit-parameter": ({"parameters": {"lamda": 0.7}},
                                    "parameters.lamda is not supported; did you mean lambda?"),
    "parameters-list": ({"models": [{"model": "A", "parameters": [1]}]}, "parameters: expected a mapping"),
    "no-weight": ({"models": [{"model": "A", "parameters": {"gamma": 0.5}}]}, "models[0].parameters.weight is missing"),
    "weight-text": ({"models": [{"model": "A", "parameters": {"weight": "heavy"}}]},
                    "models[0].parameters.weight='heavy'"),
    "weight-of-some": ({"models": [{"model": "A", "parameters": {"weight": [{"filter": "mlp", "value": 1}]}}]},
                       "add one for the others: '.*', in a recipe an entry with only a value"),
    "normalize-number": ({"parameters": {"normalize": 0.5}}, "normalize=0.5: expected true or false"),
    "normalize-of-some": ({"parameters": {"normalize": [{"filter": "mlp", "value": False}]}},
                          "the same for all tensors"),
    "rescale": ({"merge_method": "ties", "base_model": "A", "parameters": {"density": 0.5, "rescale": True}},
                "parameters.rescale: ties does not rescale"),
    "layers-past-the-end": (a_slice({"model": "A", "layer_range": [0, 9]}, merge_method="passthrough"),
                            "layer_range [0, 9]: A has 4 layers"),
    "layers-backwards": (a_slice({"model": "A", "layer_range": [3, 2]}, merge_method="passthrough"),
                         "expected [first, end] with 0 <= first"),
    "no-layers": (a_slice({"model": "A"}, merge_method="passthrough"), "layer_range=None"),
    "unequal-layers": (a_slice(HALF, {"model": "B", "layer_range": [0, 1]}, merge_method="karcher"),
                       "the same number of layers"),
    "lone-slerp": (a_slice(HALF, merge_method="slerp", base_model="A", parameters={"t": 0.5}),
                   "slerp takes 1 model other than base_model, not 0"),
    "scope-of-slices": ({"models": None, "slices": [{"sources": [HALF, HALF | {"model": "B"}]}] * 2,
                         "merge_method": "ties", "base_model": "A", "parameters": {"weight": 1, "scope": "model"}},
                        "parameters.scope='model': slices are merged one by one"),
    "tokenizer-twice": ({"tokenizer_source": "union", "tokenizer": {"source": "base"}}, "give one of them"),
    "tokenizer-list": ({"tokenizer": ["a"]}, "tokenizer: expected a mapping with source"),
    "tokens-list": ({"tokenizer": {"source": "base", "tokens": ["w1"]}},
                    "tokenizer.tokens: expected a mapping from tokens"),
    "token-number": ({"tokenizer": {"tokens": {"w": 1}}},
                     "tokenizer.tokens.w: expected a mapping with source or force"),
    "token-id": ({"tokenizer": {"tokens": {"w": {"source": {"kind": "model_token", "model": "A", "token_id": "x"}}}}},
                 "tokens.w.source.token_id='x': expected a number of a row"),
    "token-model": ({"tokenizer": {"tokens": {"w": {"source": {"kind": "model_token", "token": "x"}}}}},
                    "tokens.w.source.model=None: expected a folder"),
    "token-force": ({"tokenizer": {"tokens": {"w": {"source": "A", "force": "maybe"}}}},
                    "tokens.w.force='maybe': expected true or"),
    "pad-true": ({"tokenizer": {"pad_to_multiple_of": True}},
                 "tokenizer.pad_to_multiple_of=True: expected a number of rows"),
    "pad-0": ({"tokenizer": {"pad_to_multiple_of": 0}},
              "tokenizer.pad_to_multiple_of=0: expected a number of rows, 1 or more"),
    "chat-template": ({"chat_template": "alpaca"}, "expected auto, chatml or a Jinja template")}


@pytest.mark.parametrize(("change", "expected"), WRONG.values(), ids=WRONG)
def test_what_a_recipe_has_wrong_is_one_line(change: dict | str, expected: str, pair, tmp_path: Path):
  text = change
  if isinstance(change, dict):
    raw = {**linear(*pair), **change}
    text = yaml.safe_dump({key: value for key, value in raw.items() if value is not None})
  for name, folder in zip("AB", pair, strict=True):
    text = text.replace(f": {name}\n", f": {folder}\n")
  with pytest.raises(UserError) as error:
    merged(tmp_path, text)
  assert expected in str(error.value).replace(str(pair[0]), "A")
  late = expected.startswith(("add one for", "layer_range [0, 9]"))  # seen with the models at hand
  assert str(error.value).startswith(f"{tmp_path}/out.yml: ") != late
  assert "\n" not in str(error.value)
  assert not (tmp_path / "out").exists()


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


@pytest.mark.full
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


def test_misplaced_parameter_is_noted(pair, tmp_path: Path, capsys):
  """It is a parameter for all models that stands in one of them."""
  made = linear(*pair)
  made["models"][1]["parameters"]["normalize"] = False
  assert recipe(tmp_path, made).options == {"weights": [1.0, 1.0]}
  assert "models[1].parameters.normalize has no effect: it is one for all models" in capsys.readouterr().err


def test_the_number_of_models_in_words():
  words = {name: registry.METHODS[name].count_in_words for name in ("linear", "model_stock", "nuslerp", "slerp")}
  assert words == {"linear": "1 or more models", "model_stock": "2 or more models", "nuslerp": "2 models",
                   "slerp": "1 model"}
