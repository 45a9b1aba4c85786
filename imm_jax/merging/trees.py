"""Names and matches the tensors of trees, and resolves settings that vary by tensor.

A leaf is one tensor, or several of equal shape stacked on one axis (layers under `lax.scan`), which a tuple of names
indicates. A setting is a number, a list interpolated over the layers, or a mapping from regex to either.
"""

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

PyTree = Any
# Names of a leaf's tensors: one, or a tuple for stacked tensors.
Names = str | tuple[str, ...]
# A number; a list interpolated over the layers; a mapping from a regex of tensor names to either.
Setting = ArrayLike | Sequence[ArrayLike] | Mapping[str, ArrayLike | Sequence[ArrayLike]]
_LAYER = re.compile(r"(?:^|[._])(?:layers?|blocks?|h|encoderblock)[._](\d+)(?:\.|$)")
# Counters, which are not weights: the first model's are taken.
_COUNTERS = re.compile(r"(?:^|\.)(?:num_batches_tracked|rngs(?:\.\w+)?\.count)(?:\.value)?$")


def default_names(tree: PyTree) -> PyTree:
  """Names a tree's leaves by their path keys, joined by dots.

  >>> default_names({"a": {"b": np.zeros(2)}})
  {'a': {'b': 'a.b'}}
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path, simple=True, separator="."), tree)


def get_layer(name: str) -> int | None:
  """Returns the number of the layer that a tensor belongs to, or None.

  >>> get_layer("model.layers.3.mlp.up_proj.weight"), get_layer("lm_head.weight"), get_layer("params.layers_0.kernel")
  (3, None, 0)
  """
  match = _LAYER.search(name)
  return int(match[1]) if match else None


def get_stack(name: str) -> str | None:
  """Returns the path of the stack of layers that a tensor belongs to, or None.

  >>> get_stack("model.layers.3.mlp.up_proj.weight"), get_stack("vision_tower.encoder.layers.0.norm.weight")
  ('model.layers', 'vision_tower.encoder.layers')
  """
  match = _LAYER.search(name)
  return name[:match.start(1) - 1] if match else None


def count_layers(names: Sequence[str]) -> dict[str, int]:
  """Returns the number of layers of each stack in these names: one more than the highest layer number.

  >>> count_layers(["encoder.block.0.w", "encoder.block.1.w", "decoder.block.0.w", "lm_head.weight"])
  {'encoder.block': 2, 'decoder.block': 1}
  """
  counts: dict[str, int] = {}
  for name in names:
    if (match := _LAYER.search(name)) is not None:
      stack = name[:match.start(1) - 1]
      counts[stack] = max(counts.get(stack, 0), int(match[1]) + 1)
  return counts


def get_num_layers(name: str, counts: Mapping[str, int]) -> int:
  """Returns the number of layers of a tensor's stack, by `count_layers`; outside the layers that of the largest."""
  return counts.get(get_stack(name) or "", max(counts.values(), default=0))


def is_counter(name: str) -> bool:
  """Returns whether a tensor counts batches or random draws, so that models may differ in it.

  >>> is_counter("bn1.num_batches_tracked")
  True
  """
  return _COUNTERS.search(name) is not None


def resolve(setting: Setting, name: str, num_layers: int, option_name: str, first_layer: int = 0) -> Any:
  """Resolves a setting for one tensor.

  Args:
    setting: a number; a list, interpolated from the first layer to the last (a tensor outside the layers takes the
      first value); or a mapping from regex to either, of which the first that is found in the name counts.
    name: name of the tensor.
    num_layers: number of layers of the stack that the tensor belongs to; outside the layers that of any.
    option_name: name of the option, for errors.
    first_layer: layer at which a list begins.

  Returns:
    A float, or a traced scalar.

  Raises:
    ValueError: for an empty list, a value that is not a finite number, or a mapping without a match.

  >>> resolve([0.0, 1.0], "model.layers.1.mlp.up_proj.weight", 3, "weight")
  0.5
  >>> resolve({"mlp": 0.3, ".*": 0.7}, "model.layers.1.mlp.up_proj.weight", 3, "weight")
  0.3
  """
  if isinstance(setting, Mapping):
    for pattern, value in setting.items():
      try:
        matches = re.search(pattern, name)
      except re.error as e:
        raise ValueError(f"{option_name}: {pattern!r} is no regular expression ({e})") from e
      if matches:
        return resolve(value, name, num_layers, option_name, first_layer)
    raise ValueError(f"{option_name}: no pattern of {list(setting)} matches {name!r}; add one for the others: '.*', in "
                     "a recipe an entry with only a value")
  if isinstance(setting, np.ndarray | jax.Array) and setting.ndim == 0:
    setting = setting if isinstance(setting, jax.core.Tracer) else setting.item()
  if isinstance(setting, jax.core.Tracer) and setting.ndim == 0:
    if not _is_floating_array(setting):
      raise ValueError(f"{option_name}: {setting.dtype} is traced by jax; expected floating numbers")
    return setting
  if isinstance(setting, jax.core.Tracer):
    if setting.ndim != 1 or not setting.size:
      raise ValueError(f"{option_name}: an array {list(setting.shape)}; expected a number, or one for each layer")
    return _interpolate(setting, name, num_layers, option_name, first_layer)
  if isinstance(setting, Sequence | np.ndarray | jax.Array) and not isinstance(setting, str):
    if any(isinstance(value, Mapping) or (not isinstance(value, str) and np.ndim(value)) for value in setting):
      raise ValueError(f"{option_name}={setting!r}: a list over the layers holds numbers only")
    values = [resolve(value, name, num_layers, option_name) for value in setting]
    if not values:
      raise ValueError(f"{option_name}: an empty list; expected one value or more")
    return _interpolate(values, name, num_layers, option_name, first_layer)
  if not isinstance(setting, int | float | np.number) or isinstance(setting, bool) or not np.isfinite(setting):
    raise ValueError(f"{option_name}={setting!r}: expected a finite number, a list of them, or a mapping from regex to "
                     "these")
  return float(setting)


def _interpolate(values: Any, name: str, num_layers: int, option_name: str, first_layer: int) -> Any:
  """Interpolates a list, or an array [n], over the layers at a tensor's layer."""
  count = num_layers - first_layer
  if count <= 0 and len(values) > 1:
    raise ValueError(f"{option_name}: a list over the layers, but no name such as {name!r} has layers.<n>.; give names")
  layer = get_layer(name)
  # As in mergekit, tensors outside the layers take the first value, and a single layer takes the last.
  position = 0.0 if layer is None else min((layer - first_layer) / (count - 1), 1.0) if count > 1 else 1.0
  index = position * (len(values) - 1)
  low = min(int(index), len(values) - 1)
  high = min(low + 1, len(values) - 1)
  return (1 - (index - low)) * values[low] + (index - low) * values[high]


class Leaf:
  """Holds the leaf at one path of every model, and the names of its tensors."""

  def __init__(self, path: str, names: Names, tensors: tuple[Any, ...], layer_axis: int = 0):
    self.path = path
    # Axis on which its tensors are stacked; None for a single tensor.
    self.axis = None if isinstance(names, str) else layer_axis
    self.names: tuple[str, ...] = (names,) if isinstance(names, str) else tuple(names)
    self.tensors = tensors

  @property
  def size(self) -> int:
    """Number of entries of one of its tensors."""
    return int(np.prod(np.shape(self.tensors[0]))) // max(1, len(self.names))


def match(trees: Mapping[str, PyTree], names: PyTree | None, layer_axis: int = 0) -> tuple[list[Leaf], Any]:
  """Pairs up the leaves of trees that must match.

  Args:
    trees: label -> tree; the others are compared with the first.
    names: tensor names in a tree of the same structure, or None for `default_names`.
    layer_axis: axis of the layers in stacked leaves.

  Returns:
    (leaves, treedef of the first tree).

  Raises:
    ValueError: if the trees differ in paths or shapes, in which leaves are floating, or in the values of other leaves;
      names every path that differs.
  """
  (first_label, first), *rest = trees.items()
  by_path = {label: _leaves_by_path(tree) for label, tree in trees.items()}
  expected = by_path[first_label]
  problems = []
  for label, leaves in by_path.items():
    problems += [f"{path} of {label} is a ShapeDtypeStruct, without values; use jax.eval_shape on the whole call"
                 for path, leaf in leaves.items() if isinstance(leaf, jax.ShapeDtypeStruct)]
  if problems:
    raise ValueError("; ".join(problems[:8]))
  for label, _ in rest:
    actual = by_path[label]
    problems += [f"{label} lacks {path}" for path in expected if path not in actual]
    problems += [f"{label} has {path}, {first_label} has not" for path in actual if path not in expected]
    for path in expected.keys() & actual.keys():
      problems += _find_differences(path, first_label, expected[path], label, actual[path])
  if problems:
    raise ValueError("the trees do not match: " + "; ".join(sorted(problems)))
  treedef: Any = jax.tree.structure(first)
  # A leaf's names may be a tuple, which jax would flatten as a subtree; so flatten up to the first tree's structure.
  try:
    flat_names = treedef.flatten_up_to(default_names(first) if names is None else names)
  except (TypeError, ValueError) as e:
    raise ValueError(f"names: expected a tree of the models' form, with a name or a tuple of names for each leaf ({e})"
                     ) from e
  matched = []
  for (path, leaf), leaf_names in zip(expected.items(), flat_names, strict=True):
    shape = np.shape(leaf) if _is_array(leaf) else ()
    if not isinstance(leaf_names, str):
      if not isinstance(leaf_names, tuple | list) or not all(isinstance(name, str) for name in leaf_names):
        raise ValueError(f"names: {leaf_names!r} at {path}: expected a name, or a tuple of names")
      if not -len(shape) <= layer_axis < len(shape) or len(leaf_names) != shape[layer_axis]:
        raise ValueError(f"{path}: {len(leaf_names)} names for a leaf of shape {shape} with its layers in axis "
                         f"{layer_axis}: {leaf_names}")
    matched.append(Leaf(path, leaf_names, tuple(by_name[path] for by_name in by_path.values()), layer_axis))
  duplicates = [n for n, count in collections.Counter(
      n for one in matched if is_floating(one) for n in one.names).items() if count > 1]
  if duplicates:
    raise ValueError(f"names: {duplicates[:8]} name several tensors")
  return matched, treedef


def is_floating(leaf: Leaf) -> bool:
  """Returns whether a leaf is floating and so is merged; others are copied."""
  return _is_floating_array(leaf.tensors[0])


def _find_differences(path: str, first_label: str, first: Any, label: str, other: Any) -> list[str]:
  """Lists the reasons why two leaves cannot be merged."""
  if _is_array(first) != _is_array(other):
    return [f"{path} is {type(first).__name__} in {first_label}, {type(other).__name__} in {label}"]
  if not _is_array(first):
    # A function or a string, such as equinox modules have.
    return [] if first is other or bool(first == other) else [
        f"{path} is {first!r} in {first_label}, {other!r} in {label}; only floating leaves are merged"]
  if np.shape(first) != np.shape(other):
    return [f"{path} is {np.shape(first)} in {first_label}, {np.shape(other)} in {label}"]
  kinds = jnp.result_type(first), jnp.result_type(other)
  if _is_floating_array(first) != _is_floating_array(other):
    return [f"{path} is {kinds[0]} in {first_label}, {kinds[1]} in {label}"]
  # Random states and counters are not weights, so they may differ.
  may_differ = _is_floating_array(first) or jnp.issubdtype(kinds[0], jax.dtypes.prng_key) or _COUNTERS.search(path)
  if may_differ or _are_equal(first, other):
    return []
  return [f"{path} of {kinds[0]} differs between {first_label} and {label}; only floating leaves are merged"]


def _is_array(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex)


def _leaves_by_path(tree: PyTree) -> dict[str, Any]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  by_path = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
  # Dotted paths may collide ({"a": {"b": x}, "a.b": y}); then use the unambiguous form.
  return by_path if len(by_path) == len(leaves) else {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _is_floating_array(leaf: Any) -> bool:
  return _is_array(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _are_equal(a: Any, b: Any) -> bool:
  if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
    return True  # values are not concrete under jit
  return a is b or bool(np.array_equal(np.asarray(a), np.asarray(b)))
