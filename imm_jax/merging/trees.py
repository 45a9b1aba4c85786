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
_LAYER = re.compile(r"(?:^|[._])(?:layers?|blocks?|h|encoderblock)[._](\d+)(?:\.|$)")
# What counts, and no weight: the first model's is taken.
_COUNTERS = re.compile(r"(?:^|\.)(?:num_batches_tracked|rngs(?:\.\w+)?\.count)(?:\.value)?$")


def default_names(tree: PyTree) -> PyTree:
  """Names of a tree's leaves where the caller has none: path keys joined by dots.

  >>> default_names({"a": {"b": np.zeros(2)}})
  {'a': {'b': 'a.b'}}
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path, simple=True, separator="."), tree)


def layer_of(name: str) -> int | None:
  """The layer that a tensor belongs to, or None.

  >>> layer_of("model.layers.3.mlp.up_proj.weight"), layer_of("lm_head.weight"), layer_of("params.layers_0.kernel")
  (3, None, 0)
  """
  found = _LAYER.search(name)
  return int(found[1]) if found else None


def count_layers(names: Sequence[str]) -> int:
  """One more than the highest layer in these names; 0 where none has a layer."""
  return max((layer_of(name) or 0 for name in names if layer_of(name) is not None), default=-1) + 1


def is_counter(name: str) -> bool:
  """Whether a tensor counts batches or random draws: no weight, and nothing depends on it.

  >>> is_counter("bn1.num_batches_tracked")
  True
  """
  return _COUNTERS.search(name) is not None


def resolve(setting: Setting, name: str, num_layers: int, what: str, first_layer: int = 0) -> Any:
  """A setting's value for one tensor.

  Args:
    setting: a number; a list, interpolated from the first layer to the last (a tensor outside the layers takes the
      first value); or a mapping from regex to either, of which the first that is found in the name counts.
    name: of the tensor.
    num_layers: of the model.
    what: the setting's name, for errors.
    first_layer: where a list begins, if not at layer 0.

  Returns:
    A float, or what jax traces.

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
        return resolve(value, name, num_layers, what, first_layer)
    raise ValueError(f"{what}: no pattern of {list(setting)} matches {name!r}; add '.*' for the others")
  if isinstance(setting, np.ndarray | jax.Array) and setting.ndim == 0:
    setting = setting if isinstance(setting, jax.core.Tracer) else setting.item()
  if isinstance(setting, jax.core.Tracer) and setting.ndim == 0:
    if not _floating(setting):
      raise ValueError(f"{what}: {setting.dtype} is traced by jax; expected floating numbers")
    return setting
  if isinstance(setting, jax.core.Tracer):
    if setting.ndim != 1 or not setting.size:
      raise ValueError(f"{what}: an array {list(setting.shape)}; expected a number, or one for each layer")
    return _interpolate(setting, name, num_layers, what, first_layer)
  if isinstance(setting, Sequence | np.ndarray | jax.Array) and not isinstance(setting, str):
    if any(isinstance(value, Mapping) or (not isinstance(value, str) and np.ndim(value)) for value in setting):
      raise ValueError(f"{what}={setting!r}: a list over the layers holds numbers only")
    values = [resolve(value, name, num_layers, what) for value in setting]
    if not values:
      raise ValueError(f"{what}: an empty list; expected one value or more")
    return _interpolate(values, name, num_layers, what, first_layer)
  if not isinstance(setting, int | float | np.number) or isinstance(setting, bool) or not np.isfinite(setting):
    raise ValueError(f"{what}={setting!r}: expected a finite number, a list of them, or a mapping from regex to these")
  return float(setting)


def _interpolate(values: Any, name: str, num_layers: int, what: str, first_layer: int) -> Any:
  """The value for a tensor of a list, or an array [n], over the layers."""
  count = num_layers - first_layer
  if count <= 0 and len(values) > 1:
    raise ValueError(f"{what}: a list over the layers, but no name such as {name!r} has layers.<n>.; give names")
  layer = layer_of(name)
  # As mergekit has it: tensors outside the layers stand at the beginning, a single layer at the end.
  position = 0.0 if layer is None else (layer - first_layer) / (count - 1) if count > 1 else 1.0
  index = position * (len(values) - 1)
  low = min(int(index), len(values) - 1)
  high = min(low + 1, len(values) - 1)
  return (1 - (index - low)) * values[low] + (index - low) * values[high]


class Leaf:
  """The same leaf of every model, its names, and how to put the result back."""

  def __init__(self, path: str, names: Names, tensors: tuple[Any, ...], layer_axis: int = 0):
    self.path = path
    # Where its tensors are stacked; None for a single one.
    self.axis = None if isinstance(names, str) else layer_axis
    self.names: tuple[str, ...] = (names,) if isinstance(names, str) else tuple(names)
    self.tensors = tensors

  @property
  def size(self) -> int:
    """Elements of one of its tensors."""
    return int(np.prod(np.shape(self.tensors[0]))) // max(1, len(self.names))


def match(trees: Mapping[str, PyTree], names: PyTree | None, layer_axis: int = 0) -> tuple[list[Leaf], Any]:
  """The leaves of trees that match, and the first tree's form.

  Args:
    trees: label -> tree; the first one is what the others are compared with.
    names: tensor names in a tree of the same form, or None for `default_names`.
    layer_axis: where the layers of stacked leaves lie.

  Returns:
    (leaves, treedef).

  Raises:
    ValueError: unless all trees have the same paths and shapes, floating leaves where the first has them, and equal
      values in the others; it names every path that differs.
  """
  (first_label, first), *rest = trees.items()
  by_path = {label: _by_path(tree) for label, tree in trees.items()}
  expected = by_path[first_label]
  problems = []
  for label, found in by_path.items():
    problems += [f"{path} of {label} is a ShapeDtypeStruct, without values; use jax.eval_shape on the whole call"
                 for path, leaf in found.items() if isinstance(leaf, jax.ShapeDtypeStruct)]
  if problems:
    raise ValueError("; ".join(problems[:8]))
  for label, _ in rest:
    found = by_path[label]
    problems += [f"{label} lacks {path}" for path in expected if path not in found]
    problems += [f"{label} has {path}, {first_label} has not" for path in found if path not in expected]
    for path in expected.keys() & found.keys():
      problems += _differences(path, first_label, expected[path], label, found[path])
  if problems:
    raise ValueError("the trees do not match: " + "; ".join(sorted(problems)))
  treedef = jax.tree.structure(first)
  # A leaf's names may be a tuple, so they are found by the tree's form and not by their own.
  try:
    flat_names = treedef.flatten_up_to(default_names(first) if names is None else names)
  except (TypeError, ValueError) as e:
    raise ValueError(f"names: expected a tree of the models' form, with a name or a tuple of names for each leaf ({e})"
                     ) from e
  leaves = []
  for (path, leaf), leaf_names in zip(expected.items(), flat_names, strict=True):
    shape = np.shape(leaf) if _is_array(leaf) else ()
    if not isinstance(leaf_names, str):
      if not isinstance(leaf_names, tuple | list) or not all(isinstance(name, str) for name in leaf_names):
        raise ValueError(f"names: {leaf_names!r} at {path}: expected a name, or a tuple of names")
      if not -len(shape) <= layer_axis < len(shape) or len(leaf_names) != shape[layer_axis]:
        raise ValueError(f"{path}: {len(leaf_names)} names for a leaf of shape {shape} with its layers in axis "
                         f"{layer_axis}: {leaf_names}")
    leaves.append(Leaf(path, leaf_names, tuple(found[path] for found in by_path.values()), layer_axis))
  doubled = [n for n, count in collections.Counter(
      n for leaf in leaves if is_floating(leaf) for n in leaf.names).items() if count > 1]
  if doubled:
    raise ValueError(f"names: {doubled[:8]} stand for several tensors")
  return leaves, treedef


def is_floating(leaf: Leaf) -> bool:
  """Whether a leaf is merged; others are copied."""
  return _floating(leaf.tensors[0])


def _differences(path: str, first_label: str, first: Any, label: str, other: Any) -> list[str]:
  """What keeps two leaves from being merged."""
  if _is_array(first) != _is_array(other):
    return [f"{path} is {type(first).__name__} in {first_label}, {type(other).__name__} in {label}"]
  if not _is_array(first):
    # A function or a text, as equinox modules hold them.
    return [] if first is other or bool(first == other) else [
        f"{path} is {first!r} in {first_label}, {other!r} in {label}; only floating leaves are merged"]
  if np.shape(first) != np.shape(other):
    return [f"{path} is {np.shape(first)} in {first_label}, {np.shape(other)} in {label}"]
  kinds = jnp.result_type(first), jnp.result_type(other)
  if _floating(first) != _floating(other):
    return [f"{path} is {kinds[0]} in {first_label}, {kinds[1]} in {label}"]
  # The state of random numbers, and what counts batches, is no weight.
  same = _floating(first) or jnp.issubdtype(kinds[0], jax.dtypes.prng_key) or _COUNTERS.search(path)
  if same or _equal(first, other):
    return []
  return [f"{path} of {kinds[0]} differs between {first_label} and {label}; only floating leaves are merged"]


def _is_array(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex)


def _by_path(tree: PyTree) -> dict[str, Any]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  found = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
  # Two paths may read alike ({"a": {"b": x}, "a.b": y}); then they are written out.
  return found if len(found) == len(leaves) else {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _floating(leaf: Any) -> bool:
  return _is_array(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _equal(a: Any, b: Any) -> bool:
  if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
    return True  # values are not known under jit
  return a is b or bool(np.array_equal(np.asarray(a), np.asarray(b)))
