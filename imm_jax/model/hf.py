"""HF checkpoint folders <-> parameter trees.

The tree mirrors the checkpoint's names, with layers stacked: `layers.self_attn.q_proj.weight` [L, out, in] holds the
tensors `model.layers.{0..L-1}.self_attn.q_proj.weight` [out, in].
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax import files
from imm_jax.errors import UserError
from imm_jax.model import folder as checkpoint, safetensors
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params, abstract_params

# Names of a leaf's tensors: one, or one for each layer of a stacked leaf.
TensorNames = str | tuple[str, ...]


def tensor_names(params: Params) -> Any:
  """The checkpoint's tensor names, in a tree of the same form as stacked parameters."""
  num_layers = jax.tree.leaves(params["layers"])[0].shape[0]

  def name(path: tuple[jax.tree_util.DictKey, ...], _: Any) -> TensorNames:
    keys = [str(p.key) for p in path]
    if keys[0] == "layers":
      rest = ".".join(keys[1:])
      return tuple(f"model.layers.{i}.{rest}" for i in range(num_layers))
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


def check_bytes(folder: str | Path) -> int:
  """Reads a checkpoint and compares what `save` would write with its files, tensor by tensor.

  Returns:
    The number of tensors.

  Raises:
    UserError: as `load` does, or with the first tensor that would come back otherwise.
  """
  _, tensors = _open(Path(folder))
  _, params = load(folder)
  count = 0
  for name, dtype, shape, get in _entries(params):
    stored, written = tensors[name], np.asarray(get(), order="C")
    if (dtype, shape) != (stored.dtype, stored.shape) or written.tobytes() != stored.tobytes():
      raise UserError(f"{folder}: tensor {name!r} would not come back as it was read; this is a fault of imm_jax")
    count += 1
  return count


def load(folder: str | Path, *, dtype: jnp.dtype | None = None,
         put: Callable[[str, np.ndarray], jax.Array] | None = None) -> tuple[ModelConfig, Params]:
  """Reads a checkpoint folder.

  Args:
    folder: holds config.json and model.safetensors, or shards with an index.
    dtype: of the parameters; None keeps what is stored.
    put: places a host array (given its path in the tree, `layers.mlp.up_proj.weight`) on devices; by default
      `jnp.asarray`.

  Returns:
    The model's config and its parameters, layers stacked.

  Raises:
    UserError: for missing, unknown or misshapen tensors (with the list), or a damaged file.
  """
  config, tensors = _open(Path(folder))
  names = tensor_names(abstract_params(config))

  def read(path: tuple[jax.tree_util.DictKey, ...], leaf_names: TensorNames) -> jax.Array:
    if isinstance(leaf_names, str):
      array = np.array(tensors[leaf_names], dtype)
    else:
      first = tensors[leaf_names[0]]
      array = np.empty((len(leaf_names), *first.shape), dtype or first.dtype)
      for i, name in enumerate(leaf_names):
        array[i] = tensors[name]
    return put(".".join(str(p.key) for p in path), array) if put else jnp.asarray(array)

  return config, jax.tree_util.tree_map_with_path(read, names, is_leaf=lambda x: isinstance(x, tuple))


def save(params: Params, folder: str | Path, *, like: str | Path | None = None,
         max_shard_bytes: int = checkpoint.MAX_SHARD_BYTES) -> None:
  """Writes a checkpoint folder in the form that transformers and vLLM read.

  Args:
    params: parameters with stacked layers, in the dtype to store.
    folder: a new or empty folder; the caller renames it when it is whole.
    like: the checkpoint folder whose config.json and tokenizer files are copied unchanged.
    max_shard_bytes: weights beyond this go into several files with an index.
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  shards = checkpoint.split(_entries(params), max_shard_bytes)
  for file, shard in shards:
    safetensors.write(folder / file, shard)
  checkpoint.write_index(folder, shards)
  if like is not None:
    checkpoint.copy_side_files(Path(like), folder)


def _entries(params: Params) -> Iterator[tuple[str, np.dtype, tuple[int, ...], Callable[[], np.ndarray]]]:
  """Tensors in the order of the model: embedding, layer by layer, norm, head."""
  leaves, _ = jax.tree.flatten(params)
  names = jax.tree.leaves(tensor_names(params), is_leaf=lambda x: isinstance(x, tuple))
  flat = []
  for leaf, leaf_names in zip(leaves, names, strict=True):
    if isinstance(leaf_names, str):
      flat.append((leaf_names, np.dtype(leaf.dtype), leaf.shape, lambda leaf=leaf: np.asarray(leaf)))
    else:
      for i, name in enumerate(leaf_names):
        flat.append((name, np.dtype(leaf.dtype), leaf.shape[1:], lambda leaf=leaf, i=i: np.asarray(leaf[i])))

  return iter(sorted(flat, key=lambda entry: checkpoint.model_order(entry[0])))


def _map_tensors(folder: Path) -> dict[str, np.ndarray]:
  found = checkpoint.tensors(folder)
  maps = {path: safetensors.read(path) for path in {entry.path for entry in found.values()}}
  return {name: maps[entry.path][name] for name, entry in found.items()}


def _open(folder: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
  """The config and the mapped tensors, which fit each other."""
  config, tensors = read_config(folder), _map_tensors(folder)
  abstract = abstract_params(config)
  names, expected = tensor_names(abstract), {}
  for leaf, leaf_names in zip(jax.tree.leaves(abstract),
                              jax.tree.leaves(names, is_leaf=lambda x: isinstance(x, tuple)), strict=True):
    stacked = not isinstance(leaf_names, str)
    for name in leaf_names if stacked else (leaf_names,):
      expected[name] = leaf.shape[1:] if stacked else leaf.shape
  # Tied checkpoints may store the head too, and old ones the rotary frequencies; both follow from the rest.
  ignored = {n for n in tensors if n.endswith("rotary_emb.inv_freq")}
  if "lm_head.weight" in tensors and "lm_head.weight" not in expected:
    if not np.array_equal(tensors["lm_head.weight"], tensors.get("model.embed_tokens.weight")):
      raise UserError(f"{folder}: config.json ties the embeddings, but lm_head.weight differs from the embedding")
    ignored.add("lm_head.weight")
  problems = [f"missing {n}" for n in sorted(expected.keys() - tensors.keys())]
  problems += [f"unknown {n}" for n in sorted(tensors.keys() - expected.keys() - ignored)]
  problems += [f"{n} has shape {tensors[n].shape}, config.json needs {shape}"
               for n, shape in expected.items() if n in tensors and tensors[n].shape != shape]
  problems += [f"{n} has dtype {tensors[n].dtype}, expected a floating dtype"
               for n in expected if n in tensors and not jnp.issubdtype(tensors[n].dtype, jnp.floating)]
  if problems:
    more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
    raise UserError(f"{folder}: tensors do not fit config.json: {'; '.join(problems[:8])}{more}")
  return config, tensors
