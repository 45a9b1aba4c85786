"""The files of HF checkpoint folders: weights in one safetensors file or in shards with an index, and side files."""

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from imm_jax import files
from imm_jax.errors import UserError, join_items
from imm_jax.model import safetensors
from imm_jax.model.safetensors import Entry

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MAX_SHARD_BYTES = 5_000_000_000
# Files other than weights that an exported copy of a checkpoint needs.
SIDE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
              "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
              "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
              "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "spm.model",
              "source.spm", "target.spm", "bpe.codes", "tiktoken.model", "qwen.tiktoken", "normalizer.json")
# Those of them that are not the tokenizer's.
MODEL_SIDE_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
                    "video_preprocessor_config.json")
# Folder of the named chat templates, in which transformers stores all but the first.
TEMPLATES = "additional_chat_templates"
# File names of unsupported weights, and what to do about them; training_args.bin and the like are not weights.
_UNSUPPORTED = {
    r"model-\d+-of-\d+\.safetensors": f"shards ({{}}) without {INDEX}; get that file too",
    r"consolidated[^/]*\.safetensors": "weights in another form than transformers' ({}), which are not read; take the "
    f"model as {WEIGHTS}",
    r"(?!adapter_model)[^/]*\.safetensors": f"{{}}, a name that is not read; if it is the whole model, call it "
    f"{WEIGHTS} in a folder that holds no others",
    r"[^/]*\.gguf": "weights in GGUF ({}), which are not read; take the model in safetensors that they were made from",
    r"pytorch_model[^/]*\.bin(\.index\.json)?|consolidated[^/]*\.pth": "a pickle checkpoint ({}), which is not read; "
    "save it again with save_pretrained(..., safe_serialization=True), and take that folder"}
# Names of files and tensors that quantization tools write.
_QUANTIZED_NAMES = re.compile(r"(quantize|quant|hf_quant)_config\.json|.*\.(qweight|weight_packed|weight\.absmax)")
# Embeddings in other families, such as GPT-2's wte, which are not stored under the head's name alone.
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|\w*embeddings?|shared)\.weight$")
# (name, dtype, shape, ...) of a tensor to be written.
_Tensor = TypeVar("_Tensor", bound=tuple)


def check_model_folder(folder: Path) -> None:
  """Raises UserError unless this is a folder with more than a LoRA adapter."""
  if not folder.is_dir():
    raise UserError(f"{folder}: {'is a file' if folder.exists() else 'no such checkpoint folder'}; expected a folder "
                    f"with config.json and {WEIGHTS}")
  if (folder / ADAPTER_CONFIG).exists() and not has_weights(folder):
    raise adapter_error(str(folder), folder / ADAPTER_CONFIG)


def adapter_error(name: str, adapter_config: Path) -> UserError:
  """Builds the error for a LoRA adapter given as the model."""
  base = files.read_json(adapter_config).get("base_model_name_or_path")
  return UserError(f"{name}: is a LoRA adapter{f' of {base}' if base else ''}, not a whole model; give "
                   f"{base or 'BASE'}+{name}")


def has_weights(folder: Path) -> bool:
  """Returns whether a folder has weights."""
  return (folder / INDEX).exists() or (folder / WEIGHTS).exists()


def weight_files(folder: Path) -> list[Path]:
  """Lists the files that hold a checkpoint's tensors.

  Raises:
    UserError: if there are none, the index is damaged or names a missing file, or there is both a single file and an
      index, of which programs read one or the other.
  """
  check_model_folder(folder)
  if (folder / INDEX).exists():
    names = read_index(folder / INDEX)
    if (folder / WEIGHTS).exists() and names != [WEIGHTS]:
      raise UserError(f"{folder}: holds both {WEIGHTS} and {INDEX}, which are two checkpoints; remove the one that is "
                      "not meant")
    for file in names:
      if not (folder / file).exists():
        raise UserError(f"{folder / file}: missing, {INDEX} names it; copy the checkpoint again")
    return [folder / file for file in names]
  if (folder / WEIGHTS).exists():
    return [folder / WEIGHTS]
  unread = unread_weights(file.name for file in folder.iterdir())
  raise UserError(f"{folder / WEIGHTS}: missing; " + (f"found only {unread}" if unread else
                                                      f"expected it or {INDEX}"))


def unread_weights(names: Iterable[str]) -> str:
  """Describes the first file with unsupported weights, and what to do about it; "" if there is none."""
  names = sorted(names)
  return next((text.format(name) for pattern, text in _UNSUPPORTED.items() for name in names
               if re.fullmatch(pattern, name)), "")


def check_not_quantized(where: str, names: Iterable[str]) -> None:
  """Raises UserError if the name of a file or tensor shows that weights are quantized, as config.json may not."""
  if match := next(filter(_QUANTIZED_NAMES.fullmatch, names), None):
    raise UserError(f"{where}: {match} says that its weights are quantized, and such are not read; take the "
                    "unquantized model that they were made from")


def is_rotary(name: str) -> bool:
  """Returns whether a tensor holds rotary frequencies, which old checkpoints store though config.json implies them."""
  return name.endswith("rotary_emb.inv_freq")


def read_index(index: Path) -> list[str]:
  """Reads the names of the weight files from an index; raises UserError if it is damaged or names none."""
  weight_map = files.read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not all(
      isinstance(file, str) and Path(file).name == file for file in weight_map.values()):
    raise UserError(f"{index}: has no weight_map from tensor names to file names")
  if not weight_map:
    raise UserError(f"{index}: its weight_map is empty; expected the file of each tensor")
  names = sorted(set(weight_map.values()))
  if other := next((name for name in names if not name.endswith(".safetensors")), None):
    raise UserError(f"{index}: names {other!r}, which is no safetensors file; expected only safetensors files")
  return names


def read_entries(folder: Path) -> dict[str, Entry]:
  """Reads the entries of all tensors of a checkpoint: tensor name -> file, dtype, shape and offset.

  If config.json ties head and embedding and only the head is stored, it is returned under the embedding's name. The
  index may name tensors that no shard holds if they are not needed: rotary frequencies, and one of a tied head and
  embedding.

  Raises:
    UserError: as `weight_files` and `safetensors.read_entries` do, and if the index disagrees with the shards.
  """
  config = files.read_json(folder / "config.json") if (folder / "config.json").exists() else {}
  tied = config.get("tie_word_embeddings") in (True, 1)
  entries: dict[str, Entry] = {}
  for file in weight_files(folder):
    for name, entry in safetensors.read_entries(file).items():
      if name in entries:
        raise UserError(f"{file}: tensor {name!r} is also in {entries[name].path.name}")
      entries[name] = entry
  if (folder / INDEX).exists():
    weight_map = files.read_json(folder / INDEX)["weight_map"]
    optional = {HEAD, EMBEDDING} if tied and not entries.keys().isdisjoint((HEAD, EMBEDDING)) else set()
    wrong = sorted(n for n in weight_map.keys() | entries.keys() if not is_rotary(n) and (
        n not in optional if n not in entries else weight_map.get(n) != entries[n].path.name))
    if wrong:
      raise UserError(f"{folder / INDEX}: disagrees with the shards on {join_items(wrong)}; copy the checkpoint again")
  if tied and HEAD in entries and not any(map(_EMBEDDINGS.search, entries)):
    entries[EMBEDDING] = entries.pop(HEAD)
  return entries


def untied_error(folder: Path, head: str = HEAD) -> UserError:
  """Builds the error for a config.json that ties embeddings of which two different ones are stored."""
  return UserError(f"{folder}: config.json ties the embeddings, but {head} differs from the embedding; if it is meant "
                   'to, set "tie_word_embeddings": false in config.json, or else remove it from the weights')


def split_into_shards(entries: Iterable[_Tensor], max_shard_bytes: int) -> list[tuple[str, list[_Tensor]]]:
  """Assigns entries to files: one file, or shards of at most this many bytes (or a single tensor)."""
  shards: list[list[_Tensor]] = [[]]
  used = 0
  for entry in entries:
    size = int(np.prod(entry[2])) * np.dtype(entry[1]).itemsize
    if shards[-1] and used + size > max_shard_bytes:
      shards.append([])
      used = 0
    shards[-1].append(entry)
    used += size
  if len(shards) == 1:
    return [(WEIGHTS, shards[0])]
  return [(f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors", shard) for i, shard in enumerate(shards)]


def write_index(folder: Path, shards: Sequence[tuple[str, Sequence[tuple]]]) -> None:
  """Writes the index if there is more than one shard; `shards` are names and tensors of `split_into_shards`."""
  if len(shards) > 1:
    total = sum(int(np.prod(e[2])) * np.dtype(e[1]).itemsize for _, shard in shards for e in shard)
    index = {"metadata": {"total_size": total}, "weight_map": {e[0]: file for file, shard in shards for e in shard}}
    files.write_json(folder / INDEX, index, indent=2)


def copy_side_files(source: Path, target: Path, names: Iterable[str] | None = None) -> None:
  """Copies side files (by default all of them: config, tokenizer, templates, generation) unchanged."""
  for file in list_side_files(source) if names is None else names:
    (target / file).parent.mkdir(exist_ok=True)
    shutil.copyfile(source / file, target / file)


def list_side_files(folder: Path) -> list[str]:
  """Lists the existing SIDE_FILES and the templates below TEMPLATES."""
  templates = sorted(f"{TEMPLATES}/{file.name}" for file in (folder / TEMPLATES).glob("*.jinja"))
  return [name for name in (*SIDE_FILES, *templates) if (folder / name).exists()]


def model_order(name: str) -> tuple[Any, ...]:
  """Returns a sort key of tensor names: embedding, layer by layer, norm, head."""
  parts = name.split(".")
  if "layers" in parts[:-1]:
    at = parts.index("layers")
    if parts[at + 1].isdigit():
      return (1, int(parts[at + 1]), parts)
  return ({"embed_tokens": 0, "norm": 2}.get(parts[1] if len(parts) > 1 else "", 3), 0, parts)


def digest(folder: Path) -> str:
  """Computes a digest of all files in a checkpoint folder that this package reads."""
  others = [folder / name for name in (*list_side_files(folder), INDEX) if (folder / name).exists()]
  return files.digest(folder, only=[*others, *weight_files(folder)])
