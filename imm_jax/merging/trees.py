"""Trees of tensors: their names, whether they match, and settings that vary by tensor.

A leaf is one tensor, or several of equal shape stacked on its first axis (layers under `lax.scan`); a tuple of names
says so. Every setting may be a number, a list interpolated over the layers, or a mapping from regex to either.
"""

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
# Names of a leaf's tensors: one, or one for each tensor stacked on its first axis.
Names = str | tuple[str, ...]
# A number; a list interpolated over the layers; a mapping from a regex of tensor names to either.
Setting = float | Sequence[float] | Mapping[str, float | Sequence[float]]
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")


def default_names(tree: PyTree) -> PyTree:
  """Names of a tree's leaves where the caller has none: path keys joined by dots.

  >>> default_names({"a": {"b": np.zeros(2)}})
  {'a': {'b': 'a.b'}}
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path, simple=True, separator="."), tree)


def layer_of(name: str) -> int | None:
  """The layer that a tensor belongs to, or None.

  >>> layer_of("model.layers.3.mlp.up_proj.weight"), layer_of("lm_head.weight")
  (3, None)
  """
  found = _LAYER.search(name)
  return int(found[1]) if found else None


def count_layers(names: Sequence[str]) -> int:
  """One more than the highest layer in these names; 0 where none has a layer."""
  return max((layer_of(name) or 0 for name in names if layer_of(name) is not None), default=-1) + 1


def resolve(setting: Setting, name: str, num_layers: int, what: str) -> float:
  """A setting's value for one tensor.

  Args:
    setting: a number; a list, interpolated from the first layer to the last (a tensor outside the layers takes the
      first value); or a mapping from regex to either, of which the first that is found in the name counts.
    name: of the tensor.
    num_layers: of the model.
    what: the setting's name, for errors.

  Raises:
    ValueError: for an empty list, a value that is no finite number, or a mapping in which nothing matches.

  >>> resolve([0.0, 1.0], "model.layers.1.mlp.up_proj.weight", 3, "weight")
  0.5
  >>> resolve({"mlp": 0.3, ".*": 0.7}, "model.layers.1.mlp.up_proj.weight", 3, "weight")
  0.3
  """
  if isinstance(setting, Mapping):
    for pattern, value in setting.items():
      try:
        found = re.search(pattern, name)
      except re.error as e:
        raise ValueError(f"{what}: {pattern!r} is no regular expression ({e})") from e
      if found:
        return resolve(value, name, num_layers, what)
    raise ValueError(f"{what}: no pattern of {list(setting)} matches {name!r}; add '.*' for the others")
  if isinstance(setting, Sequence | np.ndarray) and not isinstance(setting, str):
    if any(isinstance(value, Sequence | Mapping | np.ndarray) and not isinstance(value, str) for value in setting):
      raise ValueError(f"{what}={setting!r}: a list over the layers holds numbers only")
    values = [resolve(value, name, num_layers, what) for value in setting]
    if not values:
      raise ValueError(f"{what}: an empty list; expected one value or more")
    if not num_layers and len(values) > 1:
      raise ValueError(f"{what}={setting!r}: a list over the layers, but no name such as {name!r} has layers.<n>.; "
                       "give names")
    layer = layer_of(name)
    # As mergekit has it: tensors outside the layers stand at the beginning, a single layer at the end.
    position = 0.0 if layer is None else layer / (num_layers - 1) if num_layers > 1 else 1.0
    index = position * (len(values) - 1)
    low = min(int(index), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    return (1 - (index - low)) * values[low] + (index - low) * values[high]
  if not isinstance(setting, int | float | np.number) or isinstance(setting, bool) or not np.isfinite(setting):
    raise ValueError(f"{what}={setting!r}: expected a finite number, a list of them, or a mapping from regex to these")
  return float(setting)


class Leaf:
  """The same leaf of every model, its names, and how to put the result back."""

  def __init__(self, path: str, names: Names, tensors: tuple[Any, ...]):
    self.path = path
    self.stacked = not isinstance(names, str)
    self.names: tuple[str, ...] = tuple(names) if self.stacked else (names,)
    self.tensors = tensors

  @property
  def size(self) -> int:
    """Elements of one of its tensors."""
    return int(np.prod(jnp.shape(self.tensors[0]))) // max(1, len(self.names))


def match(trees: Mapping[str, PyTree], names: PyTree | None) -> tuple[list[Leaf], Any]:
  """The leaves of trees that match, and the first tree's form.

  Args:
    trees: label -> tree; the first one is what the others are compared with.
    names: tensor names in a tree of the same form, or None for `default_names`.

  Returns:
    (leaves, treedef).

  Raises:
    ValueError: unless all trees have the same paths and shapes, floating leaves where the first has them, and equal
      values in the others; it names every path that differs.
  """
  (first_label, first), *rest = trees.items()
  expected = _by_path(first)
  problems = []
  for label, tree in rest:
    found = _by_path(tree)
    problems += [f"{label} lacks {path}" for path in expected if path not in found]
    problems += [f"{label} has {path}, {first_label} has not" for path in found if path not in expected]
    for path in expected.keys() & found.keys():
      a, b = expected[path], found[path]
      if jnp.shape(a) != jnp.shape(b):
        problems.append(f"{path} is {jnp.shape(a)} in {first_label}, {jnp.shape(b)} in {label}")
      elif _floating(a) != _floating(b):
        problems.append(f"{path} is {jnp.result_type(a)} in {first_label}, {jnp.result_type(b)} in {label}")
      elif not _floating(a) and not _equal(a, b):
        problems.append(f"{path} of {jnp.result_type(a)} differs between {first_label} and {label}; only floating "
                        "leaves are merged")
  if problems:
    raise ValueError("the trees do not match: " + "; ".join(sorted(problems)))
  others = [_by_path(tree) for _, tree in rest]
  treedef = jax.tree.structure(first)
  # A leaf's names may be a tuple, so they are found by the tree's form and not by their own.
  flat_names = treedef.flatten_up_to(default_names(first) if names is None else names)
  leaves = []
  for (path, leaf), leaf_names in zip(expected.items(), flat_names, strict=True):
    shape = jnp.shape(leaf)
    if not isinstance(leaf_names, str) and (not shape or len(leaf_names) != shape[0]):
      raise ValueError(f"{len(leaf_names)} names for a leaf of shape {shape}: {leaf_names}")
    leaves.append(Leaf(path, leaf_names, (leaf, *(other[path] for other in others))))
  doubled = [n for n, count in collections.Counter(n for leaf in leaves for n in leaf.names).items() if count > 1]
  if doubled:
    raise ValueError(f"names: {doubled[:8]} stand for several tensors")
  return leaves, treedef


def is_floating(leaf: Leaf) -> bool:
  """Whether a leaf is merged; others are copied."""
  return _floating(leaf.tensors[0])


def _by_path(tree: PyTree) -> dict[str, Any]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  found = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
  # Two paths may read alike ({"a": {"b": x}, "a.b": y}); then they are written out.
  return found if len(found) == len(leaves) else {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _floating(leaf: Any) -> bool:
  return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _equal(a: Any, b: Any) -> bool:
  if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
    return True  # values are not known under jit
  return a is b or bool(np.array_equal(np.asarray(a), np.asarray(b)))
