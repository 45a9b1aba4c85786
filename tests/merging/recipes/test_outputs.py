"""What a merge replaces and where it writes; and recipes of several documents, which are checked before the first."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from imm_jax import files
from imm_jax.errors import ResourceError, UserError
from imm_jax.merging import on_disk
from imm_jax.merging.recipes import command, mergekit
from imm_jax.merging.recipes.documents import Documents
from imm_jax.merging.recipes.recipe import Recipe
from tests.merge_folders import read, write
from tests.merging.recipe_models import SHAPES, merged, save


def linear(*folders: object, **more) -> dict:
  return {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1}} for m in folders], **more}


def words(folder: Path, *more: str, **special: str) -> None:
  """Gives a model a tokenizer of eleven words, and more."""
  model = models.WordLevel({word: i for i, word in enumerate((*(f"w{i}" for i in range(11)), *more))}, unk_token="w0")
  PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="w0", **special).save_pretrained(folder)


def documents(tmp_path: Path, *raws: dict) -> Documents:
  path = tmp_path / "recipe.yml"
  path.write_text(yaml.safe_dump_all(raws))
  return Documents(path, mergekit.read_names(path))


def refusal(out: Path, inputs: dict[str, Path] | None = None) -> str:
  try:
    files.check_out(out, inputs or {}, overwrite=True, explain_foreign=command.explain_foreign)
  except UserError as e:
    return str(e)
  return ""


def test_overwrite_replaces_only_merges(pair, tmp_path: Path):
  """It replaces what merges wrote, and nothing else."""
  out = tmp_path / "d2/m1"
  made = documents(tmp_path, linear(*pair, name="m1"), linear("m1", pair[0], name="org/m2"))
  made.merge(tmp_path / "d3", tmp_path / "d3", command.OutputOptions())
  out.parent.mkdir()
  merged(tmp_path, linear(*pair), "d2/m1")
  out.with_suffix(".yml").unlink()
  for folder in (out, tmp_path / "d3"):
    assert "does not list its files" in refusal(folder) or "has no merge.json" in refusal(folder)
    command.record_files(folder)
    assert refusal(folder) == ""
  assert "d2: is no earlier merge (it has no merge.json)" in refusal(tmp_path / "d2")
  for folder, name in ((out, "thesis.txt"), (out, "notes/a"), (tmp_path / "d3", "thesis.txt"),
                       (tmp_path / "d3", "m1/thesis.txt"), (tmp_path / "d3", "m3/merge.json")):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("")
    assert f"holds {name}, which no merge wrote" in refusal(folder)
    (folder / name).unlink()
  (out / "link").symlink_to(tmp_path / "a", target_is_directory=True)
  assert "holds link, which no merge wrote" in refusal(out)
  (out / "merge.json").write_text("[]")
  assert "does not list its files" in refusal(out)


def test_checkpoints_replace_themselves(pair, tmp_path: Path):
  """Each checkpoint of an output may be replaced by itself."""
  made = documents(tmp_path, linear(*pair, name="m1"), linear("m1", pair[0], name="org/merge.json"))
  out = tmp_path / "out"
  made.merge(out, out, command.OutputOptions())
  command.record_files(out)
  for folder in (out, out / "m1", out / "org/merge.json"):
    assert refusal(folder) == ""
  (out / "m1/thesis.txt").write_text("")
  assert "holds m1/thesis.txt, which no merge wrote" in refusal(out)
  assert "holds thesis.txt, which no merge wrote" in refusal(out / "m1")
  shutil.rmtree(out / "m1")
  write(out / "m1", read(pair[0]), shards=2)  # stands for another merge under the same name
  (out / "m1/merge.json").write_text("{}")
  command.record_files(out / "m1")
  assert [refusal(folder) for folder in (out, out / "m1")] == ["", ""]
  (out / "org/notes").mkdir()
  (out / "org/notes/merge.json").write_text(json.dumps({"files": ["merge.json"]}))
  assert "holds org/notes/merge.json, which no merge wrote" in refusal(out)


def test_sweep_reads_the_config_once(pair, tmp_path: Path, monkeypatch):
  """All outputs of a sweep take their config from one reading."""
  read_table, labels = command.arrange.read_table, []
  monkeypatch.setattr(command.arrange, "read_table",
                      lambda label, folder: labels.append(label) or read_table(label, folder))
  (tmp_path / "recipe.yml").write_text(yaml.safe_dump(linear(*pair)))
  job = mergekit.read(tmp_path / "recipe.yml")
  command.merge({tmp_path / str(i): job for i in range(3)}, command.OutputOptions())
  assert labels == ["base_model"]
  assert len({(tmp_path / str(i) / "config.json").read_text() for i in range(3)}) == 1


def test_an_input_of_any_kind_is_never_replaced(pair, tmp_path: Path):
  donor, tokens, embedding = (save(tmp_path / name, 2) for name in ("donor", "tokens", "embedding"))
  for folder in (*pair, donor, tokens, embedding):
    words(folder)
  other = {"kind": "model_token", "model": str(pair[1]), "token_id": 1}
  made = documents(tmp_path, linear(*pair, name="one"), linear("one", pair[1], base_model=str(donor), tokenizer={
      "source": str(tokens), "tokens": {"<y>": {"source": other}}}))
  inputs = made.check(tmp_path / "out")
  assert set(inputs.values()) == {*pair, donor, tokens}
  # A source of tokens that is no model to merge is refused later, but is an input all the same.
  inputs |= documents(tmp_path, linear(pair[0], tokenizer={"tokens": {
      "<x>": {"source": str(embedding)}, "<z>": {"source": other}}})).read(0, {}).inputs
  assert set(inputs.values()) == {*pair, donor, tokens, embedding}
  for folder in (*pair, donor, tokens, embedding):
    assert "is or holds the input" in refusal(folder, inputs)
    assert "lies in the input" in refusal(folder / "out", inputs)


def test_base_and_adapter_of_a_model_are_inputs(pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr("imm_jax.model.lora.materialize", lambda *_, name: pair[1])
  adapter = tmp_path / "adapter"
  adapter.mkdir()
  (tmp_path / "recipe.yml").write_text(yaml.safe_dump(linear(f"{pair[0]}+{adapter}")))
  recipe = mergekit.read(tmp_path / "recipe.yml")
  assert set(recipe.inputs.values()) == {*pair, adapter}


@pytest.mark.parametrize("name", ["../escape", "/abs", ".", "", "a/../../b", ".hidden", "a/.b", "merge.json", 5, ["x"],
                                  "b", "b/c", None])
def test_document_names_are_checked(name: object, tmp_path: Path):
  """A document writes under its name in the output."""
  (tmp_path / "recipe.yml").write_text(yaml.safe_dump_all([{"name": "b"}, {"name": name}, {}]))
  with pytest.raises(UserError, match=r"of document 2: (each document but the last needs a name|is, holds or lies in)"):
    mergekit.read_names(tmp_path / "recipe.yml")
  (tmp_path / "recipe.yml").write_text(yaml.safe_dump({"name": name}))  # the name of a single one has no effect
  assert mergekit.read_names(tmp_path / "recipe.yml") == [None]


def test_parallel_tokenizer_merges_are_apart(pair, tmp_path: Path, monkeypatch):
  """Two merges with tokenizers into one parent folder leave each other alone."""
  for folder in pair:
    words(folder)
  mine = tmp_path / ".rows.part"
  mine.mkdir()
  scratches: list[Path] = []

  def align(recipe: Recipe, scratch: Path) -> object:
    scratches.append(scratch)
    return align_vocabularies(recipe, scratch)

  def merge_parts(*args: object, **how: object) -> object:
    rows = sorted(scratches[0].iterdir())
    if len(scratches) == 1:  # another merge from begin to end, while this one is under way
      merged(tmp_path, linear(*pair, tokenizer_source="union"), "second")
    assert rows == sorted(scratches[0].iterdir()) != []
    return merge(*args, **how)

  align_vocabularies, merge = command._align_vocabularies, on_disk.merge_parts
  monkeypatch.setattr(command, "_align_vocabularies", align)
  monkeypatch.setattr(on_disk, "merge_parts", merge_parts)
  merged(tmp_path, linear(*pair, tokenizer_source="union"), "first")
  assert [scratch.parent for scratch in scratches] == [tmp_path / "first", tmp_path / "second"]
  assert not any(scratch.exists() for scratch in scratches)
  assert {p.name for p in tmp_path.iterdir() if p.suffix != ".yml"} == {*"ab", ".rows.part", "first", "second"}


def stack(name: str | None = None, folder: object = "A", **more) -> dict:
  """Six layers of a model of four."""
  return {"merge_method": "passthrough", **({"name": name} if name else {}), "slices": [
      {"sources": [{"model": str(folder), "layer_range": layers}]} for layers in ([0, 3], [1, 4])], **more}


@pytest.mark.parametrize(("last", "expected"), [
    (lambda a, b: stack(None, "six") | {"merge_method": "linear", "parameters": {"weight": [1, -1, 0]}},
     "document 2: slices[0]: linear: weights: they add up to 0 at 'model.layers.2."),
    (lambda a, b: linear("six", b), "document 2: models[1] (B) has num_hidden_layers=4 in config.json, models[0] has"),
    (lambda a, b: stack(None, "six") | {"slices": [{"sources": [{"model": "six", "layer_range": [4, 7]}]}]},
     "layer_range [4, 7]: six has 6 layers"),
    (lambda a, b: {**linear(), "models": [{"model": "six"}]}, "document 2: models[0].parameters.weight is missing"),
    (lambda a, b: {**linear("six"), "base_model": "sxi"}, "sxi: no such checkpoint folder"),
    (lambda a, b: linear("sxi"), "sxi: no such checkpoint folder"),
    (lambda a, b: linear("six", "/no/such"), "/no/such: no such checkpoint folder")],
    ids=["weights-cancel", "other-depth", "too-few-layers", "no-weight", "base-misspelt", "model-misspelt",
         "no-folder"])
def test_documents_are_checked_first(last, expected: str, pair, tmp_path: Path):
  """Nothing is merged where the last one is wrong."""
  made = documents(tmp_path, stack("six", pair[0]), last(*pair))
  with pytest.raises(UserError) as error:
    made.check(tmp_path / "out")
  assert expected in str(error.value).replace(str(pair[1]), "B")
  assert not (tmp_path / "out").exists()


def test_documents_with_tokenizers_are_checked(pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  """They are named in the message."""
  for i, folder in enumerate(pair):
    words(folder, f"<{i}>")
  first = linear(*pair, name="one", tokenizer_source="union")
  for last, expected in (
      (linear("one", pair[0], tokenizer_source="union", parameters={"scale": 1}) | {"models": [
          {"model": name, "parameters": {"weight": weight}} for name, weight in (("one", 1), (str(pair[0]), -1))]},
       "document 2: linear: weights: they add up to 0"),
      (linear("one", tokenizer={"tokens": {"<2>": {"source": "one"}}}), "tokens.<2>: one has no row for it"),
      (linear("one", pair[0]), "model.embed_tokens.weight has shape (13, 8) in models[0], (12, 8) in models[1]"),
      (linear("one", chat_template="auto"), "document 2: chat_template: auto: none of the models has one")):
    with pytest.raises(UserError) as error:
      documents(tmp_path, first, last).check(tmp_path / "out")
    assert str(error.value).startswith(f"{tmp_path}/recipe.yml: document 2: ")
    assert expected in str(error.value)
  made = documents(tmp_path, first, linear("one", pair[1], tokenizer_source="union"))
  assert set(made.check(tmp_path / "out").values()) == set(pair)
  assert not (tmp_path / "out").exists()
  made.merge(tmp_path / "out", tmp_path / "out", command.OutputOptions())
  assert read(tmp_path / "out")["model.embed_tokens.weight"].shape == (13, 8)
  tree = read(pair[1])
  tree["model.norm.weight"][0] = np.nan  # which only the merge finds
  made = documents(tmp_path, linear(*pair, name="one"), linear("one", save(tmp_path / "nan", 0, tree=tree)))
  with pytest.raises(UserError, match=r"recipe\.yml: document 2: model\.norm\.weight has NaN or infinity in "):
    made.merge(tmp_path / "nans", tmp_path / "nans", command.OutputOptions())


def test_slice_results_with_equal_layers_merge(pair, tmp_path: Path):
  """The result of one document is an input of the next where both have the same layers."""
  shapes = SHAPES | {name.replace(".3.", f".{i}."): shape for i in (4, 5) for name, shape in SHAPES.items()}
  six = save(tmp_path / "c", 2, shapes, num_hidden_layers=6, layer_types=["full_attention"] * 6)
  made = documents(tmp_path, stack("org/six", pair[0], dtype="float64"),
                   linear("org/six", six, name="mean", dtype="float32"), linear("mean", name="again"))
  assert set(made.check(tmp_path / "out").values()) == {pair[0], six}
  made.merge(tmp_path / "out", tmp_path / "final", command.OutputOptions())
  got, a, c = read(tmp_path / "out/again"), read(pair[0]), read(six)
  for i, layer in enumerate((0, 1, 2, 1, 2, 3)):
    name = "model.layers.{}.mlp.up_proj.weight".format
    np.testing.assert_allclose(got[name(i)], (a[name(layer)] + c[name(i)]) / 2, rtol=1e-6)
  record = json.loads((tmp_path / "out/mean/merge.json").read_text())
  assert {label: entry["path"] for label, entry in record["inputs"].items()} == {
      "models[0]": str(tmp_path / "final/org/six"), "models[1]": str(six)}


def test_disk_space_of_all_documents(pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  """It is checked before the first is merged."""
  size = sum(4 * int(np.prod(shape)) for shape in SHAPES.values())
  made = documents(tmp_path, linear(*pair, name="one"), linear("one", pair[0]))
  for free, fails in ((2 * size, False), (2 * size - 1, True)):
    monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(free, 0, free))
    if fails:
      with pytest.raises(ResourceError, match=r"needs 5\.1 KiB, the disk has 5\.1 KiB free"):
        made.check(tmp_path / "out")
    else:
      made.check(tmp_path / "out")
