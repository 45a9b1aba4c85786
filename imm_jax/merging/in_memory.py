"""Runs a plan on trees in memory, leaf by leaf, each leaf in one jitted pass."""

import collections
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax.merging import masks, trees
from imm_jax.merging.methods import Plan
from imm_jax.merging.statistics import Statistic
from imm_jax.merging.trees import Leaf, PyTree


class TreeSource:
  """The floating leaves of matching trees as the `Source` of a plan."""

  def __init__(self, models: Mapping[str, PyTree], names: PyTree | None):
    """Matches the trees; raises ValueError as `trees.match` does, or for no tree."""
    if not models:
      raise ValueError("models: none given; expected one or more")
    self.leaves, self.treedef = trees.match(models, names)
    self.num_models = len(models)
    self._where = {name: (leaf, i) for leaf in self.leaves if trees.is_floating(leaf)
                   for i, name in enumerate(leaf.names)}
    self.names = list(self._where)

  @classmethod
  def with_base(cls, base: PyTree, models: Sequence[PyTree], names: PyTree | None) -> "TreeSource":
    """A base and one or more models."""
    if not models:
      raise ValueError("models: none given; expected one or more beside the base")
    return cls({"base": base, **{f"models[{i}]": model for i, model in enumerate(models)}}, names)

  def size(self, name: str) -> int:
    return self._where[name][0].size

  def reduce(self, statistic: Statistic, combine: Callable[..., np.ndarray],
             arguments: Callable[[str], Mapping[str, np.ndarray]] = lambda _: {}, names: Sequence[str] | None = None,
             **static: Any) -> Iterator[tuple[str, np.ndarray]]:
    del combine  # a tensor in memory has one part
    for name in self.names if names is None else names:
      leaf, i = self._where[name]
      if any(isinstance(t, jax.core.Tracer) for t in leaf.tensors):
        raise ValueError("this method looks at the values of whole tensors first, so it cannot run under jax.jit; it "
                         "is jitted inside")
      with jax.enable_x64(True):  # for sums in int64
        measured = _compiled_statistic(statistic, leaf.stacked, tuple(static.items()))(
            tuple(map(_auto, leaf.tensors)), dict(arguments(name)), np.int32(i))
      yield name, np.asarray(measured)


def run(plan: Plan, source: TreeSource, *, key: jax.Array | None = None, donate: bool = False) -> PyTree:
  """Merges every leaf.

  Args:
    plan: made from this source.
    source: the trees.
    key: of the masks, where the plan draws any.
    donate: give the first tree's buffers to the result.

  Returns:
    A tree of the first one's form, dtypes and shardings; leaves that are not floating are the first tree's, and a leaf
    that stands in several places (tied weights) is merged once.
  """
  words = np.zeros(2, np.uint32) if key is None else masks.key_words(key)
  merged: dict[tuple[int, ...], Any] = {}
  # A buffer that stands elsewhere too, as base and start say, is still needed.
  uses = collections.Counter(id(tensor) for leaf in source.leaves for tensor in leaf.tensors)
  result = []
  for leaf in source.leaves:
    if not trees.is_floating(leaf):
      result.append(leaf.tensors[0])
      continue
    same = tuple(id(t) for t in leaf.tensors)
    if same not in merged:
      merged[same] = _merge_leaf(plan, leaf, words, donate and uses[id(leaf.tensors[0])] == 1)
    result.append(merged[same])
  return source.treedef.unflatten(result)


def _merge_leaf(plan: Plan, leaf: Leaf, words: Any, donate: bool) -> jax.Array:
  scalars = [plan.scalars(name) for name in leaf.names]
  stacked = {key: np.stack([s[key] for s in scalars]) for key in scalars[0]} if scalars else {}
  first, *others = leaf.tensors
  if not leaf.names:  # a stack of no layers
    return jnp.asarray(first)
  sharding = first.sharding if isinstance(first, jax.Array) and not isinstance(first, jax.core.Tracer) else None
  if not isinstance(sharding, jax.NamedSharding):
    sharding = None
  merge = _compiled(plan.kernel, tuple(plan.static.items()), leaf.stacked, sharding, donate)
  inside = any(isinstance(t, jax.core.Tracer) for t in leaf.tensors)
  shared = {"key": words, "zero": None if inside else np.uint32(0), "first": np.zeros(2, np.uint32)}
  return merge(first, tuple(others), stacked, shared)


def _auto(tensor: Any) -> Any:
  """The same array on a mesh whose axes the compiler may use as it likes; nothing moves."""
  sharding = tensor.sharding if isinstance(tensor, jax.Array) else None
  if not isinstance(sharding, jax.NamedSharding) or not isinstance(sharding.mesh, jax.sharding.Mesh):
    return tensor
  mesh = sharding.mesh
  if all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types):
    return tensor
  mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=(jax.sharding.AxisType.Auto,) * mesh.devices.ndim)
  return jax.device_put(tensor, jax.NamedSharding(mesh, sharding.spec))


@functools.lru_cache(maxsize=1024)
def _compiled(kernel: Callable[..., jax.Array], static: tuple[tuple[str, Any], ...], stacked: bool,
              sharding: jax.NamedSharding | None, donate: bool) -> Callable[..., jax.Array]:
  """The jitted merge of one leaf."""

  def merge(first: jax.Array, others: tuple[jax.Array, ...], scalars: Any, shared: Any) -> jax.Array:
    tensors = (first, *others) if stacked else tuple(jnp.asarray(t)[None] for t in (first, *others))
    merged = kernel(tensors, scalars, shared, **dict(static)).astype(first.dtype)
    return merged if stacked else merged[0]

  placed = {} if sharding is None else {"out_shardings": sharding}
  return jax.jit(merge, donate_argnums=(0,) if donate else (), **placed)


@functools.lru_cache(maxsize=1024)
def _compiled_statistic(statistic: Statistic, stacked: bool, static: tuple[tuple[str, Any], ...],
                        ) -> Callable[..., jax.Array]:
  """The jitted statistic of one tensor of a leaf."""

  def measure(tensors: tuple[jax.Array, ...], arguments: Any, index: jax.Array) -> jax.Array:
    one = [jax.lax.dynamic_index_in_dim(t, index, keepdims=False) for t in tensors] if stacked else list(tensors)
    return statistic(one, **arguments, **dict(static))

  return jax.jit(measure)
