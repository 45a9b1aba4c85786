"""Loads and saves parameter trees as HF checkpoint folders.

The tree mirrors the checkpoint's names, with layers stacked: `layers.self_attn.q_proj.weight` [L, out, in] holds the
tensors `model.layers.{0..L-1}.self_attn.q_proj.weight` [out, in].
"""

import functools
import math
import os
import re
from collections.abc import Callable, Container, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax.errors import UserError, join_items
from imm_jax.model import checkpoint_folder, safetensors
from imm_jax.model.blocks import BLOCK, Tensor, TensorNames, iterate_blocks, replicate, split_leaf
from imm_jax.model.checkpoint_folder import EMBEDDING, HEAD
from imm_jax.model.config import ModelConfig, read_config
from imm_jax.model.decoder import Params, abstract_params, unstack_layers
from imm_jax.model.safetensors import Entry
from imm_jax.runtime import hardware

# (path in the tree, shape) -> sharding of a parameter.
Place = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]

_DTYPES = tuple(np.dtype(dtype) for dtype in (jnp.bfloat16, jnp.float16, jnp.float32))
_MAX_READERS = 8
_ROTARY = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def place_on_host(*_: object) -> jax.sharding.Sharding:
  """Places parameters in host memory, which has room for large models; a `Place`."""
  return jax.sharding.SingleDeviceSharding(hardware.cpu_device())


def tensor_names(params: Params) -> Any:
  """Returns a tree of the checkpoint's tensor names in the structure of the parameters (layers stacked or a list)."""

  def name(path: tuple[jax.tree_util.DictKey, ...], leaf: Any) -> TensorNames:
    keys = [str(p.key) for p in path]
    if keys[0] == "layers" and not keys[1].isdigit():
      rest = ".".join(keys[1:])
      return tuple(f"model.layers.{i}.{rest}" for i in range(leaf.shape[0]))
    return ".".join(keys) if keys[0] == "lm_head" else ".".join(["model", *keys])

  return jax.tree_util.tree_map_with_path(name, params)


def check_folder(folder: str | Path) -> ModelConfig:
  """Checks that a checkpoint folder is complete, without reading its weights; raises the errors of `load`."""
  return _open_checkpoint(Path(folder))[0]


class RoundTrip(NamedTuple):
  """Holds the result of `check_round_trip`: the number of unchanged tensors, the names of those not written."""

  count: int
  left_out: list[str]


def check_round_trip(folder: str | Path) -> RoundTrip:
  """Reads a checkpoint and compares it with what `save` would write, holding one parameter at a time.

  Each tensor is written in its stored dtype, as with `keep_dtypes`. Rotary frequencies, which follow from config.json,
  are left out.

  Raises:
    UserError: as `load` does, or for the first tensor that would change.
  """
  config, stored = _open_checkpoint(Path(folder))
  abstract, seen = abstract_params(config), set()
  with safetensors.Reader() as reader, ThreadPoolExecutor(_num_readers()) as pool:
    for leaf, names in zip(jax.tree.leaves(abstract), _leaf_names(abstract), strict=True):
      entries = stored[names] if isinstance(names, str) else [stored[name] for name in names]
      array = _read_part(reader, pool, entries, tuple((0, size) for size in leaf.shape), _common_dtype(entries))
      for tensor in _add_tied_head(split_leaf(array, names), stored if config.tie_embeddings else ()):
        seen.add(tensor.name)
        if not _is_unchanged(tensor._replace(dtype=stored[tensor.name].dtype), stored[tensor.name], reader):
          raise UserError(f"{folder}: tensor {tensor.name!r} would not come back as it was read; this is a fault of "
                          "imm_jax")
  return RoundTrip(len(seen), sorted(stored.keys() - seen))


def _is_unchanged(tensor: Tensor, entry: Entry, reader: safetensors.Reader) -> bool:
  if tensor.shape != entry.shape:
    return False
  begin = 0
  for block in iterate_blocks(tensor):
    expected_block = np.empty_like(block)
    reader.read(entry, begin, expected_block)
    if expected_block.tobytes() != block.tobytes():
      return False
    begin += block.size
  return True


def load(folder: str | Path, *, dtype: jnp.dtype | None = None, place: Place | None = None, stacked: bool = True,
         ) -> tuple[ModelConfig, Params]:
  """Loads a checkpoint folder. Each device's shard of a parameter is read directly, so nothing is held twice.

  Args:
    folder: holds config.json and model.safetensors, or shards with an index.
    dtype: dtype of the parameters; None keeps the stored one, or if layers differ the common dtype that holds all.
    place: (path in the tree, shape) -> sharding, called with for example ("layers.mlp.up_proj.weight", (L, F, D)); by
      default everything is on the first device.
    stacked: whether layers are stacked or, for decoding, a list (`decoder.unstack_layers`).

  Returns:
    The model's config and its parameters.

  Raises:
    UserError: for missing, unknown or misshapen tensors (lists them), or a damaged file.
  """
  config, tensors = _open_checkpoint(Path(folder))
  abstract = abstract_params(config)
  if not stacked:
    abstract = jax.eval_shape(functools.partial(unstack_layers, num_layers=config.num_layers), abstract)
  place = place or (lambda *_: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
  with safetensors.Reader() as reader, ThreadPoolExecutor(_num_readers()) as pool:

    def read(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct, names: TensorNames) -> jax.Array:
      entries = tensors[names] if isinstance(names, str) else [tensors[name] for name in names]
      sharding = place(".".join(str(p.key) for p in path), leaf.shape)
      parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
      arrays = []
      for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(axis.indices(size)[:2] for axis, size in zip(index, leaf.shape, strict=True))
        if bounds not in parts:
          parts[bounds] = _read_part(reader, pool, entries, bounds, np.dtype(dtype or _common_dtype(entries)))
        # On CPU the array aliases the buffer, which must not be written again.
        arrays.append(jax.device_put(parts[bounds], device))
      return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)

    return config, jax.tree_util.tree_map_with_path(read, abstract, tensor_names(abstract))


def save(params: Params, folder: str | Path, *, like: str | Path | None = None, keep_dtypes: bool = False,
         max_shard_bytes: int = checkpoint_folder.MAX_SHARD_BYTES) -> None:
  """Saves a checkpoint folder in the format of transformers and vLLM, in blocks.

  With several processes all must call it, and process 0 writes; tensors that are spread over hosts are replicated one
  at a time.

  Args:
    params: parameters with stacked layers, on any devices.
    folder: a new folder, or one without weights; the caller renames it when it is complete.
    like: checkpoint folder whose config.json and tokenizer files are copied unchanged; if it stores a tied head, so
      does the new one.
    keep_dtypes: whether to write each tensor in its dtype in `like`, rather than its own.
    max_shard_bytes: larger weights are written as several files with an index.

  Raises:
    UserError: if the folder already holds weights.
  """
  folder = Path(folder)
  if jax.process_index() == 0 and (older := next(folder.glob("*.safetensors*"), None)):
    raise UserError(f"{folder}: holds {older.name} already; give a new folder")
  reads_like = like is not None and (keep_dtypes or checkpoint_folder.has_weights(Path(like)))
  stored = checkpoint_folder.read_entries(Path(like)) if reads_like else {}
  tensors = _add_tied_head(_list_tensors(params), stored)
  if keep_dtypes:
    tensors = [t._replace(dtype=stored[t.name].dtype if t.name in stored else t.dtype) for t in tensors]
  if jax.process_index() != 0:
    for tensor in tensors:
      jax.block_until_ready(replicate(tensor).leaf)  # one at a time, so that all processes run collectives in one order
    return
  folder.mkdir(parents=True, exist_ok=True)
  shards = checkpoint_folder.split_into_shards(
      [(t.name, t.dtype, t.shape, functools.partial(iterate_blocks, t)) for t in tensors], max_shard_bytes)
  for file, shard in shards:
    safetensors.write(folder / file, shard)
  checkpoint_folder.write_index(folder, shards)
  if like is not None:
    checkpoint_folder.copy_side_files(Path(like), folder)


def _list_tensors(params: Params) -> list[Tensor]:
  """Lists the tensors in the order of the model: embedding, layer by layer, norm, head."""
  unsorted = [tensor for leaf, names in zip(jax.tree.leaves(params), _leaf_names(params), strict=True)
              for tensor in split_leaf(leaf, names)]
  return sorted(unsorted, key=lambda tensor: checkpoint_folder.model_order(tensor.name))


def _add_tied_head(tensors: list[Tensor], stored: Container[str]) -> list[Tensor]:
  """Adds the embedding as the head if that is stored too, although the two are tied."""
  embedding = next((t for t in tensors if t.name == EMBEDDING), None)
  if embedding is None or HEAD not in stored or any(t.name == HEAD for t in tensors):
    return tensors
  return [*tensors, embedding._replace(name=HEAD)]


def _leaf_names(params: Params) -> list[TensorNames]:
  return jax.tree.leaves(tensor_names(params), is_leaf=lambda x: isinstance(x, tuple))


def _num_readers() -> int:
  """Returns the number of reader threads; more than a few do not make a disk faster."""
  return min(_MAX_READERS, len(os.sched_getaffinity(0)))


def _common_dtype(entries: Entry | list[Entry]) -> np.dtype:
  """Returns the dtype of a tensor, or the smallest one that holds the values of all layers."""
  if isinstance(entries, list):
    return np.dtype(functools.reduce(jnp.promote_types, {entry.dtype for entry in entries}))
  return entries.dtype


def _read_part(reader: safetensors.Reader, pool: ThreadPoolExecutor, entries: Entry | list[Entry],
               bounds: tuple[tuple[int, int], ...], dtype: np.dtype) -> np.ndarray:
  """Reads the part of a parameter within these bounds (begin, end) on each axis into a new array."""
  stacked = isinstance(entries, list)
  layers, inner = (entries[slice(*bounds[0])], bounds[1:]) if stacked else ([entries], bounds)
  out = safetensors.empty_aligned(tuple(end - begin for begin, end in bounds), dtype)
  jobs = []
  for layer, target in zip(layers, out if stacked else [out], strict=True):
    step = max(1, BLOCK // max(1, math.prod(target.shape[1:])))
    for begin in range(0, len(target), step):
      rows = (inner[0][0] + begin, min(inner[0][0] + begin + step, inner[0][1]))
      jobs.append(pool.submit(_read_into, reader, layer, (rows, *inner[1:]), target[begin:begin + step]))
  for job in jobs:
    job.result()
  return out


def _read_into(reader: safetensors.Reader, entry: Entry, bounds: tuple[tuple[int, int], ...], out: np.ndarray) -> None:
  """Reads the entries within the bounds into `out`."""
  (begin, _), *others = bounds
  if all(b == (0, size) for b, size in zip(others, entry.shape[1:], strict=True)):
    whole = out if out.dtype == entry.dtype else np.empty(out.shape, entry.dtype)
    reader.read(entry, begin * math.prod(entry.shape[1:]), whole)
    if whole is not out:
      np.copyto(out, whole, casting="unsafe")
  else:  # parts of rows; a memory map reads only the pages that hold them
    mapped = np.memmap(entry.path, np.uint8, "r", entry.offset, entry.size * entry.dtype.itemsize)
    np.copyto(out, mapped.view(entry.dtype).reshape(entry.shape)[tuple(slice(*b) for b in bounds)], casting="unsafe")


def _open_checkpoint(folder: Path) -> tuple[ModelConfig, dict[str, Entry]]:
  """Reads the config and the tensors' entries, and checks that they fit each other."""
  config, tensors = read_config(folder), checkpoint_folder.read_entries(folder)
  abstract = abstract_params(config)
  expected = {}
  for leaf, leaf_names in zip(jax.tree.leaves(abstract), _leaf_names(abstract), strict=True):
    stacked = not isinstance(leaf_names, str)
    for name in leaf_names if stacked else (leaf_names,):
      expected[name] = leaf.shape[1:] if stacked else leaf.shape
  # Old checkpoints store rotary frequencies, which follow from the config; tied ones may also store the head.
  ignored = {name for name in tensors if _ROTARY.fullmatch(name)}
  if HEAD in tensors and HEAD not in expected:
    ignored.add(HEAD)
    _check_tied(folder, tensors[HEAD], tensors.get(EMBEDDING))
  problems = [f"missing {n}" for n in sorted(expected.keys() - tensors.keys())]
  problems += [f"unknown {n}" for n in sorted(tensors.keys() - expected.keys() - ignored)]
  for name in expected.keys() & tensors.keys():
    _, dtype, shape, _ = tensors[name]
    if shape != expected[name]:
      problems.append(f"{name} has shape {shape}, config.json needs {expected[name]}")
    if dtype not in _DTYPES:
      problems.append(f"{name} has dtype {dtype}, expected one of {', '.join(map(str, _DTYPES))}")
  if problems:
    _check_names(folder, expected.keys(), tensors.keys())
    problems.sort(key=lambda problem: (problem.split()[0] not in ("missing", "unknown"), problem))
    raise UserError(f"{folder}: tensors do not fit config.json: {join_items(problems, '; ')}")
  return config, tensors


def _check_names(folder: Path, expected: Set[str], actual: Set[str]) -> None:
  """Raises UserError if the names show that weights are quantized or those of a model nested in another."""
  missing = expected - actual
  checkpoint_folder.check_not_quantized(str(folder), (*(file.name for file in folder.iterdir()), *sorted(actual)))
  inner = EMBEDDING.removeprefix("model.")
  for name in sorted(actual):
    prefix = name.removesuffix(inner)
    if name.endswith(inner) and prefix != "model." and actual >= {
        prefix + n.removeprefix("model.") for n in missing if n != HEAD}:
      raise UserError(f"{folder}: the names of its tensors {f'begin with {prefix!r}' if prefix else 'lack a prefix'} "
                      "where 'model.' is expected; save the language model itself with save_pretrained, or rename them")


def _check_tied(folder: Path, head: Entry, embedding: Entry | None) -> None:
  if embedding is None:
    return  # the missing tensor is reported by the caller
  if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
    raise UserError(f"{folder}: config.json ties the embeddings, but {HEAD} is {head.dtype} {head.shape} and "
                    f"{EMBEDDING} {embedding.dtype} {embedding.shape}; store it alike, or leave it out")
  views = (np.memmap(e.path, np.uint8, "r", e.offset, e.size * e.dtype.itemsize) for e in (head, embedding))
  if not np.array_equal(*views):
    raise checkpoint_folder.untied_error(folder)
