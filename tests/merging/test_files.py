"""Merging checkpoints on disk: the bits of the functions on trees, the command, and what it refuses."""

import json
import os
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from imm_jax import merging
from imm_jax.errors import UserError
from imm_jax.merging import masks, on_disk as merge_on_disk, registry
from imm_jax.merging.recipes import mergekit
from tests.merge_folders import models, one_line, read, run, write
from tests.merging import every_method

KEY = jax.random.key(7)
WORDS = np.asarray(masks.key_words(KEY))
# Options other than those of every_method.py: lists over the layers and the models, shapes of other kernels.
OPTIONS = every_method.OPTIONS | {
    "task_arithmetic": {"weights": 0.4}, "dare_linear": {"weights": 0.5, "densities": [0.5, 0.7]},
    "slerp": {"t": [0.2, 0.8]}, "nuslerp": {"weights": [0.3, 0.9], "flatten": False}, "sce": {"select_topk": 0.5},
    "karcher": {}}
SLOW = {"della", "della_linear", "dare_linear", "dare_ties", "arcee_fusion", "sce", "breadcrumbs_ties", "nuslerp",
        "multislerp", "karcher", "ramplus_tl", "iimm"}
FULL = {"task_arithmetic", "ties", "breadcrumbs", "model_stock", "slerp", "lines", "wise_ft", "nearswap", "ram",
        "passthrough", "fisher"}
# A base and two models; a model after SFT; Fisher matrices, which are not negative.
PLACES = {"base": 0, "models[0]": 1, "models[1]": 2, "other": 1, "start": 1, "tuned": 2}


def label_inputs(method: str) -> dict[str, int]:
  """Returns which of the models each input of a method is, by label; an optional base is given."""
  optional = {"base": 0} if registry.METHODS[method].base == "optional" else {}
  return optional | {label: PLACES.get(label, 3) for label in every_method.list_inputs(method)}


def in_memory(method: str, trees: list) -> dict:
  places = label_inputs(method)
  optional = {"base": trees[0]} if registry.METHODS[method].base == "optional" else {}
  key = {"key": KEY} if registry.METHODS[method].draws else {}
  given = [trees[places[label]] for label in every_method.list_inputs(method)]
  return every_method.call(method, given, given_options=OPTIONS[method], **optional, **key)


def on_disk(folders: list[Path], out: Path, method: str, *, block: int, **options) -> dict[str, np.ndarray]:
  models = {label: folders[place] for label, place in label_inputs(method).items()}
  with merge_on_disk.CheckpointSource(models, block=block) as source:
    plan = registry.METHODS[method](source, **OPTIONS[method])
    merge_on_disk.merge(source, [merge_on_disk.Output(out, plan)], key=WORDS, **options)
  return read(out)


@pytest.mark.parametrize("method", [
    pytest.param(m, marks=pytest.mark.slow if m in SLOW else pytest.mark.full if m in FULL else [])
    for m in registry.list_disk_methods()])
def test_file_merge_equals_tree_merge(method: str, tmp_path: Path):
  """They are the same bits, whatever the size of blocks and shards."""
  trees = models()
  trees[3] = {name: np.abs(x) for name, x in trees[3].items()}
  folders = [write(tmp_path / f"model{i}", tree, shards=1 + 2 * (i == 2)) for i, tree in enumerate(trees)]
  expected = in_memory(method, trees)
  for i, (block, shard) in enumerate([(1 << 19, 10**9), (16, 200), (4, 10**9)]):  # the last cuts rows
    got = on_disk(folders, tmp_path / str(i), method, block=block, max_shard_bytes=shard)
    assert got.keys() == expected.keys()
    for name, leaf in expected.items():
      assert got[name].dtype == leaf.dtype
      assert got[name].tobytes() == np.asarray(leaf).tobytes(), (
          f"{method} in blocks of {block}: {name} is not what it is in memory; a kernel that is not elementwise needs "
          "whole= or prepare=")
  assert len(list((tmp_path / "1").glob("*.safetensors"))) > 3


@pytest.mark.full
@pytest.mark.parametrize("method", ["dare_ties", "imm"])
def test_bfloat16_has_the_bits_of_a_tree_too(method: str, tmp_path: Path):
  """Neighbors share a draw where all is bfloat16 and rows are even: a way of its own."""
  kept = ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight")
  trees = [{n: t[n] for n in kept} for t in models((ml_dtypes.bfloat16,) * 4)]
  folders = [write(tmp_path / str(i), tree) for i, tree in enumerate(trees)]
  expected = in_memory(method, trees)
  for i, block in enumerate((1 << 19, 6, 4)):
    for name, x in on_disk(folders, tmp_path / f"out{i}", method, block=block).items():
      assert x.tobytes() == np.asarray(expected[name]).tobytes(), (name, block)


def test_digests_are_of_the_tensors_however_they_lie(folders: list[Path], tmp_path: Path):
  again = write(tmp_path / "again", models()[2])
  with merge_on_disk.CheckpointSource({"a": folders[2], "b": again}, block=7) as source:
    plan = registry.METHODS["linear"](source, weights=1)
    found = merge_on_disk.merge(source, [merge_on_disk.Output(tmp_path / "out", plan)], key=WORDS)
  assert found.digests["a"] == found.digests["b"]


RECIPE = """
merge_method: ties
base_model: {0}
models:
  - model: {1}
    parameters:
      weight: 0.5
      density: [0.2, 0.8]
  - model: {2}
    parameters:
      weight:
        - filter: mlp
          value: [1e-1, 0.9]
        - value: 0.3
  - model: {0}
parameters:
  density:
    - filter: norm
      value: 1.0
    - value: 0.4
  normalize: true
  int8_mask: true
  lambda: 0.7
dtype: bfloat16
out_dtype: float32
"""


def test_a_recipe_of_mergekit_means_what_it_says(folders: list[Path], tmp_path: Path):
  (tmp_path / "recipe.yml").write_text(RECIPE.format(*folders))
  read_recipe = mergekit.read(tmp_path / "recipe.yml")
  assert (read_recipe.method, read_recipe.dtype) == ("ties", "float32")
  assert list(read_recipe.models.values()) == folders[:3]
  assert read_recipe.options["weights"] == [0.5, {"mlp": [0.1, 0.9], "": 0.3}]
  assert read_recipe.options["densities"] == [[0.2, 0.8], {"norm": 1.0, "": 0.4}]
  assert (read_recipe.options["scale"], read_recipe.options["normalize"]) == (0.7, True)
  done = run(f"--recipe={tmp_path / 'recipe.yml'}", f"--out={tmp_path / 'out'}")
  assert done.returncode == 0, done.stderr
  base, *others = models()
  expected = merging.ties(base, others[:2], **read_recipe.options)
  for name, x in read(tmp_path / "out").items():
    np.testing.assert_array_equal(x, expected[name])
  file = tmp_path / "wrong.yml"
  file.write_text(RECIPE.format(*folders).replace("density: [0.2, 0.8]", "density: 2"))
  assert one_line(run(f"--recipe={file}", f"--out={tmp_path / 'none'}")).startswith(
      f"error: {file}: ties: densities=2.0 at ")


def refusal(folders: dict[str, Path]) -> str:
  with pytest.raises(UserError) as error, merge_on_disk.CheckpointSource(folders) as source:
    registry.METHODS["linear"](source, weights=1)
  return str(error.value)


def test_mismatched_checkpoints_are_named(folders: list[Path], tmp_path: Path):
  """The message goes tensor by tensor."""
  tree = models()[0]
  lacking = write(tmp_path / "lacking", {n: x for n, x in tree.items() if n != "one"} | {"more": tree["one"]})
  text = refusal({"a": folders[0], "b": lacking})
  assert "b lacks one" in text
  assert "b has more, a has not" in text
  other = write(tmp_path / "other", tree | {"model.embed_tokens.weight": np.zeros((40, 6), np.float32)})
  assert "model.embed_tokens.weight has shape (37, 6) in a, (40, 6) in b (other vocabularies" in refusal(
      {"a": folders[0], "b": other})
  integer = write(tmp_path / "integer", tree | {"one": np.zeros((1, 1), np.int64)})
  assert "one is float32 in a, int64 in b" in refusal({"a": folders[0], "b": integer})


def test_damaged_files_are_named(folders: list[Path], tmp_path: Path):
  for name, damage, expected in [
      ("cut", lambda f: os.truncate(f, f.stat().st_size - 3), "truncated"),
      ("gone", lambda f: f.unlink(), "missing"),
      ("corrupt", lambda f: f.write_bytes(b"\xff" * 200), "not a whole safetensors file"),
      ("twice", lambda f: f.write_bytes(f.read_bytes().replace(b'"scalar"', b'"conv"  ', 1)), "damaged")]:
    folder = Path(shutil.copytree(folders[0], tmp_path / name))
    damage(folder / "model.safetensors")
    assert expected in refusal({"a": folders[1], "b": folder})


def test_wrong_index_is_named(folders: list[Path], tmp_path: Path):
  """It disagrees with its shards."""
  folder = Path(shutil.copytree(folders[2], tmp_path / "index"))
  index = folder / "model.safetensors.index.json"
  content = json.loads(index.read_text())
  content["weight_map"]["model.layers.9.mlp.up_proj.weight"] = content["weight_map"]["conv"]
  index.write_text(json.dumps(content))
  assert "disagrees with the shards on model.layers.9.mlp.up_proj.weight" in refusal({"a": folders[0], "b": folder})


def test_float64_checkpoints_come_back_as_float64(tmp_path: Path):
  trees = [{"w": np.random.default_rng(i).normal(size=(3, 4))} for i in range(2)]
  folders = [write(tmp_path / str(i), tree) for i, tree in enumerate(trees)]
  with merge_on_disk.CheckpointSource(dict(zip("ab", folders, strict=True))) as source:
    plan = registry.METHODS["linear"](source, weights=1)
    merge_on_disk.merge(source, [merge_on_disk.Output(tmp_path / "out", plan)], key=WORDS)
  got = read(tmp_path / "out")["w"]
  assert got.dtype == np.float64
  np.testing.assert_allclose(got, (trees[0]["w"] + trees[1]["w"]) / 2, rtol=1e-6)


def test_overflow_is_counted(tmp_path: Path, recwarn: pytest.WarningsRecorder):
  """Numbers beyond float32 are named and counted."""
  folder = write(tmp_path / "wide", {"w": np.array([1.0, 1e300])})
  with merge_on_disk.CheckpointSource({"a": folder}) as source:
    outputs = [merge_on_disk.Output(tmp_path / "out", registry.METHODS["passthrough"](source))]
    with pytest.raises(UserError, match="w has numbers beyond float32 in a "):
      merge_on_disk.merge(source, outputs, key=WORDS)
    done = merge_on_disk.merge(source, outputs, key=WORDS, allow_nonfinite=True)
  assert done.overflowed == [{"w": 1}]
  assert not recwarn.list


def test_tensors_of_integers_must_be_equal(folders: list[Path], tmp_path: Path):
  other = write(tmp_path / "other", models()[1] | {"ids": np.arange(1, 6)})
  with merge_on_disk.CheckpointSource({"a": folders[0], "b": other}) as source:
    plan = registry.METHODS["linear"](source, weights=1)
    with pytest.raises(UserError, match="ids of int64 differs between the models"):
      merge_on_disk.merge(source, [merge_on_disk.Output(tmp_path / "out", plan)], key=WORDS)


def test_tied_weights_are_merged_once(tmp_path: Path):
  """A stored copy of the embedding would else be dropped by another name."""
  rng = np.random.default_rng(0)
  folders = []
  for i in range(2):
    embedding = rng.normal(size=(20, 4)).astype(np.float32)
    folders.append(write(tmp_path / str(i), {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}))
    (folders[-1] / "config.json").write_text('{"tie_word_embeddings": true}')
  with merge_on_disk.CheckpointSource(dict(zip("ab", folders, strict=True))) as source:
    assert source.names == ["model.embed_tokens.weight"]
  untied = write(tmp_path / "untied", read(folders[0]) | {"lm_head.weight": np.zeros((20, 4), np.float32)})
  (untied / "config.json").write_text('{"tie_word_embeddings": true}')
  assert "lm_head.weight differs from the embedding" in refusal({"a": untied})
