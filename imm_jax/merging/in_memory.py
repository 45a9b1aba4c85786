"""Merges trees in memory, leaf by leaf, each leaf in one jitted call."""

import collections
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from imm_jax.merging import kernels, masks, trees, users_kernels
from imm_jax.merging.registry import MergeMethod, Plan
from imm_jax.merging.statistics import Statistic, as_matrix
from imm_jax.merging.trees import Leaf, PyTree


def merge(method: MergeMethod, inputs: Mapping[str, Any], options: Mapping[str, Any], *, key: jax.Array | None = None,
          names: PyTree | None = None, layer_axis: int = 0, donate: bool = False) -> PyTree:
  """Merges trees by a method.

  Args:
    method: a method of the registry.
    inputs: a tree for each of the method's inputs, a list of them for `models` and `fishers`, None for an omitted base.
    options: the method's options by name.
    key: key of the masks, for methods that draw any.
    names: tensor names in a tree of the same structure; see `imm_jax.merging`.
    layer_axis: axis of the layers in stacked leaves.
    donate: donate the first tree's buffers to the result.

  Returns:
    A tree with the structure, dtypes and shardings of the first one. Non-floating leaves are the first tree's. Leaves
    that are the same arrays at several paths (tied weights) are merged once, with the first path's masks, unless an
    option differs between these paths.

  Raises:
    ValueError: see `imm_jax.merging`.
  """
  if method.draws:
    masks.key_words(key)
  labeled: dict[str, PyTree] = {}
  for label, value in sorted(inputs.items(), key=lambda item: item[0] != "base"):
    if label in ("models", "fishers"):
      if not isinstance(value, list | tuple):
        raise ValueError(f"{label}: expected a list of trees, got one {type(value).__name__}")
      if label == "models" and not method.accepts(len(value)):
        raise ValueError(f"models: {len(value)} given; {method.name} takes {method.count_in_words}")
      labeled |= {f"{label}[{i}]": tree for i, tree in enumerate(value)}
    elif value is not None or label != "base" or "base" in method.inputs:
      labeled[label] = value
  is_list = {label: isinstance(tree, list | tuple) for label, tree in labeled.items()}
  for label in method.inputs:
    if is_list.get(label) and not all(is_list.values()):
      other = next(other for other, others_is_list in is_list.items() if not others_is_list)
      raise ValueError(f"{label}: expected a tree as {other} is, got a {type(labeled[label]).__name__}")
  source = TreeSource(labeled, names, layer_axis)
  if "fishers" in inputs and len(inputs["fishers"]) != len(inputs["models"]):
    raise ValueError(f"fishers: {len(inputs['fishers'])} given for {len(inputs['models'])} models; expected one for "
                     "each")
  plan = method(source, **options)
  if source.in_shard_map and method.needs_whole_tensors:
    raise ValueError(f"{method.name} cannot run inside jax.shard_map, which shows it a part of each tensor; call it "
                     "outside, on the sharded trees")
  return run(plan, source, key=key, donate=donate)


class TreeSource:
  """Implements `Source` for the floating leaves of matching trees."""

  def __init__(self, models: Mapping[str, PyTree], names: PyTree | None = None, layer_axis: int = 0):
    """Matches the trees; raises ValueError as `trees.match` does, or if there is no tree."""
    if not models:
      raise ValueError("models: none given; expected one or more")
    self.leaves, self.treedef = trees.match(models, names, layer_axis)
    self.num_models, self.has_base, self.first_layer = len(models), "base" in models, 0
    self.layer_axis = layer_axis
    self.labels: Sequence[str] = list(models)
    self._where = {name: (leaf, i) for leaf in self.leaves if trees.is_floating(leaf)
                   for i, name in enumerate(leaf.names)}
    self.names: Sequence[str] = list(self._where)
    self.layers: Mapping[str, int] = trees.count_layers(self.names)
    self.output_layers: Mapping[str, int] = self.layers
    self.traced = any(isinstance(t, jax.core.Tracer) for leaf in self.leaves for t in leaf.tensors)
    self.in_shard_map = bool(jax.sharding.get_abstract_mesh().manual_axes)

  def size(self, name: str) -> int:
    return self._where[name][0].size

  def reduce(self, statistic: Statistic, combine: Callable[..., np.ndarray],
             arguments: Callable[[str], Mapping[str, ArrayLike]] = lambda _: {}, names: Sequence[str] | None = None,
             **static: Any) -> Iterator[tuple[str, np.ndarray]]:
    del combine  # a tensor in memory has one part
    for name in self.names if names is None else names:
      leaf, i = self._where[name]
      # Sums are int64. These tensors are concrete, so their statistics are computed even while a caller is traced.
      with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        measured = np.asarray(_compiled_statistic(statistic, leaf.axis, tuple(static.items()))(
            leaf.tensors, dict(arguments(name)), np.int32(i)))
      yield name, measured

  def tensors(self, name: str) -> list[jax.Array]:
    leaf, i = self._where[name]
    return [_select_tensor(_replicate(jnp.asarray(t)), leaf.axis, i).astype(jnp.float32) for t in leaf.tensors]


def run(plan: Plan, source: TreeSource, *, key: jax.Array | None = None, donate: bool = False) -> PyTree:
  """Merges every leaf by a plan made from this source; the arguments are those of `merge`."""
  words = np.zeros(2, np.uint32) if key is None else masks.key_words(key)
  merged: dict[tuple[int, ...], tuple[Mapping[str, Any], jax.Array]] = {}
  # A buffer that is used elsewhere too (base and start may be the same tree) must not be donated.
  uses = collections.Counter(id(tensor) for leaf in source.leaves for tensor in leaf.tensors)
  result = []
  if not source.in_shard_map:  # where nothing can be computed apart
    users_kernels.check_kernel(plan, source.names, source.num_models)
  for leaf in source.leaves:
    if not trees.is_floating(leaf):
      result.append(leaf.tensors[0])
      continue
    if not leaf.names:  # a stack of no layers
      result.append(jnp.asarray(leaf.tensors[0]))
      continue
    numbers = [plan.numbers(name) for name in leaf.names]
    stacked = {key: _stack([s[key] for s in numbers]) for key in numbers[0]}
    identity = tuple(id(t) for t in leaf.tensors)
    if identity in merged:
      first, tensor = merged[identity]
      if "code" in stacked and stacked["code"].shape == first["code"].shape:
        stacked["code"] = first["code"]
      if _are_equal(stacked, first):
        result.append(tensor)
        continue
    tensor = _merge_leaf(plan, leaf, stacked, words, donate and uses[id(leaf.tensors[0])] == 1)
    merged.setdefault(identity, (stacked, tensor))
    result.append(tensor)
  return source.treedef.unflatten(result)


def _are_equal(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
  """Returns whether two tensors' numbers are known to be equal; traced ones only if they are the same."""
  traced = lambda x: isinstance(x, jax.core.Tracer)
  return all(first[key] is second[key] or (not (traced(first[key]) or traced(second[key]))
             and np.array_equal(first[key], second[key])) for key in first)


def _merge_leaf(plan: Plan, leaf: Leaf, stacked: Mapping[str, Any], words: Any, donate: bool) -> jax.Array:
  first, *others = leaf.tensors
  sharding = first.sharding if isinstance(first, jax.Array) and not isinstance(first, jax.core.Tracer) else None
  if not isinstance(sharding, jax.NamedSharding):
    sharding = None
  merge = _compiled(plan.kernel, tuple(plan.static.items()), leaf.axis, sharding, donate)
  inside = any(isinstance(t, jax.core.Tracer) for t in leaf.tensors)
  shared = {"key": words, "zero": None if inside else np.uint32(0), "first": np.zeros(2, np.uint32)}
  # Preserve float64 leaves of numpy, a dtype that jax disables by default.
  is_enabled = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
  with jax.enable_x64(is_enabled or getattr(first, "dtype", None) == np.float64):
    try:
      return merge(first, tuple(others), stacked, shared)
    except kernels.KernelError as e:
      raise ValueError(f"{leaf.names[0]}: {e}") from None


def _stack(values: Sequence[Any]) -> Any:
  """Stacks the numbers of a leaf's tensors into one array; floats become float32."""
  if any(isinstance(value, jax.Array) for value in values):
    return jnp.stack([jnp.asarray(v, jnp.float32 if jnp.issubdtype(jnp.result_type(v), jnp.floating) else None)
                      for v in values])
  stacked = np.stack([np.asarray(value) for value in values])
  return stacked.astype(np.float32) if stacked.dtype == np.float64 else stacked


def _select_tensor(stacked: jax.Array, axis: int | None, index: Any) -> jax.Array:
  """Returns one tensor of a leaf."""
  return stacked if axis is None else jax.lax.dynamic_index_in_dim(stacked, index, axis, keepdims=False)


def _replicate(tensor: jax.Array) -> jax.Array:
  """Replicates a tensor on a mesh of explicit axes, where sums and sorts would need an output sharding."""
  sharding = jax.typeof(tensor).sharding
  if not _is_explicit(sharding):
    return tensor
  return jax.sharding.reshard(tensor, sharding.update(spec=jax.sharding.PartitionSpec()))


def _is_explicit(sharding: Any) -> bool:
  """Returns whether any axis of a sharding's mesh is explicit."""
  return any(kind == jax.sharding.AxisType.Explicit for kind in sharding.mesh.axis_types)


def _sharding(tensors: Sequence[jax.Array]) -> Any:
  """Returns the sharding of the first tensor on a mesh of explicit axes; without any, of the first tensor."""
  shardings = [jax.typeof(tensor).sharding for tensor in tensors]
  return next(filter(_is_explicit, shardings), shardings[0])


def _auto_sharded(function: Callable[..., jax.Array], out_sharding: Any) -> Callable[..., jax.Array]:
  """Lets the compiler choose a function's inner shardings where the mesh's axes are explicit; fixes the result's."""
  return jax.sharding.auto_axes(function, out_sharding=out_sharding) if _is_explicit(out_sharding) else function


@functools.lru_cache(maxsize=1024)
def _compiled(kernel: Callable[..., jax.Array], static: tuple[tuple[str, Any], ...], axis: int | None,
              sharding: jax.NamedSharding | None, donate: bool) -> Callable[..., jax.Array]:
  """Compiles the merge of one leaf; `axis` is where its tensors are stacked, None for a single tensor."""

  def compute(first: jax.Array, others: tuple[jax.Array, ...], numbers: Any, shared: Any) -> jax.Array:
    forward = lambda t: t[None] if axis is None else jnp.moveaxis(t, axis, 0)
    tensors = tuple(forward(jnp.asarray(t)).astype(jnp.float32) for t in (first, *others))
    merged = kernels.call(kernel, tensors, numbers, shared, dict(static)).astype(jnp.result_type(first))
    return merged[0] if axis is None else jnp.moveaxis(merged, 0, axis)

  def merge(first: jax.Array, others: tuple[jax.Array, ...], numbers: Any, shared: Any) -> jax.Array:
    return _auto_sharded(compute, _sharding((first, *others)))(first, others, numbers, shared)

  donated = (0,) if donate else ()
  if sharding is None:
    return jax.jit(merge, donate_argnums=donated)
  return jax.jit(merge, donate_argnums=donated, out_shardings=sharding)


@functools.lru_cache(maxsize=1024)
def _compiled_statistic(statistic: Statistic, axis: int | None, static: tuple[tuple[str, Any], ...],
                        ) -> Callable[..., jax.Array]:
  """Compiles a statistic of one tensor of a leaf."""

  def compute(tensors: tuple[jax.Array, ...], arguments: Any, index: jax.Array) -> jax.Array:
    selected = [_select_tensor(jnp.asarray(t), axis, index) for t in tensors]
    if dict(static).get("rows"):
      selected = [as_matrix(t) for t in selected]
    return statistic(selected, **arguments, **dict(static))

  def measure(tensors: tuple[jax.Array, ...], arguments: Any, index: jax.Array) -> jax.Array:
    replicated = _sharding(tensors).update(spec=jax.sharding.PartitionSpec())
    return _auto_sharded(compute, replicated)(tensors, arguments, index)

  return jax.jit(measure)
