"""HF checkpoint folders as files: weights in one safetensors file or in shards with an index, and what lies beside."""

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from imm_jax import files
from imm_jax.errors import UserError, listed
from imm_jax.model import safetensors
from imm_jax.model.safetensors import Entry

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MAX_SHARD_BYTES = 5_000_000_000
# Everything in a checkpoint folder that is not weights and that an exported copy needs.
SIDE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
              "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
              "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
              "preprocessor_config.json")
# Beside them: chat templates by name, as transformers stores all but the first.
TEMPLATES = "additional_chat_templates"
# What weights are called that are not read, and what to do; training_args.bin and the like are none.
_UNREAD = {
    r"model-\d+-of-\d+\.safetensors": f"shards ({{}}) without {INDEX}; get that file too",
    r"consolidated[^/]*\.safetensors": "weights in another form than transformers' ({}), which are not read; take the "
    f"model as {WEIGHTS}",
    r"(?!adapter_model)[^/]*\.safetensors": f"{{}}, a name that is not read; if it is the whole model, call it "
    f"{WEIGHTS} in a folder that holds no others",
    r"[^/]*\.gguf": "weights in GGUF ({}), which are not read; take the model in safetensors that they were made from",
    r"pytorch_model[^/]*\.bin(\.index\.json)?|consolidated[^/]*\.pth": "a pickle checkpoint ({}), which is not read; "
    "save it again with save_pretrained(..., safe_serialization=True), and take that folder"}
# What programs that quantise write beside config.json, and in place of a weight.
_QUANTISED = re.compile(r"(quantize|quant|hf_quant)_config\.json|.*\.(qweight|weight_packed|weight\.absmax)")
# (name, dtype, shape, ...) of a tensor to be written.
_Tensor = TypeVar("_Tensor", bound=tuple)


def require(folder: Path) -> None:
  """Raises UserError unless this is a folder, and of more than an adapter."""
  if not folder.is_dir():
    raise UserError(f"{folder}: {'is a file' if folder.exists() else 'no such checkpoint folder'}; expected a folder "
                    f"with config.json and {WEIGHTS}")
  if (folder / ADAPTER_CONFIG).exists() and not has_weights(folder):
    raise no_model(str(folder), folder / ADAPTER_CONFIG)


def no_model(name: str, adapter_config: Path) -> UserError:
  """What is wrong where a LoRA adapter is given as the model."""
  base = files.read_json(adapter_config).get("base_model_name_or_path")
  return UserError(f"{name}: is a LoRA adapter{f' of {base}' if base else ''}, not a whole model; give "
                   f"{base or 'BASE'}+{name}")


def has_weights(folder: Path) -> bool:
  """Whether a folder has weights in it, beside its config."""
  return (folder / INDEX).exists() or (folder / WEIGHTS).exists()


def weight_files(folder: Path) -> list[Path]:
  """The files that hold a checkpoint's tensors.

  Raises:
    UserError: when there are none, the index is damaged or names a file that is missing, or there is a single file
      beside the index: programs differ in which they read.
  """
  require(folder)
  if (folder / INDEX).exists():
    names = shards(folder / INDEX)
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
  """Says which of the files hold weights that are not read, and what to do; "" where none does."""
  names = sorted(names)
  return next((text.format(name) for pattern, text in _UNREAD.items() for name in names
               if re.fullmatch(pattern, name)), "")


def check_quantised(where: str, names: Iterable[str]) -> None:
  """Raises UserError where the name of a file or tensor says that weights are quantised; config.json may not say it."""
  if found := next(filter(_QUANTISED.fullmatch, names), None):
    raise UserError(f"{where}: {found} says that its weights are quantised, and such are not read; take the "
                    "unquantised model that they were made from")


def is_rotary(name: str) -> bool:
  """Whether a tensor holds rotary frequencies, as old checkpoints do, though they follow from config.json."""
  return name.endswith("rotary_emb.inv_freq")


def shards(index: Path) -> list[str]:
  """The names of the files that an index says hold the weights; raises UserError where it is damaged or names none."""
  weight_map = files.read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not all(
      isinstance(file, str) and Path(file).name == file for file in weight_map.values()):
    raise UserError(f"{index}: has no weight_map from tensor names to file names")
  if not weight_map:
    raise UserError(f"{index}: its weight_map is empty; expected the file of each tensor")
  names = sorted(set(weight_map.values()))
  if other := next((name for name in names if not name.endswith(".safetensors")), None):
    raise UserError(f"{index}: names {other!r}, which is no safetensors file; expected weights in safetensors alone")
  return names


def tensors(folder: Path) -> dict[str, Entry]:
  """Where every tensor of a checkpoint lies.

  A head that config.json ties to the embedding, and that alone is stored, stands under the embedding's name. The index
  may name what no shard holds where nothing needs it: rotary frequencies, and one of a tied head and embedding.

  Raises:
    UserError: as `weight_files` and `safetensors.entries` do, and where the index disagrees with the shards.
  """
  config = files.read_json(folder / "config.json") if (folder / "config.json").exists() else {}
  tied = config.get("tie_word_embeddings") in (True, 1)
  found: dict[str, Entry] = {}
  for file in weight_files(folder):
    for name, entry in safetensors.entries(file).items():
      if name in found:
        raise UserError(f"{file}: tensor {name!r} stands in {found[name].path.name} too")
      found[name] = entry
  if (folder / INDEX).exists():
    named = files.read_json(folder / INDEX)["weight_map"]
    twins = {HEAD, EMBEDDING} if tied and not found.keys().isdisjoint((HEAD, EMBEDDING)) else set()
    wrong = sorted(n for n in named.keys() | found.keys() if not is_rotary(n) and (
        n not in twins if n not in found else named.get(n) != found[n].path.name))
    if wrong:
      raise UserError(f"{folder / INDEX}: disagrees with the shards on {listed(wrong)}; copy the checkpoint again")
  if tied and HEAD in found and EMBEDDING not in found:
    found[EMBEDDING] = found.pop(HEAD)
  return found


def untied(folder: Path) -> UserError:
  """What is wrong where config.json ties the embeddings and the two that are stored differ."""
  return UserError(f"{folder}: config.json ties the embeddings, but {HEAD} differs from the embedding; if it is meant "
                   'to, set "tie_word_embeddings": false in config.json, or else remove it from the weights')


def split(entries: Iterable[_Tensor], max_shard_bytes: int) -> list[tuple[str, list[_Tensor]]]:
  """File names and what goes into each: one file, or shards of at most this many bytes (or of one tensor)."""
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
  """Writes the index of more than one shard."""
  if len(shards) > 1:
    total = sum(int(np.prod(e[2])) * np.dtype(e[1]).itemsize for _, shard in shards for e in shard)
    index = {"metadata": {"total_size": total}, "weight_map": {e[0]: file for file, shard in shards for e in shard}}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_side_files(source: Path, target: Path, names: Iterable[str] | None = None) -> None:
  """Copies config, tokenizer, template and generation files unchanged, or those of `names`."""
  for file in side_files(source) if names is None else names:
    (target / file).parent.mkdir(exist_ok=True)
    shutil.copyfile(source / file, target / file)


def side_files(folder: Path) -> list[str]:
  """Those of SIDE_FILES that are there, and the templates below TEMPLATES."""
  templates = sorted(f"{TEMPLATES}/{file.name}" for file in (folder / TEMPLATES).glob("*.jinja"))
  return [name for name in (*SIDE_FILES, *templates) if (folder / name).exists()]


def model_order(name: str) -> tuple[Any, ...]:
  """Sorts tensor names: embedding, layer by layer, norm, head."""
  parts = name.split(".")
  if "layers" in parts[:-1]:
    at = parts.index("layers")
    if parts[at + 1].isdigit():
      return (1, int(parts[at + 1]), parts)
  return ({"embed_tokens": 0, "norm": 2}.get(parts[1] if len(parts) > 1 else "", 3), 0, parts)


def digest(folder: Path) -> str:
  """Of everything in a checkpoint folder that this package reads; other files may come and go."""
  beside = [folder / name for name in (*side_files(folder), INDEX) if (folder / name).exists()]
  return files.digest(folder, only=[*beside, *weight_files(folder)])
