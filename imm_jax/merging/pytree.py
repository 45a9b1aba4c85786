"""Merging models as jitted maps over pytrees; needs nothing but jax and numpy.

Arithmetic is float32 from what is stored, rounded once to the base's dtype. Random masks belong to a tensor's name and
row: row r of the tensor named n is drawn from `fold_in(fold_in(key, crc32(n)), r)` in 16-bit draws, two to a 32-bit
word (low half first). So a seed drops the same entries in memory, streamed from disk, stacked or layer by layer, and on
any device or mesh. A tensor of one axis is one row.
"""

import math
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
_STEPS = 65_536


def quantise_drop_rate(drop_rate: float) -> int:
  """A drop rate in steps of 1/65536, which is what is drawn and what the rescale uses.

  Raises:
    ValueError: unless 0 <= drop_rate < 1 after rounding.

  >>> quantise_drop_rate(0.2)
  13107
  """
  steps = round(drop_rate * _STEPS) if math.isfinite(drop_rate) else -1
  if not 0 <= steps < _STEPS or drop_rate < 0:
    raise ValueError(f"drop_rate={drop_rate}: expected 0 <= drop_rate < 1")
  return steps


def default_names(tree: PyTree) -> PyTree:
  """Names of a tree's leaves where the caller has none: path keys joined by dots.

  >>> default_names({"a": {"b": np.zeros(2)}})
  {'a': {'b': 'a.b'}}
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path, simple=True, separator="."), tree)


def dare(delta: PyTree, *, drop_rate: float, key: jax.Array, names: PyTree | None = None) -> PyTree:
  """Drops entries of a delta at random and rescales the rest, so that its mean stays (DARE, arXiv:2311.03099, eq. 1-2).

  m ~ Bernoulli(p), delta' = (1 - m) * delta / (1 - p), with p quantised to 1/65536.

  Args:
    delta: a pytree of arrays, tuned minus base.
    drop_rate: p, in [0, 1).
    key: a threefry key, `jax.random.key(seed)`.
    names: tensor names in a tree of the same form; a tuple names the tensors stacked on a leaf's first axis.

  Returns:
    The tree with the same dtypes.

  Raises:
    ValueError: for a drop rate out of range, or names that do not fit.

  >>> kept = dare({"w": jnp.ones((64, 64))}, drop_rate=0.5, key=jax.random.key(0))["w"]
  >>> sorted(set(kept.ravel().tolist()))
  [0.0, 2.0]
  """
  check_same(delta)
  codes, _ = _codes_and_scales(delta, names, None)
  return _dare(delta, codes, key, jnp.uint32(quantise_drop_rate(drop_rate)))


def imm(base: PyTree, start: PyTree, tuned: PyTree, *, base_weight: float, drop_rate: float, key: jax.Array,
        names: PyTree | None = None) -> PyTree:
  """Merges a tuned model with the base, in one pass (IMM, eq. 5 and 6).

  delta = tuned - start; delta' = DARE(delta); merged = a * base + (1 - a) * (start + delta').

  At a drop rate of 0 that is a * base + (1 - a) * tuned; a base weight of 1 or 0 gives the base or start + delta'
  exactly.

  Args:
    base: the model all rounds are merged with.
    start: the model that was tuned; the base in the first round.
    tuned: the model after SFT.
    base_weight: a, in [0, 1].
    drop_rate: DARE's p, in [0, 1).
    key: a threefry key, `jax.random.key(seed)`.
    names: tensor names in a tree of the same form; a tuple names the tensors stacked on a leaf's first axis.

  Returns:
    The merged tree in the base's dtypes.

  Raises:
    ValueError: for trees that do not match (with every path), or parameters out of range.

  >>> merged = imm({"w": jnp.zeros(3)}, {"w": jnp.zeros(3)}, {"w": jnp.ones(3)}, base_weight=0.25, drop_rate=0.0,
  ...              key=jax.random.key(0))
  >>> merged["w"].tolist()
  [0.75, 0.75, 0.75]
  """
  return _merge(base, start, tuned, base_weight, drop_rate, key, names, None)


def iimm(base: PyTree, start: PyTree, tuned: PyTree, *, base_weight: float, drop_rate: float, importance: np.ndarray,
         key: jax.Array, names: PyTree) -> PyTree:
  """IMM with every layer's delta scaled by its importance (IIMM, eq. 7).

  Layer n's delta' is multiplied by N * I_n / sum(I) before eq. 6; tensors outside the layers keep theirs.

  Args:
    base: see `imm`.
    start: see `imm`.
    tuned: see `imm`.
    base_weight: see `imm`.
    drop_rate: see `imm`.
    importance: I, [N] layer importance scores, not negative, with a positive sum.
    key: see `imm`.
    names: tensor names; those with `layers.<n>.` belong to layer n.

  Returns:
    The merged tree in the base's dtypes.

  Raises:
    ValueError: see `imm`; also for importance that is no such vector, or a layer it does not cover.

  >>> tree = lambda x: {"a": jnp.full(2, x), "b": jnp.full(2, x)}
  >>> merged = iimm(tree(0.), tree(0.), tree(1.), base_weight=0., drop_rate=0., importance=np.array([1., 3.]),
  ...               key=jax.random.key(0), names={"a": "layers.0.w", "b": "layers.1.w"})
  >>> merged["a"].tolist(), merged["b"].tolist()
  ([0.5, 0.5], [1.5, 1.5])
  """
  importance = np.asarray(importance, np.float64)
  if importance.ndim != 1 or not np.isfinite(importance).all() or (importance < 0).any() or importance.sum() <= 0:
    raise ValueError("importance: expected one finite score >= 0 for each layer, with a positive sum")
  return _merge(base, start, tuned, base_weight, drop_rate, key, names,
                (importance * len(importance) / importance.sum()).astype(np.float32))


def _merge(base: PyTree, start: PyTree, tuned: PyTree, base_weight: float, drop_rate: float, key: jax.Array,
           names: PyTree | None, layer_scales: np.ndarray | None) -> PyTree:
  if not 0 <= base_weight <= 1:
    raise ValueError(f"base_weight={base_weight}: expected 0 <= base_weight <= 1")
  steps = jnp.uint32(quantise_drop_rate(drop_rate))
  check_same(base, start=start, tuned=tuned)
  codes, scales = _codes_and_scales(base, names, layer_scales)
  return _imm(base, start, tuned, codes, scales, key, steps, jnp.float32(base_weight))


def check_same(base: PyTree, **others: PyTree) -> None:
  """Raises ValueError unless all trees have the base's paths and shapes and floating dtypes; it names what differs."""
  expected, problems = _shapes(base), []
  for label, tree in {"base": base, **others}.items():
    found = _shapes(tree)
    problems += [f"{label} lacks {path}" for path in expected if path not in found]
    problems += [f"{label} has {path}, base has not" for path in found if path not in expected]
    problems += [f"{path} is {shape} in base, {found[path][0]} in {label}"
                 for path, (shape, _) in expected.items() if path in found and found[path][0] != shape]
    problems += [f"{label} has {path} of {dtype}, which is not floating" for path, (_, dtype) in found.items()
                 if not jnp.issubdtype(dtype, jnp.floating)]
  if problems:
    raise ValueError("the trees do not match: " + "; ".join(problems))


def _shapes(tree: PyTree) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="."): (jnp.shape(leaf), jnp.result_type(leaf))
          for path, leaf in leaves}


def _codes_and_scales(tree: PyTree, names: PyTree | None, layer_scales: np.ndarray | None) -> tuple[PyTree, PyTree]:
  """For every leaf crc32 of its names and its layers' scales: [] for a tensor, [L] for a stacked leaf."""
  leaves, treedef = jax.tree.flatten(tree)
  # A leaf's names may be a tuple, so they are found by the tree's form and not by their own.
  flat = treedef.flatten_up_to(default_names(tree) if names is None else names)
  for leaf, leaf_names in zip(leaves, flat, strict=True):
    if not isinstance(leaf_names, str) and len(leaf_names) != jnp.shape(leaf)[0]:
      raise ValueError(f"{len(leaf_names)} names for a leaf of shape {jnp.shape(leaf)}: {leaf_names}")
  return (treedef.unflatten([_leaf_codes(leaf_names) for leaf_names in flat]),
          treedef.unflatten([_leaf_scales(leaf_names, layer_scales) for leaf_names in flat]))


def _leaf_codes(names: str | tuple[str, ...]) -> np.ndarray:
  if isinstance(names, str):
    return np.uint32(zlib.crc32(names.encode()))
  return np.array([zlib.crc32(name.encode()) for name in names], np.uint32)


def _leaf_scales(names: str | tuple[str, ...], layer_scales: np.ndarray | None) -> np.ndarray:
  def scale(name: str) -> np.float32:
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    if layer_scales is None or layer is None:
      return np.float32(1)
    if int(layer[1]) >= len(layer_scales):
      raise ValueError(f"importance has {len(layer_scales)} layers, but there is {name}")
    return layer_scales[int(layer[1])]

  return scale(names) if isinstance(names, str) else np.array([scale(n) for n in names], np.float32)


def _dropped(code: jax.Array, key: jax.Array, steps: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """True where an entry of one tensor is dropped."""
  rows, row_shape = (shape[0], shape[1:]) if len(shape) > 1 else (1, shape)
  columns = math.prod(row_shape)
  row_keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, code), jnp.arange(rows))
  words = jax.vmap(lambda k: jax.random.bits(k, ((columns + 1) // 2,), jnp.uint32))(row_keys)
  draws = jnp.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(rows, -1)[:, :columns]
  return (draws < steps).reshape(shape)


def _drop_and_rescale(delta: jax.Array, codes: jax.Array, key: jax.Array, steps: jax.Array) -> jax.Array:
  """DARE on one leaf in float32."""
  if codes.ndim:
    dropped = jax.vmap(lambda code: _dropped(code, key, steps, delta.shape[1:]))(codes)
  else:
    dropped = _dropped(codes, key, steps, delta.shape)
  return jnp.where(dropped, 0.0, delta * (_STEPS / (_STEPS - steps.astype(jnp.float32))))


@jax.jit
def _dare(delta: PyTree, codes: PyTree, key: jax.Array, steps: jax.Array) -> PyTree:
  drop = lambda d, c: _drop_and_rescale(d.astype(jnp.float32), c, key, steps).astype(d.dtype)
  return jax.tree.map(drop, delta, codes)


@jax.jit
def _imm(base: PyTree, start: PyTree, tuned: PyTree, codes: PyTree, scales: PyTree, key: jax.Array, steps: jax.Array,
         base_weight: jax.Array) -> PyTree:

  def leaf(base: jax.Array, start: jax.Array, tuned: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    b, s, t = (x.astype(jnp.float32) for x in (base, start, tuned))
    scale = scale.reshape(scale.shape + (1,) * (b.ndim - scale.ndim))
    moved = s + scale * _drop_and_rescale(t - s, codes, key, steps)
    # s + (t - s) need not be t in float32: where nothing is dropped or scaled, take t itself.
    moved = jnp.where((steps == 0) & (scale == 1), t, moved)
    merged = base_weight * b + (1 - base_weight) * moved
    merged = jnp.where(base_weight == 1, b, jnp.where(base_weight == 0, moved, merged))
    return merged.astype(base.dtype)

  return jax.tree.map(leaf, base, start, tuned, codes, scales)
