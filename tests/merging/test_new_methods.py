"""What the author of a merging method is told of mistakes, in memory and on disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imm_jax.errors import UserError
from imm_jax.merging import on_disk, registry
from imm_jax.merging.options import Option
from tests.merge_folders import write

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
    (lambda tensors, _: tensors[0][..., :1], r"mine returned float32 \(1, 4, 1\), expected an array of floats \(1, 4, 5"),
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
