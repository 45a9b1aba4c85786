"""docs/merging.md: every method stands in its table, and its example of a method works as it says."""

import re
import runpy
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from imm_jax.merging import on_disk, registry
from imm_jax.stages import merge_settings
from tests import REPO
from tests.merge_folders import read, write

TEXT = (REPO / "docs/merging.md").read_text()


def test_every_method_and_option_stands_in_the_table():
  for name, method in registry.METHODS.items():
    row = re.search(rf"^\| \[?`{name}`.*$", TEXT, re.M)
    assert row, f"{name} has no row in the table of docs/merging.md"
    missing = [option.name for option in method.options if f"`{option.name}`" not in row[0]]
    assert not missing, f"{name}'s row in docs/merging.md lacks {missing}"
    assert row[0].endswith(f"| {method.gradients} |"), f"{name}'s row in docs/merging.md: expected {method.gradients}"


def test_a_method_is_one_file(monkeypatch: pytest.MonkeyPatch):
  source = re.search(r"```python\n(.*?)```", TEXT, re.S)[1]
  assert len(source.splitlines()) <= 30
  module = types.ModuleType("imm_jax.merging.methods.soft_swap")
  monkeypatch.setitem(sys.modules, module.__name__, module)
  try:
    exec(compile(source, "soft_swap.py", "exec"), module.__dict__)
    merged = module.soft_swap({"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 3.0])}, temperature=1.0)
    assert merged["w"].tolist() == [0.5, 2.25]
    with pytest.raises(ValueError, match=r"temperature=-1\.0 at 'w': expected 0 <= temperature"):
      module.soft_swap({"w": jnp.zeros(2)}, {"w": jnp.zeros(2)}, temperature=-1)
    assert "soft_swap" in registry.list_disk_methods()
    config = tiny.get_config()  # as of a run with --config.merge.method=soft_swap
    config.merge.method, config.merge.options.temperature = "soft_swap", 0.5
    merge_settings.check_merge_options(config)
    assert merge_settings.get_settings(config).options == {"temperature": 0.5}
    assert "soft_swap: the change that is taken by half" in registry.format_option_help()["temperature"]
  finally:
    registry.METHODS.pop("soft_swap", None)


def test_an_example_draws_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  """Blocks, stacked and separate tensors draw the same share of entries."""
  monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
  file = tmp_path / "random_swap.py"
  file.write_text(re.findall(r"```python\n(.*?)```", TEXT, re.S)[2])
  registry.load_file(file)
  base, other = ({f"layers.{n}.w": np.random.default_rng([i, n]).normal(size=(60, 40)).astype(np.float32)
                  for n in range(2)} for i in range(2))
  folders = {label: write(tmp_path / label, tree) for label, tree in (("base", base), ("models[0]", other))}
  with on_disk.CheckpointSource(folders, block=16) as source:
    plan = registry.METHODS["random_swap"](source, share=0.25, keep=True)
    on_disk.merge(source, [on_disk.Output(tmp_path / "out", plan)], key=np.zeros(2, np.uint32))
  function = runpy.run_path(str(file))["random_swap"]
  merge = lambda *trees, **names: function(
      *trees, share=0.25, keep=True, key=jax.random.wrap_key_data(np.zeros(2, np.uint32)), **names)
  merged, apart = read(tmp_path / "out"), merge(base, other)
  stacked = merge(*({"w": np.stack([*tree.values()])} for tree in (base, other)), names={"w": tuple(base)})["w"]
  for n, name in enumerate(base):
    larger = np.where(np.abs(other[name]) > np.abs(base[name]), other[name], base[name])
    taken = merged[name] != larger
    np.testing.assert_array_equal(merged[name][taken], other[name][taken])
    assert taken.mean() == pytest.approx(0.25 / 2, abs=0.02)  # half of the other model's entries are smaller
    np.testing.assert_array_equal(apart[name], merged[name])
    np.testing.assert_array_equal(stacked[n], merged[name])


def test_an_example_measures_whole_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  """Another model at the base's lengths, in memory and in blocks, as numpy computes it in float64."""
  monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
  file = tmp_path / "norm_swap.py"
  file.write_text(re.findall(r"```python\n(.*?)```", TEXT, re.S)[1])
  registry.load_file(file)
  base, other = ({"w": np.random.default_rng(i).normal(size=(7, 30)).astype(np.float32)} for i in range(2))
  length = lambda x: np.sqrt((x["w"].astype(np.float64)**2).sum())
  expected = other["w"] * (length(base) / length(other))
  folders = {label: write(tmp_path / label, tree) for label, tree in (("base", base), ("models[0]", other))}
  with on_disk.CheckpointSource(folders, block=16) as source:
    outputs = [on_disk.Output(tmp_path / "out", registry.METHODS["norm_swap"](source))]
    on_disk.merge(source, outputs, key=np.zeros(2, np.uint32))
  function = runpy.run_path(str(file))["norm_swap"]
  for found in (read(tmp_path / "out"), function(base, other), jax.jit(function)(base, other)):
    np.testing.assert_allclose(found["w"], expected, rtol=1e-5)
