"""What the author of a merging method is told of mistakes, in memory and on disk."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imm_jax.errors import UserError
from imm_jax.merging import declarations, on_disk, registry, users_kernels
from imm_jax.merging.options import Option
from tests import REPO
from tests.merge_folders import one_line, read, run, write

TREES = [{"w": np.arange(20, dtype=np.float32).reshape(4, 5) + i} for i in range(2)]
T = Option("t", "a number", 0.5)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
  """Methods that a test registers are gone after it."""
  before = dict(registry.METHODS)
  yield
  registry.METHODS.clear()
  registry.METHODS.update(before)


def register(compute: Any, *inputs: str, **attributes: Any) -> Any:
  def mine(tensors: Any, numbers: Any, shared: Any) -> Any:
    """Does what the test is about."""
    return compute(tensors, numbers)

  return registry.method(*inputs or ("base", "other"), **attributes)(mine)


def merge_on_disk(folder: Path, **options: Any) -> None:
  folders = [write(folder / name, tree) for name, tree in zip("ab", TREES, strict=True)]
  on_disk.merge_folders("mine", dict(zip(("base", "models[0]"), folders, strict=True)), {folder / "out": options})


@pytest.mark.parametrize(("compute", "said"), [
    (lambda tensors, _: tensors[0][..., :1], r"mine returned float32 \(1, 4, 1\), expected an array of floats \(1, 4"),
    (lambda tensors, _: tensors[0].sum(), r"mine returned float32 \(\), expected an array of floats"),
    (lambda tensors, _: tensors[0] > 0, r"mine returned bool \(1, 4, 5\), expected an array of floats"),
    (lambda *_: None, r"mine returned nothing, expected an array of floats"),
    (lambda tensors, _: tensors, r"mine returned tuple, expected an array of floats"),
    (lambda tensors, numbers: tensors[0] * numbers["tt"], r"mine: numbers has 't', not 'tt'")])
def test_what_a_kernel_returns_is_checked(compute: Any, said: str, tmp_path: Path):
  merge = register(compute, options=(T,))
  for call in (lambda: merge(*TREES), lambda: jax.jit(merge)(*TREES)):
    with pytest.raises(ValueError, match=f"^w: {said}"):
      call()
  with pytest.raises(UserError, match="^w: " + said.partition(r" \(1, 4")[0]):
    merge_on_disk(tmp_path)


PART, STACKED = "gives a part of a tensor other values than the whole", "gives stacked tensors other values than each"


@pytest.mark.parametrize(("compute", "attributes", "said"), [
    (lambda t, _: t[0] + jnp.mean(t[1], tuple(range(1, t[0].ndim)), keepdims=True), {}, PART),
    (lambda t, _: t[0] * jnp.minimum(1, 0.1 / jnp.max(jnp.abs(t[1] - t[0]), -1, keepdims=True)), {}, PART),
    (lambda t, _: jnp.roll(t[1], 1, axis=-1), {}, PART),
    (lambda t, _: t[0] + jnp.sum(t[1], -1, keepdims=True), {"draws": True}, PART),
    (lambda t, _: t[0] + jnp.sum(t[1], 1, keepdims=True), {"whole": "row"}, PART),
    (lambda t, _: t[0] / jnp.linalg.norm(t[1]), {"whole": "tensor"}, STACKED),
    (lambda t, _: t[0] * jax.random.bernoulli(jax.random.key(0), 0.5, t[0].shape), {"whole": "tensor"}, STACKED)],
    ids=["mean", "maximum", "neighbor", "drawn", "column", "norm", "random"])
def test_a_kernel_that_mixes_entries_is_refused(compute: Any, attributes: dict, said: str, tmp_path: Path):
  """Files would have other numbers in every merge, or than trees."""
  merge = register(compute, **attributes)
  with pytest.raises(UserError, match=f"^{__file__}: mine {said}"):
    merge_on_disk(tmp_path)
  options = {"key": jax.random.key(0)} if "draws" in attributes else {}
  for call in (merge, jax.jit(merge)):
    with pytest.raises(ValueError, match=f"mine {said}"):
      call(*TREES, **options)


@pytest.mark.parametrize(("compute", "attributes"), [
    (lambda t, n: t[0] + n["t"] * jnp.tanh(t[1] - t[0]), {}),
    (lambda t, n: t[0] / (n["t"] + jnp.sum(t[1], -1, keepdims=True)), {"whole": "row"}),
    (lambda t, n: t[0] / (n["t"] + jnp.sum(t[1], tuple(range(1, t[0].ndim)), keepdims=True)), {"whole": "tensor"})],
    ids=["elementwise", "row", "tensor"])
def test_a_kernel_that_says_what_it_mixes_is_not(compute: Any, attributes: dict, tmp_path: Path):
  merge = register(compute, options=(T,), **attributes)
  merge_on_disk(tmp_path)
  np.testing.assert_allclose(read(tmp_path / "out")["w"], merge(*TREES)["w"], rtol=1e-6)


def test_numbers_and_sizes_hide_no_mixing(tmp_path: Path):
  """A number may be 0 at first or in some layers, and a kernel may need more entries than a part has."""
  mean = lambda d: jnp.mean(d, tuple(range(1, d.ndim)), keepdims=True)
  merge = register(lambda tensors, numbers: tensors[0] + numbers["t"] * mean(tensors[1]), options=(T,))
  merge(*TREES, t=0.0)
  for strength in (1.0, {"v": 0.0, "w": 1.0}):
    with pytest.raises(ValueError, match=PART):
      merge(*({"v": tree["w"], **tree} for tree in TREES), t=strength)
  registry.METHODS.pop("mine")
  largest = lambda d: jnp.sort(d.reshape(len(d), -1))[:, [-20]].reshape(-1, *[1] * (d.ndim - 1))
  register(lambda tensors, _: jnp.where(tensors[1] >= largest(tensors[1]), tensors[1], tensors[0])
           if tensors[0][0].size >= 20 else 1 / 0)
  with pytest.raises(UserError, match=PART):
    merge_on_disk(tmp_path)


def test_own_methods_run_inside_transformations():
  """The trial of the kernel is not traced, and left out where nothing can be computed apart."""
  merge = register(lambda tensors, numbers: tensors[0] + numbers["t"] * tensors[1], options=(T,))
  mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.PartitionSpec("x")
  both = lambda a, b: merge({"w": a}, {"w": b})["w"]
  first, second = (jnp.asarray(tree["w"]) for tree in TREES)
  for call in (jax.shard_map(both, mesh=mesh, in_specs=(rows, rows), out_specs=rows), jax.vmap(both), jax.jit(both)):
    np.testing.assert_allclose(call(first, second), first + 0.5 * second)
    users_kernels._checked.clear()
  np.testing.assert_allclose(jax.grad(lambda a: both(a, second).sum())(first), jnp.ones_like(first))


def test_what_a_kernel_raises_is_one_line(tmp_path: Path):
  register(lambda tensors, _: tensors[0] if tensors[1].max() > 1 else tensors[1])
  with pytest.raises(UserError, match=rf"^w: {__file__}:\d+: mine raised TracerBoolConversionError: Attempted boolean"):
    merge_on_disk(tmp_path)
  with pytest.raises(UserError, match=r"@method needs the names of the inputs"):
    registry.method(lambda tensors, numbers, shared: tensors[0])


def test_changes_of_code_are_seen(tmp_path: Path):
  """Comments and the config of a run do not count, nor do methods of the package."""
  file, text = tmp_path / "mine.py", write_method(tmp_path / "mine.py", "mine").read_text()
  digests = []
  same = f"# A comment.\n{text}\ndef get_config():\n  return 1\n"
  for content in (text, same, text.replace("tensors[0]", "tensors[1]")):
    file.write_text(content)
    registry.METHODS.pop("mine", None)
    registry.load_file(file)
    digests.append(users_kernels.digest_code(registry.METHODS["mine"].kernel))
  assert digests[0] == digests[1] != digests[2]
  assert not users_kernels.digest_code(registry.METHODS["slerp"].kernel)
  file.write_bytes(b"\xef\xbb\xbf" + text.encode())  # as some editors begin files
  registry.load_file(file)
  assert users_kernels.digest_code(registry.METHODS["mine"].kernel) == digests[0]
  registry.METHODS.pop("mine")
  scope: dict[str, Any] = {}
  exec(text, scope)  # its functions have no module
  np.testing.assert_array_equal(scope["mine"](*TREES)["w"], TREES[0]["w"] + 0.5)


def test_nan_from_finite_inputs_is_an_error(tmp_path: Path):
  """The first entry of the base is 0, and infinity divided by infinity is NaN too."""
  register(lambda tensors, _: tensors[0] / tensors[0])
  with pytest.raises(UserError, match=r"^w: mine gave NaN from finite inputs \(1 of 20 entries\)"):
    merge_on_disk(tmp_path)
  registry.METHODS.pop("mine")
  register(lambda tensors, _: jnp.exp(tensors[1] * 100))
  folders = [tmp_path / "a", tmp_path / "b"]
  found = on_disk.merge_folders("mine", {"base": folders[0], "models[0]": folders[1]}, {tmp_path / "wide": {}})
  assert found.overflowed == [{"w": 20}]


@pytest.mark.parametrize(("inputs", "attributes", "said"), [
    (("tuned", "base"), {}, "inputs tuned, base: expected each once, in the order base, tuned"),
    (("base", "base"), {}, "inputs base, base: expected each once"),
    (("base", "model"), {}, "input 'model': did you mean models?"),
    (("models", "other"), {}, "inputs models and other: cannot be combined"),
    ((), {"min_models": 2}, "min_models and max_models: count the input models"),
    ((), {"strenght": "t"}, "@method takes no 'strenght'; did you mean strength?"),
    ((), {"options": T}, "options: expected a tuple of Option(...); with a single one, (Option(...),)"),
    ((), {"options": (T, T)}, "option t: is declared twice"),
    ((), {"options": (T, Option("s", "a number", key="t"))}, "option s: another option has its key 't'"),
    ((), {"options": (Option("seed", "a seed", 1),)}, "option seed: the name is taken, by an argument or a flag"),
    ((), {"options": (Option("names", "a name", 1),)}, "option names: the name is taken"),
    ((), {"options": (Option("v", "a number", 1),)}, "option v: the name is taken"),
    ((), {"options": (Option("a-b", "a number", 1),)}, "option a-b: expected a name as of an argument"),
    ((), {"options": (Option("c", "numbers", [1], kind="vector"),)}, "option c: a vector reaches the kernel through"),
    ((), {"options": (Option("c", "a switch", True, kind="flag"),)}, "option c: the kernel needs the keyword argument"),
    ((), {"options": (Option("c", "a word", "x", kind="choice"),)}, "option c: choices are for options of kind choice"),
    ((), {"options": (Option("c", "a number", kind="numbr"),)}, "option c: kind 'numbr': did you mean number?"),
    ((), {"options": (Option("c", "a number", 2.0, high=1),)}, "the default of c=2.0: expected c <= 1"),
    ((), {"options": (Option("c", "a number", per_model=True),)}, "option c: per_model is for numbers of a method"),
    ((), {"options": (Option("densities", "a word", "x", kind="choice", choices=("x",)),)},
     "option densities: a run sets the option of this name, a number; rename it"),
    ((), {"options": (T,), "strength": "s"}, "strength='s': expected NAME or '1 - NAME' of an option that is a number"),
    ((), {"whole": "column"}, "whole='column': expected 'row', 'tensor' or None")])
def test_a_declaration_that_cannot_work_is_refused(inputs: tuple, attributes: dict, said: str):
  with pytest.raises(UserError) as error:
    register(lambda tensors, _: tensors[0], *inputs, **attributes)
  assert str(error.value).startswith(f"{__file__}: mine: {said}")
  assert "mine" not in registry.METHODS


def test_a_name_is_registered_once(tmp_path: Path):
  """Both files are named; the same file may be loaded again."""
  with pytest.raises(UserError, match=r"slerp: .*slerp\.py and .*own\.py register a method of this name"):
    registry.load_file(write_method(tmp_path / "own.py", "slerp"))
  own = write_method(tmp_path / "own.py", "mine")
  registry.load_file(own)
  registry.load_file(own)
  with pytest.raises(UserError, match=r"mine: .*own\.py and .*other\.py register a method of this name"):
    registry.load_file(write_method(tmp_path / "other.py", "mine"))
  own.write_text(own.read_text() * 2)
  with pytest.raises(UserError, match=r"own\.py: registers two methods called mine"):
    registry.load_file(own)


def test_constants_reach_the_kernel(tmp_path: Path):
  merge = register(lambda tensors, numbers: tensors[0] + numbers["c"], options=(
      Option("c", "a number", 2.0, kind="constant"),))
  np.testing.assert_array_equal(merge(*TREES)["w"], TREES[0]["w"] + 2)
  np.testing.assert_array_equal(merge(*TREES, c=3)["w"], TREES[0]["w"] + 3)


def test_reading_tensors_must_be_declared(tmp_path: Path):
  prepare = lambda source, settings: ([*source.reduce(None, None)], {})
  merge = register(lambda tensors, _: tensors[0], prepare=prepare)
  with pytest.raises(UserError, match=r"mine: its prepare reads tensors; @method needs measures=True"):
    merge(*TREES)


def test_flags_of_the_command_are_reserved():
  """An option called like one would define it twice."""
  code = "import imm_jax.merge; from absl import flags; print(*flags.FLAGS)"
  done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
  assert {*done.stdout.split()} - {*registry.format_option_help()} <= declarations.RESERVED


def test_a_method_of_the_users_own_file(tmp_path: Path):
  """Its options become flags of `imm merge`, and mistakes in it are one line."""
  models = [str(write(tmp_path / name, tree)) for name, tree in zip("ab", TREES, strict=True)]
  given = (f"--base={models[0]}", f"--models={models[1]}", f"--out={tmp_path / 'out'}", "--method=mine")
  own = write_method(tmp_path / "own.py", "mine", "Option('tilt', 'a number', 0.5)")
  done = run(f"--import={own}", *given, "--tilt=0.25")
  assert done.returncode == 0, done.stderr
  np.testing.assert_array_equal(read(tmp_path / "out")["w"], TREES[0]["w"] + 0.25)
  record = json.loads((tmp_path / "out/merge.json").read_text())
  assert (record["file"], len(record["code"])) == (str(own), 16)
  (tmp_path / "recipe.yml").write_text(f"merge_method: mine\nbase_model: {models[0]}\n"
                                       f"models: [{{model: {models[1]}}}]\nparameters: {{tilt: 0.25}}\n")
  done = run(f"--import={own}", f"--recipe={tmp_path / 'recipe.yml'}", f"--out={tmp_path / 'by_recipe'}")
  assert done.returncode == 0, done.stderr
  np.testing.assert_array_equal(read(tmp_path / "by_recipe")["w"], TREES[0]["w"] + 0.25)
  own.write_text(own.read_text().replace("'tilt'", "'seed'"))
  assert "own.py: mine: option seed: the name is taken, by an argument" in one_line(run(f"--import={own}", *given))
  own.write_text("import nothing_of_this_name\n")
  assert "own.py: cannot be imported: ModuleNotFoundError" in one_line(run("--import", str(own), *given))


def write_method(path: Path, name: str, option: str = "Option('tilt', 'a number', 0.5)") -> Path:
  """Writes a file with a method that adds its option to the base."""
  path.write_text(f"""\
from imm_jax.merging.options import Option
from imm_jax.merging.registry import method

@method("base", "other", options=({option},))
def {name}(tensors, numbers, shared):
  "Adds a number."
  return tensors[0] + numbers["tilt"]
""")
  return path
