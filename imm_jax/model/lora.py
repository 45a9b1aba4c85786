"""LoRA adapters of peft, merged into their base: W + s B A, in float32 from what is stored and rounded once.

A weight W [out, in] with A [r, in] and B [out, r] has s = alpha / r, or alpha / sqrt(r) with rslora (Hu et al. 2021,
Kalajdzievski 2023); an embedding [V, D] with A [r, V] and B [D, r] has s (B A)^T. What the adapter stores whole
(modules_to_save, biases, resized embeddings) takes the base's place. The result is that of `merge_and_unload`.
"""

import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imm_jax import files
from imm_jax.errors import UserError, listed
from imm_jax.model import folder as checkpoint, safetensors
from imm_jax.model.blocks import BLOCK
from imm_jax.model.config import read_config
from imm_jax.model.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EMBEDDING, HEAD
from imm_jax.model.lora_config import Settings, read_settings
from imm_jax.model.safetensors import Entry
from imm_jax.model.writer import WeightsWriter

# Of merges in the cache; another number has them made again.
_FORMAT = 1
_PREFIX = "base_model.model."
_PART = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B)")
_WHOLE = re.compile(r"(.+?)(\.base_layer)?\.(\w+)")
_FLOATS = tuple(np.dtype(code) for code in ("bfloat16", "float16", "float32"))
# Side files that the base gives in any case; the others are the tokenizer's.
_OF_MODEL = ("config.json", "generation_config.json", "preprocessor_config.json")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
                 "sentencepiece.bpe.model", "tekken.json")


class _Planned(NamedTuple):
  """A tensor to write: what is stored [rows, ...], and what is added to its rows from one to another."""

  name: str
  dtype: np.dtype
  stored: Entry
  update: Callable[[int, int], np.ndarray] | None = None


def merge(base: Path, adapter: Path, out: Path, *, max_shard_bytes: int = checkpoint.MAX_SHARD_BYTES) -> None:
  """Writes an HF folder of the base with the adapter merged, tensor by tensor in blocks.

  Every tensor has the dtype that the base's has. The tokenizer is the adapter's where one lies beside it. config.json
  is the base's, but for vocab_size where the adapter holds embeddings of more or fewer rows, and tie_word_embeddings
  where it has parted embedding and head.

  Args:
    base: an HF folder.
    adapter: a folder with adapter_config.json and adapter_model.safetensors, as peft's save_pretrained writes it.
    out: a new folder; the caller renames it when it is whole.
    max_shard_bytes: weights beyond this go into several files with an index.

  Raises:
    UserError: for what is not supported, for tensors that do not fit or are not used, and results that are not finite.
  """
  from imm_jax import progress  # late: it starts jax

  with safetensors.Reader() as reader:
    planned, changes = _plan(base, adapter, reader)
    tensors = [(t.name, t.dtype, t.stored.shape) for t in planned]
    total = sum(t.stored.size * t.dtype.itemsize for t in planned)
    with WeightsWriter(out, tensors, max_shard_bytes) as writer, progress.bar(
        total, "merge adapter", "B", unit_scale=True) as bar:
      for tensor in planned:
        begin = 0
        for block in _merged(tensor, reader):
          writer.write(tensor.name, begin, block)
          begin += block.size
          bar.update(block.nbytes)
  _copy_side_files(base, adapter, out)
  if changes:
    config = files.read_json(base / "config.json") | changes
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def materialise(base: Path, adapter: Path, *, name: str) -> Path:
  """The folder of `merge` in this machine's cache, written once for the contents of both inputs.

  The cache is $IMM_JAX_CACHE, or ~/.cache/imm_jax; what lies in its `adapters` may be removed at any time. Several
  processes may ask at once, and one of them merges.

  Args:
    base: an HF folder.
    adapter: see `merge`.
    name: the first part of the folder's name.

  Raises:
    UserError: as `merge` does, or when the disk refuses.
  """
  read_settings(adapter)
  side = [adapter / file for file in checkpoint.side_files(adapter)]
  # Not a dict: one folder may hold both.
  inputs = ((base, [*(base / file for file in checkpoint.side_files(base)), *checkpoint.weight_files(base)]),
            (adapter, [adapter / ADAPTER_CONFIG, _weights(adapter), *side]))
  digests = [_digest(root, tuple((p, p.stat().st_size, p.stat().st_mtime_ns) for p in paths))
             for root, paths in inputs]
  target = _cache() / "adapters" / f"{name}-{digests[0][:16]}-{digests[1][:16]}-{_FORMAT}"
  if not target.is_dir():
    with files.alone(target, wait=True):
      if not target.is_dir():  # another process may have made it
        print(f"merging the LoRA adapter {adapter} into {base}: {target}", file=sys.stderr, flush=True)
        with files.committed(target) as temporary:
          merge(base, adapter, temporary)
  return target


def _plan(base: Path, adapter: Path, reader: safetensors.Reader) -> tuple[list[_Planned], dict[str, Any]]:
  """What is written, in the order of the model, and what changes in config.json."""
  settings, tied = read_settings(adapter), read_config(base).tie_embeddings
  stored = checkpoint.tensors(base)
  where = _weights(adapter)
  parts, whole = _sort(where, stored.keys() | ({HEAD} if tied else set()))
  here, changes = frozenset(whole), {}
  if tied and (split := [name for name in (EMBEDDING, HEAD) if name.removesuffix(".weight") in parts]):
    raise UserError(f"{where}: has an update of {split[0]}, which the base ties to the other embedding: a merge would "
                    "change both, unlike training; untie the base first (tie_word_embeddings=False), and train on that")
  if tied and {HEAD, EMBEDDING} & whole.keys():
    if not (whole.keys() >= {HEAD, EMBEDDING} and _equal(whole[HEAD], whole[EMBEDDING])):
      changes["tie_word_embeddings"] = False
      stored.setdefault(HEAD, stored[EMBEDDING])
    elif HEAD not in stored:
      del whole[HEAD]  # it is the embedding
  rows = {name: (whole.get(name) or stored[name]).shape[:1] for name in (EMBEDDING, HEAD) if name in stored}
  if len(set(rows.values())) > 1:
    raise UserError(f"{where}: leaves {EMBEDDING} with {rows[EMBEDDING][0]} rows and {HEAD} with {rows[HEAD][0]}; "
                    "expected the adapter to hold both where it has another vocabulary")
  if EMBEDDING in rows and rows[EMBEDDING] != stored[EMBEDDING].shape[:1]:
    changes["vocab_size"] = rows[EMBEDDING][0]
  planned, problems = {}, []
  for name, entry in stored.items():
    source = whole.get(name, entry)
    resized = name in rows and source.shape[1:] == entry.shape[1:]
    if source.shape != entry.shape and not resized:
      problems.append(f"{name} has shape {source.shape}, the base's {entry.shape}")
    planned[name] = _Planned(name, entry.dtype, source)
  for module, found in parts.items():
    problems += _add(planned, module, found, settings, reader)
  problems += _missing(stored, parts, here, settings)
  if problems:
    raise UserError(f"{where}: does not fit {base}: {listed(problems, '; ')}")
  return sorted(planned.values(), key=lambda tensor: checkpoint.model_order(tensor.name)), changes


def _missing(stored: Mapping[str, Entry], parts: Mapping[str, Mapping[str, Entry]], whole: Set[str],
             settings: Settings) -> list[str]:
  """What adapter_config.json says of tensors that are not there."""
  found = []
  for name in sorted(stored):
    stem, _, kind = name.rpartition(".")
    layer = re.search(r"\.layers\.(\d+)\.", name)
    within = settings.layers is None or (layer is not None and int(layer[1]) in settings.layers)
    if kind == "bias" and settings.biases and name not in whole:
      found.append(f"{name} is missing, adapter_config.json says bias='all'")
    elif (kind == "weight" and name not in whole and stem not in parts and within and settings.targets
          and settings.targets.fullmatch(stem)):
      found.append(f"an update of {stem} is missing, adapter_config.json names it in target_modules")
  for name in settings.saved:  # which may be of a module with others in it, such as mlp
    of_name = {key for key in stored.keys() | whole if f".{name}." in f".{key}"}
    lacks = sorted(of_name - whole) if of_name & whole else [name]
    found += [f"{key} is missing, adapter_config.json names {name if key != name else 'it'} in modules_to_save"
              for key in lacks]
  if settings.lora_bias:
    found += [f"a bias of the update of {stem} is missing, adapter_config.json says lora_bias"
              for stem, part in sorted(parts.items()) if "lora_B.weight" in part and "lora_B.bias" not in part]
  return found


def _sort(where: Path, known: set[str]) -> tuple[dict[str, dict[str, Entry]], dict[str, Entry]]:
  """The adapter's tensors: by module the parts of its update, and by the base's name what is stored whole."""
  entries = safetensors.entries(where)
  parts: dict[str, dict[str, Entry]] = {}
  whole: dict[str, Entry] = {}
  rest, problems = {}, []
  for key, entry in entries.items():
    if "lora_magnitude_vector" in key:
      raise UserError(f"{entry.path}: holds {key}: DoRA is not supported; merge it with peft's merge_and_unload")
    name = key.removeprefix(_PREFIX)
    if entry.dtype not in _FLOATS:
      problems.append(f"{key} has dtype {entry.dtype}, expected one of {', '.join(map(str, _FLOATS))}")
    elif name != key and (found := _PART.fullmatch(name)):
      parts.setdefault(found[1], {})[found[2]] = entry
    else:
      rest[key] = entry
  for key, entry in rest.items():
    found = _WHOLE.fullmatch(key.removeprefix(_PREFIX)) if key.startswith(_PREFIX) else None
    # peft stores what a module with an update has of its own below base_layer, and reads it nowhere else.
    if found and (found[2] is not None) == (found[1] in parts) and f"{found[1]}.{found[3]}" in known:
      whole[f"{found[1]}.{found[3]}"] = entry
    else:
      problems.append(f"unknown {key}")
  if problems or not entries:
    raise UserError(f"{where}: {listed(problems, '; ') or 'holds no tensor'}; expected the names "
                    f"that peft writes, of modules that the base has ({_PREFIX}MODULE.lora_A.weight)")
  return parts, whole


def _add(planned: dict[str, _Planned], module: str, parts: Mapping[str, Entry], settings: Settings,
         reader: safetensors.Reader) -> list[str]:
  """Plans a module's update; says what does not fit."""
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

  @functools.cache  # until the tensor is written
  def factors() -> tuple[np.ndarray, np.ndarray]:
    a, b = (_floats(reader, parts[part]) for part in (down, up))
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
      return [f"{module}.lora_B.bias has shape {bias.shape}, the base's bias {own.stored.shape if own else 'is none'}"]
    planned[own.name] = own._replace(
        update=lambda begin, end: _floats(reader, bias)[begin:end] * np.float32(scale))
  return []


def _merged(tensor: _Planned, reader: safetensors.Reader) -> Iterator[np.ndarray]:
  """The tensor's entries [n], some rows at a time."""
  shape = tensor.stored.shape
  rows, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
  step = max(1, BLOCK // max(1, width))
  for begin in range(0, rows if width else 0, step):
    end = min(begin + step, rows)
    block = np.empty((end - begin) * width, tensor.stored.dtype)
    reader.read(tensor.stored, begin * width, block)
    if tensor.update or block.dtype != tensor.dtype:
      with np.errstate(over="ignore", invalid="ignore"):  # it is looked at below
        values = block.astype(np.float32)
        if tensor.update:
          values += tensor.update(begin, end).reshape(-1)
        block = values.astype(tensor.dtype)
        if not np.isfinite(block.astype(np.float32)).all():
          raise UserError(f"{tensor.name}: with the adapter it has entries that are not finite in {tensor.dtype}; "
                          "expected finite numbers in both base and adapter")
    yield block


def _floats(reader: safetensors.Reader, entry: Entry) -> np.ndarray:
  array = np.empty(entry.shape, entry.dtype)
  reader.read(entry, 0, array)
  return array.astype(np.float32, copy=False)


def _copy_side_files(base: Path, adapter: Path, out: Path) -> None:
  """The base's; the tokenizer's are the adapter's, all of them where it has a vocabulary, or else those that it has."""
  own = [name for name in checkpoint.side_files(adapter) if name not in _OF_MODEL]
  whole = any(name in _VOCABULARIES for name in own)
  others = [name for name in checkpoint.side_files(base) if name in _OF_MODEL or not whole]
  checkpoint.copy_side_files(base, out, others)
  checkpoint.copy_side_files(adapter, out, own)


def _weights(adapter: Path) -> Path:
  """The file with an adapter's tensors; raises UserError where there is none."""
  path = adapter / ADAPTER_WEIGHTS
  if not path.is_file():
    pickle = (adapter / "adapter_model.bin").exists()
    raise UserError(f"{path}: missing" + ("; adapter_model.bin is a pickle, which is not read: save the adapter again "
                                          "with peft's save_pretrained" if pickle else ""))
  return path


def _equal(one: Entry, other: Entry) -> bool:
  if (one.dtype, one.shape) != (other.dtype, other.shape):
    return False
  return np.array_equal(*(np.memmap(e.path, np.uint8, "r", e.offset, e.size * e.dtype.itemsize) for e in (one, other)))


@functools.cache
def _digest(folder: Path, stamps: tuple[tuple[Path, int, int], ...]) -> str:
  """Of the contents of these files; read again where a size or a time has changed."""
  return files.digest(folder, only=[path for path, *_ in stamps])


def _cache() -> Path:
  given = os.environ.get("IMM_JAX_CACHE")
  return Path(given or Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "imm_jax")
