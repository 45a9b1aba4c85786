"""Merges LoRA adapters of peft into their base: W + s B A, in float32 from the stored values and rounded once.

For a weight W [out, in] with A [r, in] and B [out, r], s = alpha / r, or alpha / sqrt(r) with rslora (Hu et al. 2021,
Kalajdzievski 2023); an embedding [V, D] with A [r, V] and B [D, r] gets s (B A)^T. Tensors that the adapter stores
whole (modules_to_save, biases, resized embeddings) replace the base's. The result is that of `merge_and_unload`.
"""

import functools
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imm_jax import files
from imm_jax.errors import UserError, join_items
from imm_jax.model import checkpoint_folder, safetensors
from imm_jax.model.blocks import BLOCK
from imm_jax.model.checkpoint_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EMBEDDING, HEAD
from imm_jax.model.config import read_config
from imm_jax.model.lora_config import AdapterConfig, read_adapter_config
from imm_jax.model.safetensors import Entry
from imm_jax.model.writer import WeightsWriter

# Version of cached merges; changing it invalidates them.
_CACHE_VERSION = 1
_PREFIX = "base_model.model."
_PART = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B)")
_WHOLE = re.compile(r"(.+?)(\.base_layer)?\.(\w+)")
_FLOATS = tuple(np.dtype(code) for code in ("bfloat16", "float16", "float32"))
# Side files that are always the base's; the others belong to the tokenizer.
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
                     "sentencepiece.bpe.model", "tekken.json")


class _PlannedTensor(NamedTuple):
  """Plans a tensor to write: its stored entry [rows, ...], and a function (begin, end) -> update of these rows."""

  name: str
  dtype: np.dtype
  stored: Entry
  update: Callable[[int, int], np.ndarray] | None = None


def merge(base: Path, adapter: Path, out: Path, *, max_shard_bytes: int = checkpoint_folder.MAX_SHARD_BYTES) -> None:
  """Writes an HF folder of the base with the adapter merged, tensor by tensor in blocks.

  Every tensor has the dtype of the base's. The tokenizer is the adapter's if it has one. config.json is the base's,
  except for vocab_size if the adapter has embeddings of another number of rows, and tie_word_embeddings if it has
  untied embedding and head.

  Args:
    base: an HF folder.
    adapter: a folder with adapter_config.json and adapter_model.safetensors, as peft's save_pretrained writes it.
    out: a new folder; the caller renames it when it is complete.
    max_shard_bytes: larger weights are written as several files with an index.

  Raises:
    UserError: for unsupported adapters, tensors that do not fit or are not used, and results that are not finite.
  """
  from imm_jax.runtime import progress  # imported here because it imports jax

  with safetensors.Reader() as reader:
    planned, changes = _plan_merge(base, adapter, reader)
    tensors = [(t.name, t.dtype, t.stored.shape) for t in planned]
    total = sum(t.stored.size * t.dtype.itemsize for t in planned)
    with WeightsWriter(out, tensors, max_shard_bytes) as writer, progress.make_bar(
        total, "merge adapter", "B", unit_scale=True) as bar:
      for tensor in planned:
        begin = 0
        for block in _merge_blocks(tensor, reader):
          writer.write(tensor.name, begin, block)
          begin += block.size
          bar.update(block.nbytes)
  _copy_side_files(base, adapter, out)
  if changes:
    config = files.read_json(base / "config.json") | changes
    files.write_json(out / "config.json", config, indent=2)


def materialize(base: Path, adapter: Path, *, name: str) -> Path:
  """Merges an adapter into its base in the local cache, once for the contents of both inputs; returns the folder.

  The cache is $IMM_JAX_CACHE, or ~/.cache/imm_jax; its folder `adapters` may be emptied at any time. If several
  processes call this at once, one of them merges.

  Args:
    base: an HF folder.
    adapter: see `merge`.
    name: prefix of the folder's name.

  Raises:
    UserError: as `merge` does, or if the folder cannot be written.
  """
  read_adapter_config(adapter)
  side = [adapter / file for file in checkpoint_folder.list_side_files(adapter)]
  # A list and not a dict, because one folder may hold both.
  inputs = ((base, [*(base / file for file in checkpoint_folder.list_side_files(base)),
                    *checkpoint_folder.weight_files(base)]),
            (adapter, [adapter / ADAPTER_CONFIG, _weights_file(adapter), *side]))
  digests = [_digest(root, tuple((p, p.stat().st_size, p.stat().st_mtime_ns) for p in paths))
             for root, paths in inputs]
  target = files.cache_folder() / "adapters" / f"{name}-{digests[0][:16]}-{digests[1][:16]}-{_CACHE_VERSION}"
  if not target.is_dir():
    with files.lock(target, wait=True):
      if not target.is_dir():  # another process may have made it
        print(f"merging the LoRA adapter {adapter} into {base}: {target}", file=sys.stderr, flush=True)
        with files.write_atomically(target) as temporary:
          merge(base, adapter, temporary)
  return target


def _plan_merge(base: Path, adapter: Path, reader: safetensors.Reader) -> tuple[list[_PlannedTensor], dict[str, Any]]:
  """Plans the tensors to write, in the order of the model, and the changes to config.json."""
  settings, tied = read_adapter_config(adapter), read_config(base).tie_embeddings
  stored = checkpoint_folder.read_entries(base)
  where = _weights_file(adapter)
  parts, whole_tensors = _read_adapter(where, stored.keys() | ({HEAD} if tied else set()))
  stored_whole, changes = frozenset(whole_tensors), {}
  if tied and (split := [name for name in (EMBEDDING, HEAD) if name.removesuffix(".weight") in parts]):
    raise UserError(f"{where}: has an update of {split[0]}, which the base ties to the other embedding: a merge would "
                    "change both, unlike training; untie the base first (tie_word_embeddings=False), and train on that")
  if tied and {HEAD, EMBEDDING} & whole_tensors.keys():
    if not (whole_tensors.keys() >= {HEAD, EMBEDDING} and _are_equal(whole_tensors[HEAD], whole_tensors[EMBEDDING])):
      changes["tie_word_embeddings"] = False
      stored.setdefault(HEAD, stored[EMBEDDING])
    elif HEAD not in stored:
      del whole_tensors[HEAD]  # identical to the embedding
  rows = {name: (whole_tensors.get(name) or stored[name]).shape[:1] for name in (EMBEDDING, HEAD) if name in stored}
  if len(set(rows.values())) > 1:
    raise UserError(f"{where}: leaves {EMBEDDING} with {rows[EMBEDDING][0]} rows and {HEAD} with {rows[HEAD][0]}; "
                    "expected the adapter to hold both where it has another vocabulary")
  if EMBEDDING in rows and rows[EMBEDDING] != stored[EMBEDDING].shape[:1]:
    changes["vocab_size"] = rows[EMBEDDING][0]
  planned, problems = {}, []
  for name, entry in stored.items():
    source = whole_tensors.get(name, entry)
    resized = name in rows and source.shape[1:] == entry.shape[1:]
    if source.shape != entry.shape and not resized:
      problems.append(f"{name} has shape {source.shape}, the base's {entry.shape}")
    planned[name] = _PlannedTensor(name, entry.dtype, source)
  for module, update in parts.items():
    problems += _plan_update(planned, module, update, settings, reader)
  problems += _find_missing(stored, parts, stored_whole, settings)
  if problems:
    raise UserError(f"{where}: does not fit {base}: {join_items(problems, '; ')}")
  return sorted(planned.values(), key=lambda tensor: checkpoint_folder.model_order(tensor.name)), changes


def _find_missing(stored: Mapping[str, Entry], parts: Mapping[str, Mapping[str, Entry]], whole_tensors: Set[str],
                  settings: AdapterConfig) -> list[str]:
  """Lists the tensors that adapter_config.json calls for and that are missing."""
  problems = []
  for name in sorted(stored):
    stem, _, kind = name.rpartition(".")
    layer = re.search(r"\.layers\.(\d+)\.", name)
    in_layers = settings.layers is None or (layer is not None and int(layer[1]) in settings.layers)
    if kind == "bias" and settings.biases and name not in whole_tensors:
      problems.append(f"{name} is missing, adapter_config.json says bias='all'")
    elif (kind == "weight" and name not in whole_tensors and stem not in parts and in_layers and settings.targets
          and settings.targets.fullmatch(stem)):
      problems.append(f"an update of {stem} is missing, adapter_config.json names it in target_modules")
  for name in settings.saved:  # may name a module that contains others, such as mlp
    members = {key for key in stored.keys() | whole_tensors if f".{name}." in f".{key}"}
    lacks = sorted(members - whole_tensors) if members & whole_tensors else [name]
    problems += [f"{key} is missing, adapter_config.json names {name if key != name else 'it'} in modules_to_save"
                 for key in lacks]
  if settings.lora_bias:
    problems += [f"a bias of the update of {stem} is missing, adapter_config.json says lora_bias"
                 for stem, part in sorted(parts.items()) if "lora_B.weight" in part and "lora_B.bias" not in part]
  return problems


def _read_adapter(where: Path, known: set[str]) -> tuple[dict[str, dict[str, Entry]], dict[str, Entry]]:
  """Reads the adapter's entries: module -> parts of its update, and base tensor -> entry that replaces it."""
  entries = safetensors.read_entries(where)
  parts: dict[str, dict[str, Entry]] = {}
  whole_tensors: dict[str, Entry] = {}
  whole_entries, problems = {}, []
  for key, entry in entries.items():
    if "lora_magnitude_vector" in key:
      raise UserError(f"{entry.path}: holds {key}: DoRA is not supported; merge it with peft's merge_and_unload")
    name = key.removeprefix(_PREFIX)
    if entry.dtype not in _FLOATS:
      problems.append(f"{key} has dtype {entry.dtype}, expected one of {', '.join(map(str, _FLOATS))}")
    elif name != key and (match := _PART.fullmatch(name)):
      parts.setdefault(match[1], {})[match[2]] = entry
    else:
      whole_entries[key] = entry
  for key, entry in whole_entries.items():
    match = _WHOLE.fullmatch(key.removeprefix(_PREFIX)) if key.startswith(_PREFIX) else None
    # peft stores a module's own tensors below base_layer if and only if the module has an update.
    if match and (match[2] is not None) == (match[1] in parts) and f"{match[1]}.{match[3]}" in known:
      whole_tensors[f"{match[1]}.{match[3]}"] = entry
    else:
      problems.append(f"unknown {key}")
  if problems or not entries:
    raise UserError(f"{where}: {join_items(problems, '; ') or 'holds no tensor'}; expected the names "
                    f"that peft writes, of modules that the base has ({_PREFIX}MODULE.lora_A.weight)")
  return parts, whole_tensors


def _plan_update(planned: dict[str, _PlannedTensor], module: str, parts: Mapping[str, Entry], settings: AdapterConfig,
                 reader: safetensors.Reader) -> list[str]:
  """Plans a module's update; returns the problems found."""
  name = f"{module}.weight"
  embeds = name == EMBEDDING
  down, up = ("lora_embedding_A", "lora_embedding_B") if embeds else ("lora_A.weight", "lora_B.weight")
  allowed = {down, up} if embeds else {down, up, "lora_B.bias"}
  if problems := [f"{module}.{part} is missing" for part in (down, up) if part not in parts] + [
      f"unknown {module}.{part}" for part in parts.keys() - allowed]:
    return problems
  if name not in planned or len(planned[name].stored.shape) != 2:
    return [f"{module} is no matrix of the base"]
  rank, scale = settings.rank_and_scale(module)
  first, second = planned[name].stored.shape
  shapes = {down: (rank, first), up: (second, rank)} if embeds else {down: (rank, second), up: (first, rank)}
  if problems := [f"{module}.{part} has shape {parts[part].shape}, adapter_config.json and the base need {shape}"
                  for part, shape in shapes.items() if parts[part].shape != shape]:
    return problems

  @functools.cache  # cleared when the tensor has been written
  def factors() -> tuple[np.ndarray, np.ndarray]:
    a, b = (_read_float32(reader, parts[part]) for part in (down, up))
    return (a.T, b.T) if embeds else (b, a)

  def update(begin: int, end: int) -> np.ndarray:
    left, right = factors()
    if end == first:
      factors.cache_clear()
    return left[begin:end] @ right * np.float32(scale)

  planned[name] = planned[name]._replace(update=update)
  if bias := parts.get("lora_B.bias"):
    own = planned.get(f"{module}.bias")
    if own is None or own.stored.shape != bias.shape:
      return [f"{module}.lora_B.bias has shape {bias.shape}, the base's bias "
              f"{own.stored.shape if own else 'is missing'}"]
    planned[own.name] = own._replace(
        update=lambda begin, end: _read_float32(reader, bias)[begin:end] * np.float32(scale))
  return []


def _merge_blocks(tensor: _PlannedTensor, reader: safetensors.Reader) -> Iterator[np.ndarray]:
  """Yields the tensor's merged entries [n], some rows at a time."""
  shape = tensor.stored.shape
  rows, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
  step = max(1, BLOCK // max(1, width))
  for begin in range(0, rows if width else 0, step):
    end = min(begin + step, rows)
    block = np.empty((end - begin) * width, tensor.stored.dtype)
    reader.read(tensor.stored, begin * width, block)
    if tensor.update or block.dtype != tensor.dtype:
      with np.errstate(over="ignore", invalid="ignore"):  # non-finite results are reported below
        values = block.astype(np.float32)
        if tensor.update:
          values += tensor.update(begin, end).reshape(-1)
        block = values.astype(tensor.dtype)
        if not np.isfinite(block.astype(np.float32)).all():
          raise UserError(f"{tensor.name}: with the adapter it has entries that are not finite in {tensor.dtype}; "
                          "expected finite numbers in both base and adapter")
    yield block


def _read_float32(reader: safetensors.Reader, entry: Entry) -> np.ndarray:
  array = np.empty(entry.shape, entry.dtype)
  reader.read(entry, 0, array)
  return array.astype(np.float32, copy=False)


def _copy_side_files(base: Path, adapter: Path, out: Path) -> None:
  """Copies the base's side files, but the adapter's tokenizer files: all if it has a vocabulary, else those it has."""
  of_model = checkpoint_folder.MODEL_SIDE_FILES
  own = [name for name in checkpoint_folder.list_side_files(adapter) if name not in of_model]
  has_vocabulary = any(name in _VOCABULARY_FILES for name in own)
  others = [name for name in checkpoint_folder.list_side_files(base) if name in of_model or not has_vocabulary]
  checkpoint_folder.copy_side_files(base, out, others)
  checkpoint_folder.copy_side_files(adapter, out, own)


def _weights_file(adapter: Path) -> Path:
  """Returns the file with an adapter's tensors; raises UserError if there is none."""
  path = adapter / ADAPTER_WEIGHTS
  if not path.is_file():
    pickle = (adapter / "adapter_model.bin").exists()
    raise UserError(f"{path}: missing" + ("; adapter_model.bin is a pickle, which is not read: save the adapter again "
                                          "with peft's save_pretrained" if pickle else ""))
  return path


def _are_equal(one: Entry, other: Entry) -> bool:
  if (one.dtype, one.shape) != (other.dtype, other.shape):
    return False
  return np.array_equal(*(np.memmap(e.path, np.uint8, "r", e.offset, e.size * e.dtype.itemsize) for e in (one, other)))


@functools.cache
def _digest(folder: Path, stamps: tuple[tuple[Path, int, int], ...]) -> str:
  """Digests the contents of these files; `stamps` (path, size, time) key the cache."""
  return files.digest(folder, only=[path for path, *_ in stamps])
