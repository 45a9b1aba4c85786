"""Runs methods on trees in memory, leaf by leaf, each leaf in one jitted pass."""

import collections
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax.merging import masks, trees
from imm_jax.merging.kernels import Numbers
from imm_jax.merging.registry import Method, Plan
from imm_jax.merging.statistics import Statistic, rows_of
from imm_jax.merging.trees import Leaf, PyTree


def merge(method: Method, given: Mapping[str, Any], options: Mapping[str, Any], *, key: jax.Array | None = None,
          names: PyTree | None = None, layer_axis: int = 0, donate: bool = False) -> PyTree:
  """Merges trees by a method.

  Args:
    method: of the registry.
    given: a tree for each of the method's inputs, a list of them for `models` and `fishers`, None for a base that is
      left out.
    options: of the method, by name.
    key: of the masks, where the method draws any.
    names: tensor names in a tree of the same form; see `imm_jax.merging`.
    layer_axis: where the layers of stacked leaves lie.
    donate: give the first tree's buffers to the result.

  Returns:
    A tree of the first one's form, dtypes and shardings; leaves that are not floating are the first tree's, and a leaf
    that stands in several places (tied weights) is merged once.

  Raises:
    ValueError: see `imm_jax.merging`.
  """
  if method.draws:
    masks.key_words(key)
  labelled = {}
  for label, value in sorted(given.items(), key=lambda item: item[0] != "base"):
    if label in ("models", "fishers"):
      if not isinstance(value, list | tuple):
        raise ValueError(f"{label}: expected a list of trees, got one {type(value).__name__}")
      if label == "models" and not method.least <= len(value) <= (method.most or len(value)):
        raise ValueError(f"models: {len(value)} given; {method.name} takes " + (
            f"{method.least}" if method.most == method.least else f"{method.least} or more"
            if method.most is None else f"{method.least} to {method.most}"))
      labelled |= {f"{label}[{i}]": tree for i, tree in enumerate(value)}
    elif value is not None or label != "base" or "base" in method.inputs:
      labelled[label] = value
  source = TreeSource(labelled, names, layer_axis)
  if "fishers" in given and len(given["fishers"]) != len(given["models"]):
    raise ValueError(f"fishers: {len(given['fishers'])} given for {len(given['models'])} models; expected one for each")
  plan = method(source, **options)
  if source.in_shard_map and method.looks:
    raise ValueError(f"{method.name} cannot run inside jax.shard_map, which shows it a part of each tensor; call it "
                     "outside, on the sharded trees")
  return run(plan, source, key=key, donate=donate)


class TreeSource:
  """The floating leaves of matching trees as the `Source` of a plan."""

  def __init__(self, models: Mapping[str, PyTree], names: PyTree | None = None, layer_axis: int = 0):
    """Matches the trees; raises ValueError as `trees.match` does, or for no tree."""
    if not models:
      raise ValueError("models: none given; expected one or more")
    self.leaves, self.treedef = trees.match(models, names, layer_axis)
    self.num_models, self.has_base, self.first_layer = len(models), "base" in models, 0
    self.layer_axis, self.labels = layer_axis, list(models)
    self._where = {name: (leaf, i) for leaf in self.leaves if trees.is_floating(leaf)
                   for i, name in enumerate(leaf.names)}
    self.names = list(self._where)
    self.traced = any(isinstance(t, jax.core.Tracer) for leaf in self.leaves for t in leaf.tensors)
    self.in_shard_map = bool(jax.sharding.get_abstract_mesh().manual_axes)

  def size(self, name: str) -> int:
    return self._where[name][0].size

  def reduce(self, statistic: Statistic, combine: Callable[..., np.ndarray],
             arguments: Callable[[str], Mapping[str, np.ndarray]] = lambda _: {}, names: Sequence[str] | None = None,
             **static: Any) -> Iterator[tuple[str, np.ndarray]]:
    del combine  # a tensor in memory has one part
    for name in self.names if names is None else names:
      leaf, i = self._where[name]
      # Sums are int64; and where a caller is traced, but these tensors are not, they are known all the same.
      with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        measured = np.asarray(_compiled_statistic(statistic, leaf.axis, tuple(static.items()))(
            leaf.tensors, dict(arguments(name)), np.int32(i)))
      yield name, measured

  def tensors(self, name: str) -> list[jax.Array]:
    leaf, i = self._where[name]
    return [_one(_gathered(jnp.asarray(t)), leaf.axis, i).astype(jnp.float32) for t in leaf.tensors]


def run(plan: Plan, source: TreeSource, *, key: jax.Array | None = None, donate: bool = False) -> PyTree:
  """Merges every leaf by a plan made from this source; the arguments are those of `merge`."""
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
  first, *others = leaf.tensors
  if not leaf.names:  # a stack of no layers
    return jnp.asarray(first)
  scalars = [plan.scalars(name) for name in leaf.names]
  stacked = {key: _stack([s[key] for s in scalars]) for key in scalars[0]}
  sharding = first.sharding if isinstance(first, jax.Array) and not isinstance(first, jax.core.Tracer) else None
  if not isinstance(sharding, jax.NamedSharding):
    sharding = None
  merge = _compiled(plan.kernel, tuple(plan.static.items()), leaf.axis, sharding, donate)
  inside = any(isinstance(t, jax.core.Tracer) for t in leaf.tensors)
  shared = {"key": words, "zero": None if inside else np.uint32(0), "first": np.zeros(2, np.uint32)}
  # float64 leaves of numpy stay what they are, though jax has no such arrays by default.
  with jax.enable_x64(bool(jax.config.jax_enable_x64) or getattr(first, "dtype", None) == np.float64):
    return merge(first, tuple(others), stacked, shared)


def _stack(values: Sequence[Any]) -> Any:
  """The numbers of a leaf's tensors as one array; floats are float32."""
  if any(isinstance(value, jax.Array) for value in values):
    return jnp.stack([jnp.asarray(v, jnp.float32 if jnp.issubdtype(jnp.result_type(v), jnp.floating) else None)
                      for v in values])
  found = np.stack([np.asarray(value) for value in values])
  return found.astype(np.float32) if found.dtype == np.float64 else found


def _one(stacked: jax.Array, axis: int | None, index: Any) -> jax.Array:
  """One tensor of a leaf."""
  return stacked if axis is None else jax.lax.dynamic_index_in_dim(stacked, index, axis, keepdims=False)


def _gathered(tensor: jax.Array) -> jax.Array:
  """Whole on every device where the mesh's axes are explicit: sums and sorts over them must not guess a sharding."""
  sharding = jax.typeof(tensor).sharding
  if sharding.mesh.empty or all(kind != jax.sharding.AxisType.Explicit for kind in sharding.mesh.axis_types):
    return tensor
  return jax.sharding.reshard(tensor, sharding.update(spec=jax.sharding.PartitionSpec()))


def _unconstrained(function: Callable[..., jax.Array], tensor: jax.Array, *, replicated: bool = False,
                   ) -> Callable[..., jax.Array]:
  """The function, where the mesh's axes are explicit with shardings left to the compiler but for the result's."""
  sharding = jax.typeof(tensor).sharding
  if sharding.mesh.empty or all(kind != jax.sharding.AxisType.Explicit for kind in sharding.mesh.axis_types):
    return function
  out = sharding.update(spec=jax.sharding.PartitionSpec()) if replicated else sharding
  return jax.sharding.auto_axes(function, out_sharding=out)


@functools.lru_cache(maxsize=1024)
def _compiled(kernel: Callable[..., jax.Array], static: tuple[tuple[str, Any], ...], axis: int | None,
              sharding: jax.NamedSharding | None, donate: bool) -> Callable[..., jax.Array]:
  """The jitted merge of one leaf; `axis` is where its tensors are stacked, None for one tensor."""

  def compute(first: jax.Array, others: tuple[jax.Array, ...], scalars: Any, shared: Any) -> jax.Array:
    forward = lambda t: t[None] if axis is None else jnp.moveaxis(t, axis, 0)
    tensors = tuple(forward(jnp.asarray(t)).astype(jnp.float32) for t in (first, *others))
    merged = kernel(tensors, Numbers(scalars, tensors[0].ndim), shared, **dict(static)).astype(jnp.result_type(first))
    return merged[0] if axis is None else jnp.moveaxis(merged, 0, axis)

  def merge(first: jax.Array, others: tuple[jax.Array, ...], scalars: Any, shared: Any) -> jax.Array:
    return _unconstrained(compute, first)(first, others, scalars, shared)

  placed = {} if sharding is None else {"out_shardings": sharding}
  return jax.jit(merge, donate_argnums=(0,) if donate else (), **placed)


@functools.lru_cache(maxsize=1024)
def _compiled_statistic(statistic: Statistic, axis: int | None, static: tuple[tuple[str, Any], ...],
                        ) -> Callable[..., jax.Array]:
  """The jitted statistic of one tensor of a leaf."""

  def compute(tensors: tuple[jax.Array, ...], arguments: Any, index: jax.Array) -> jax.Array:
    found = [_one(jnp.asarray(t), axis, index) for t in tensors]
    if dict(static).get("rows"):
      found = [rows_of(t) for t in found]
    return statistic(found, **arguments, **dict(static))

  def measure(tensors: tuple[jax.Array, ...], arguments: Any, index: jax.Array) -> jax.Array:
    return _unconstrained(compute, tensors[0], replicated=True)(tensors, arguments, index)

  return jax.jit(measure)
