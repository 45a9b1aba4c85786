"""HF checkpoint folders <-> parameter trees.

The tree mirrors the checkpoint's names, with layers stacked: `layers.self_attn.q_proj.weight` [L, out, in] holds the
tensors `model.layers.{0..L-1}.self_attn.q_proj.weight` [out, in].
"""

import functools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax import files
from imm_jax.errors import UserError
from imm_jax.model import folder as checkpoint, safetensors
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params, abstract_params, unstack_layers
from imm_jax.model.safetensors import Entry

# Names of a leaf's tensors: one, or one for each layer of a stacked leaf.
TensorNames = str | tuple[str, ...]
# (path in the tree, shape) -> where a parameter lies.
Place = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]

# Entries that are read, converted or written at once: enough to outweigh a call, few beside the parameters.
_BLOCK = 1 << 21
_DTYPES = tuple(np.dtype(dtype) for dtype in (jnp.bfloat16, jnp.float16, jnp.float32))
_MAX_READERS = 8


def tensor_names(params: Params) -> Any:
  """The checkpoint's tensor names, in a tree of the same form as the parameters, with layers stacked or in a list."""

  def name(path: tuple[jax.tree_util.DictKey, ...], leaf: Any) -> TensorNames:
    keys = [str(p.key) for p in path]
    if keys[0] == "layers" and not keys[1].isdigit():
      rest = ".".join(keys[1:])
      return tuple(f"model.layers.{i}.{rest}" for i in range(leaf.shape[0]))
    return ".".join(keys) if keys[0] == "lm_head" else ".".join(["model", *keys])

  return jax.tree_util.tree_map_with_path(name, params)


def read_config(folder: str | Path) -> ModelConfig:
  """Reads config.json of a checkpoint folder; raises UserError where it is missing or unsupported."""
  path = Path(folder) / "config.json"
  if not Path(folder).is_dir():
    raise UserError(f"{folder}: no such checkpoint folder; expected one with config.json and {checkpoint.WEIGHTS}")
  return ModelConfig.from_hf(files.read_json(path), source=str(path))


def check(folder: str | Path) -> ModelConfig:
  """Checks that a checkpoint folder is whole, without reading its weights; raises the errors of `load`."""
  return _open(Path(folder))[0]


class Checked(NamedTuple):
  """What `check_bytes` found: the number of tensors that come back, and the names of those that are not written."""

  count: int
  left_out: list[str]


def check_bytes(folder: str | Path) -> Checked:
  """Reads a checkpoint and compares what `save` would write with its files, tensor by tensor, one parameter in memory.

  Left out is what follows from the rest: a head that is tied and stored too, rotary frequencies.

  Raises:
    UserError: as `load` does, or with the first tensor that would come back otherwise.
  """
  config, stored = _open(Path(folder))
  abstract, seen = abstract_params(config), set()
  with safetensors.Reader() as reader, ThreadPoolExecutor(_readers()) as pool:
    for leaf, names in zip(jax.tree.leaves(abstract), _leaf_names(abstract), strict=True):
      entries = stored[names] if isinstance(names, str) else [stored[name] for name in names]
      dtype = entries.dtype if isinstance(names, str) else entries[0].dtype
      array = _read_part(reader, pool, entries, tuple((0, size) for size in leaf.shape), dtype)
      for tensor in _tensors_of(array, names):
        seen.add(tensor.name)
        if not _comes_back(tensor, stored[tensor.name], reader):
          raise UserError(f"{folder}: tensor {tensor.name!r} would not come back as it was read; this is a fault of "
                          "imm_jax")
  return Checked(len(seen), sorted(stored.keys() - seen))


def _comes_back(tensor: "_Tensor", entry: Entry, reader: safetensors.Reader) -> bool:
  if (tensor.dtype, tensor.shape) != (entry.dtype, entry.shape):
    return False
  begin = 0
  for block in _blocks(tensor):
    want = np.empty_like(block)
    reader.read(entry, begin, want)
    if want.tobytes() != block.tobytes():
      return False
    begin += block.size
  return True


def load(folder: str | Path, *, dtype: jnp.dtype | None = None, place: Place | None = None, stacked: bool = True,
         ) -> tuple[ModelConfig, Params]:
  """Reads a checkpoint folder; each device's part of a parameter is read on its own, and nothing is held twice.

  Args:
    folder: holds config.json and model.safetensors, or shards with an index.
    dtype: of the parameters; None keeps what is stored.
    place: (path in the tree, shape) -> sharding, such as ("layers.mlp.up_proj.weight", (L, F, D)) -> where it lies; by
      default the first device has all.
    stacked: whether layers are stacked or, for decoding, in a list (`decoder.unstack_layers`).

  Returns:
    The model's config and its parameters.

  Raises:
    UserError: for missing, unknown or misshapen tensors (with the list), or a damaged file.
  """
  config, tensors = _open(Path(folder))
  abstract = abstract_params(config)
  if not stacked:
    abstract = jax.eval_shape(functools.partial(unstack_layers, num_layers=config.num_layers), abstract)
  place = place or (lambda *_: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
  with safetensors.Reader() as reader, ThreadPoolExecutor(_readers()) as pool:

    def read(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct, names: TensorNames) -> jax.Array:
      entries = tensors[names] if isinstance(names, str) else [tensors[name] for name in names]
      stored = entries.dtype if isinstance(names, str) else entries[0].dtype
      sharding = place(".".join(str(p.key) for p in path), leaf.shape)
      parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
      arrays = []
      for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(axis.indices(size)[:2] for axis, size in zip(index, leaf.shape, strict=True))
        if bounds not in parts:
          parts[bounds] = _read_part(reader, pool, entries, bounds, np.dtype(dtype or stored))
        # On CPU the array is the buffer: it is never written to again.
        arrays.append(jax.device_put(parts[bounds], device))
      return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)

    return config, jax.tree_util.tree_map_with_path(read, abstract, tensor_names(abstract))


def save(params: Params, folder: str | Path, *, like: str | Path | None = None, keep_dtypes: bool = False,
         max_shard_bytes: int = checkpoint.MAX_SHARD_BYTES) -> None:
  """Writes a checkpoint folder in the form that transformers and vLLM read, in blocks.

  With several processes all of them call it, and process 0 writes; a tensor that is spread over hosts is brought to
  every device, one after the other.

  Args:
    params: parameters with stacked layers, on any devices.
    folder: a new folder, or one without weights; the caller renames it when it is whole.
    like: the checkpoint folder whose config.json and tokenizer files are copied unchanged.
    keep_dtypes: write each tensor in the dtype that it has in `like`, rather than in its own.
    max_shard_bytes: weights beyond this go into several files with an index.
  """
  folder = Path(folder)
  stored = {name: entry.dtype for name, entry in checkpoint.tensors(Path(like)).items()} if keep_dtypes and like else {}
  tensors = [t._replace(dtype=stored.get(t.name, t.dtype)) for t in _tensors(params)]
  if jax.process_index() != 0:
    for tensor in tensors:
      _gathered(tensor)
    return
  folder.mkdir(parents=True, exist_ok=True)
  shards = checkpoint.split(
      [(t.name, t.dtype, t.shape, functools.partial(_blocks, t)) for t in tensors], max_shard_bytes)
  for file, shard in shards:
    safetensors.write(folder / file, shard)
  checkpoint.write_index(folder, shards)
  if like is not None:
    checkpoint.copy_side_files(Path(like), folder)


class _Tensor(NamedTuple):
  """A tensor of the checkpoint: a leaf, or the layer `index` of a stacked leaf."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  leaf: Any
  index: int | None


def _tensors(params: Params) -> list[_Tensor]:
  """In the order of the model: embedding, layer by layer, norm, head."""
  found = [tensor for leaf, names in zip(jax.tree.leaves(params), _leaf_names(params), strict=True)
           for tensor in _tensors_of(leaf, names)]
  return sorted(found, key=lambda tensor: checkpoint.model_order(tensor.name))


def _tensors_of(leaf: Any, names: TensorNames) -> list[_Tensor]:
  if isinstance(names, str):
    return [_Tensor(names, np.dtype(leaf.dtype), leaf.shape, leaf, None)]
  return [_Tensor(name, np.dtype(leaf.dtype), leaf.shape[1:], leaf, i) for i, name in enumerate(names)]


def _leaf_names(params: Params) -> list[TensorNames]:
  return jax.tree.leaves(tensor_names(params), is_leaf=lambda x: isinstance(x, tuple))


def _readers() -> int:
  """Threads that read: more than a few do not make a disk faster."""
  return min(_MAX_READERS, len(os.sched_getaffinity(0)))


def _gathered(tensor: _Tensor) -> _Tensor:
  """The tensor on every device where parts of it lie on other hosts; a collective, so all processes must call it."""
  if not isinstance(tensor.leaf, jax.Array) or tensor.leaf.is_fully_addressable:
    return tensor
  everywhere = jax.sharding.NamedSharding(tensor.leaf.sharding.mesh, jax.sharding.PartitionSpec())
  return tensor._replace(index=None, leaf=_whole(tensor.leaf, tensor.index or 0, stacked=tensor.index is not None,
                                                 dtype=tensor.dtype, sharding=everywhere))


@functools.partial(jax.jit, static_argnames=("stacked", "dtype", "sharding"))
def _whole(leaf: jax.Array, index: jax.Array | int, *, stacked: bool, dtype: np.dtype,
           sharding: jax.sharding.Sharding) -> jax.Array:
  tensor = jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False) if stacked else leaf
  return jax.lax.with_sharding_constraint(tensor.astype(dtype), sharding)


def _blocks(tensor: _Tensor) -> Iterator[np.ndarray]:
  """Some rows of a tensor at a time, C-contiguous and in its dtype; put together from the devices' parts."""
  tensor = _gathered(tensor)
  rows = tensor.shape[0]
  step = max(1, _BLOCK // max(1, math.prod(tensor.shape[1:])))
  parts = _parts(tensor.leaf)
  for begin in range(0, rows, step):
    end = min(begin + step, rows)
    block = None
    for bounds, data in parts:
      index = None
      if tensor.index is not None:
        (first, last), *bounds = bounds
        if not first <= tensor.index < last:
          continue
        index = tensor.index - first
      low, high = max(begin, bounds[0][0]), min(end, bounds[0][1])
      if low >= high:
        continue
      piece = _cut(data, index, low - bounds[0][0], high - low, tensor.dtype)
      if piece.shape == (end - begin, *tensor.shape[1:]):
        block = piece
        break
      block = np.empty((end - begin, *tensor.shape[1:]), tensor.dtype) if block is None else block
      block[(slice(low - begin, high - begin), *(slice(*b) for b in bounds[1:]))] = piece
    yield np.ascontiguousarray(block)


def _parts(leaf: Any) -> list[tuple[list[tuple[int, int]], Any]]:
  """(begin, end) on each axis and data of every part of an array, once where devices hold the same."""
  if not isinstance(leaf, jax.Array):
    return [([(0, size) for size in leaf.shape], leaf)]
  found = {}
  for shard in leaf.addressable_shards:
    bounds = tuple(axis.indices(size)[:2] for axis, size in zip(shard.index, leaf.shape, strict=True))
    found.setdefault(bounds, shard.data)
  return [(list(bounds), data) for bounds, data in found.items()]


def _cut(data: Any, index: int | None, begin: int, count: int, dtype: np.dtype) -> np.ndarray:
  """Rows of one device's part, or of a layer of it, in this dtype and in this process's memory."""
  if isinstance(data, jax.Array):
    if data.dtype != dtype or next(iter(data.devices())).platform != "cpu":
      return np.asarray(_cut_on_device(data, index or 0, begin, stacked=index is not None, count=count, dtype=dtype))
    data = np.asarray(data)  # no copy
  rows = data if index is None else data[index]
  return rows[begin:begin + count].astype(dtype, copy=False)


@functools.partial(jax.jit, static_argnames=("stacked", "count", "dtype"))
def _cut_on_device(data: jax.Array, index: jax.Array | int, begin: jax.Array | int, *, stacked: bool, count: int,
                   dtype: np.dtype) -> jax.Array:
  rows = jax.lax.dynamic_index_in_dim(data, index, keepdims=False) if stacked else data
  return jax.lax.dynamic_slice_in_dim(rows, begin, count).astype(dtype)


def _read_part(reader: safetensors.Reader, pool: ThreadPoolExecutor, entries: Entry | list[Entry],
               bounds: tuple[tuple[int, int], ...], dtype: np.dtype) -> np.ndarray:
  """The part of a parameter within these bounds (begin, end) on each axis, in an array of its own."""
  stacked = isinstance(entries, list)
  layers, inner = (entries[slice(*bounds[0])], bounds[1:]) if stacked else ([entries], bounds)
  out = safetensors.aligned(tuple(end - begin for begin, end in bounds), dtype)
  jobs = []
  for layer, target in zip(layers, out if stacked else [out], strict=True):
    step = max(1, _BLOCK // max(1, math.prod(target.shape[1:])))
    for begin in range(0, len(target), step):
      rows = (inner[0][0] + begin, min(inner[0][0] + begin + step, inner[0][1]))
      jobs.append(pool.submit(_fill, reader, layer, (rows, *inner[1:]), target[begin:begin + step]))
  for job in jobs:
    job.result()
  return out


def _fill(reader: safetensors.Reader, entry: Entry, bounds: tuple[tuple[int, int], ...], out: np.ndarray) -> None:
  """Reads the entries within the bounds into `out`."""
  (begin, _), *others = bounds
  if all(b == (0, size) for b, size in zip(others, entry.shape[1:], strict=True)):
    whole = out if out.dtype == entry.dtype else np.empty(out.shape, entry.dtype)
    reader.read(entry, begin * math.prod(entry.shape[1:]), whole)
    if whole is not out:
      np.copyto(out, whole, casting="unsafe")
  else:  # pieces of rows: the map touches only these
    mapped = np.memmap(entry.path, np.uint8, "r", entry.offset, entry.size * entry.dtype.itemsize)
    np.copyto(out, mapped.view(entry.dtype).reshape(entry.shape)[tuple(slice(*b) for b in bounds)], casting="unsafe")


def _open(folder: Path) -> tuple[ModelConfig, dict[str, Entry]]:
  """The config and where its tensors lie, which fit each other."""
  config, tensors = read_config(folder), checkpoint.tensors(folder)
  abstract = abstract_params(config)
  expected, first = {}, {}
  for leaf, leaf_names in zip(jax.tree.leaves(abstract), _leaf_names(abstract), strict=True):
    stacked = not isinstance(leaf_names, str)
    for name in leaf_names if stacked else (leaf_names,):
      expected[name] = leaf.shape[1:] if stacked else leaf.shape
      first[name] = leaf_names[0] if stacked else name
  # Tied checkpoints may store the head too, and old ones the rotary frequencies; both follow from the rest.
  ignored = {n for n in tensors if n.endswith("rotary_emb.inv_freq")}
  if "lm_head.weight" in tensors and "lm_head.weight" not in expected:
    if not _equal(tensors["lm_head.weight"], tensors.get("model.embed_tokens.weight")):
      raise UserError(f"{folder}: config.json ties the embeddings, but lm_head.weight differs from the embedding")
    ignored.add("lm_head.weight")
  problems = [f"missing {n}" for n in sorted(expected.keys() - tensors.keys())]
  problems += [f"unknown {n}" for n in sorted(tensors.keys() - expected.keys() - ignored)]
  for name in expected.keys() & tensors.keys():
    (_, dtype, shape, _), other = tensors[name], tensors.get(first[name], tensors[name]).dtype
    if shape != expected[name]:
      problems.append(f"{name} has shape {shape}, config.json needs {expected[name]}")
    if dtype not in _DTYPES:
      problems.append(f"{name} has dtype {dtype}, expected one of {', '.join(map(str, _DTYPES))}")
    elif dtype != other:
      problems.append(f"{name} has dtype {dtype}, {first[name]} {other}; expected one dtype for all layers")
  if problems:
    problems.sort(key=lambda problem: (problem.split()[0] not in ("missing", "unknown"), problem))
    more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
    raise UserError(f"{folder}: tensors do not fit config.json: {'; '.join(problems[:8])}{more}")
  return config, tensors


def _equal(a: Entry, b: Entry | None) -> bool:
  if b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
    return False
  views = (np.memmap(e.path, np.uint8, "r", e.offset, e.size * e.dtype.itemsize) for e in (a, b))
  return np.array_equal(*views)
