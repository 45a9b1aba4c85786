"""What the author of a merging method is told of mistakes, in memory and on disk."""

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
from imm_jax.merging import declarations, on_disk, registry
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
