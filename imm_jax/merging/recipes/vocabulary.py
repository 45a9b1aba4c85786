"""Aligns models whose tokenizers differ: builds one tokenizer and reorders every model's token rows to match it.

If a model has no row for a token, it gets, as in mergekit, the base's row, or else the mean of the rows of all models
that have one, or else zeros. Tables are rewritten in blocks, so that memory does not grow with them.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imm_jax import files
from imm_jax.errors import UserError, print_once
from imm_jax.merging import model_configs, roles
from imm_jax.merging.recipes.recipe import Tokens
from imm_jax.merging.source import BLOCK, Table
from imm_jax.model import checkpoint_folder, safetensors
from imm_jax.model.safetensors import Entry

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
          "spm.model", "tiktoken.model", "tekken.json")
_CONFIG = "tokenizer_config.json"
# Keys of configs that hold ids of tokens, and the roles that tokenizers know.
_TOKEN_IDS = re.compile(r"(^|_)token_(id|ids|index)$|^(begin_)?suppress_tokens$|^(bad|force)_words_ids$")
_ROLES = re.compile(r"(bos|eos|pad|unk|sep|cls|mask)_token_id$")
# In place of a model: a row that is the mean over all models that have the token, or zeros.
_MEAN, _ZERO = -1, -2


class Built(NamedTuple):
  """Holds the output's tokenizer, the rows of each model by its tokens, and the tokens of the base by their ids."""

  tokenizer: Any
  rows_by_token: dict[Path, dict[str, int]]
  old_tokens: dict[int, str]


def build_tokenizer(tokens: Tokens, base: Path, models: Sequence[Path]) -> Built:
  """Builds the output's tokenizer.

  Args:
    tokens: specification of the tokenizer.
    base: folder of the base, whose tokenizer comes first in a union.
    models: all folders.

  Raises:
    UserError: if a folder has no readable tokenizer.
  """
  loaded = {folder: _load(folder) for folder in dict.fromkeys([base, *models])}
  # A tokenizer may have more tokens than the model has rows.
  sizes = {folder: model_configs.vocab_size(folder) for folder in loaded}
  rows_by_token = {folder: {token: i for token, i in own.get_vocab().items()
                            if sizes[folder] is None or i < sizes[folder]} for folder, own in loaded.items()}
  tokenizer = _load(tokens.source if isinstance(tokens.source, Path) else base)
  known = set(tokenizer.get_vocab())  # asked once, because it copies the whole vocabulary
  if tokens.source == "union":
    plain: dict[str, None] = {}
    special: dict[str, Any] = {}
    for folder, own in loaded.items():
      added = {info.content: info for info in own.added_tokens_decoder.values()}
      for token in sorted(rows_by_token[folder], key=rows_by_token[folder].get):
        if token in added:
          special.setdefault(token, added[token])
        else:
          plain[token] = None
    tokenizer.add_tokens([token for token in plain if token not in known and token not in special])
    tokenizer.add_tokens([info for token, info in special.items() if token not in known])
    known |= plain.keys() | special.keys()
  tokenizer.add_tokens([token for token in tokens.tokens if token not in known])
  return Built(tokenizer, {folder: rows_by_token[folder] for folder in models},
               {i: token for token, i in loaded[base].get_vocab().items()})


def save_tokenizer(built: Built, out: Path) -> None:
  """Writes the tokenizer into an output that has none, and the ids of its special tokens into the configs.

  It has the class that its source names, which older programs know, and its source's chat templates and code.
  """
  source = Path(built.tokenizer.name_or_path)
  tokenizer_config = files.read_json(source / _CONFIG) if (source / _CONFIG).exists() else {}
  built.tokenizer.save_pretrained(out)
  config = files.read_json(out / _CONFIG)
  if (name := tokenizer_config.get("tokenizer_class")) and config.get("tokenizer_class") != name:
    files.write_json(out / _CONFIG, {**config, "tokenizer_class": name}, indent=2, ensure_ascii=False)
  beside = ["chat_template.json", *(path.name for path in source.glob("*.py") if config.get("auto_map"))]
  checkpoint_folder.copy_side_files(source, out, [name for name in beside if (source / name).exists()
                                                  and not (out / name).exists()])
  _update_token_ids(out, built)


def _update_token_ids(out: Path, built: Built) -> None:
  """Gives the tokens that config.json and generation_config.json name by the old ids their ids in the new tokenizer.

  In place of a token that it lacks it names its own of the same role; a line says where there is none.
  """
  ids = built.tokenizer.get_vocab()

  def translate(key: str, value: Any) -> Any:
    if isinstance(value, list):
      translated = [translate(key, v) for v in value]
      return [v for i, v in enumerate(translated) if v not in translated[:i]]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:  # a negative id stands for none
      return value
    token, role = built.old_tokens.get(value), _ROLES.search(key)
    new = ids.get(token, getattr(built.tokenizer, role[0], None) if role else None)
    if new is None:
      print_once(f"note: {name}: {key} {value} is {'no token' if token is None else repr(token)} of the base's "
                 "tokenizer and has no like in the output's; correct it")
    return value if new is None else new

  def update(config: dict[str, Any]) -> dict[str, Any]:
    return {key: update(value) if isinstance(value, dict) else
            translate(key, value) if _TOKEN_IDS.search(key) else value for key, value in config.items()}

  for name in ("config.json", "generation_config.json"):
    if (out / name).exists():
      config = files.read_json(out / name)
      if (changed := update(config)) != config:
        files.write_json(out / name, changed, indent=2, ensure_ascii=False)


def align_rows(tokens: Tokens, vocabulary: Mapping[str, int], rows_by_token: Mapping[Path, Mapping[str, int]],
               tables: Mapping[Path, Table], base: Path | None, scratch: Path | None) -> tuple[dict[Path, Table], int]:
  """Writes each model's embedding and head with rows in the order of the output's tokenizer.

  Args:
    tokens: specification of the tokenizer.
    vocabulary: token -> row of the output.
    rows_by_token: folder -> token -> row of that model.
    tables: folder -> its tensors.
    base: folder of the base, if there is one.
    scratch: folder for the new tensors; None writes none, so that the entries have their shapes alone.

  Returns:
    (folder -> entries of its rewritten tensors, number of rows of the output).

  Raises:
    UserError: if a token's source is a model that has no row for it, or as `roles.token_tensors` does.
  """
  size = max(vocabulary.values(), default=-1) + 1
  if tokens.pad_to_multiple_of:
    size = -(-size // tokens.pad_to_multiple_of) * tokens.pad_to_multiple_of
  result: dict[Path, Table] = {folder: {} for folder in tables}
  if not tokens.tokens and all(rows_by_token[folder] == vocabulary and model_configs.vocab_size(folder) == size
                               for folder in tables):
    return result, size
  tables = dict(zip(tables, roles.share_heads(list(tables.values())), strict=True))
  names = {folder: roles.token_tensors(folder, table) for folder, table in tables.items()}
  for name in dict.fromkeys(name for of_model in names.values() for name in of_model):
    old = {folder: _open_rows(tables[folder][name]) for folder in tables if name in names[folder]}
    order = _Order(tokens, vocabulary, rows_by_token, old, base)
    for number, folder in enumerate(old):
      shape = (size, *old[folder].shape[1:])
      if scratch is None:
        result[folder][name] = tables[folder][name]._replace(shape=shape)
        continue
      file = scratch / f"{name}-{number}.safetensors"
      safetensors.write(file, [(name, old[folder].dtype, shape, functools.partial(order.blocks, folder, size))])
      result[folder][name] = safetensors.read_entries(file)[name]
  return result, size


class _Order:
  """Holds the order of a table's rows in the output, and where each model's rows come from."""

  def __init__(self, tokens: Tokens, vocabulary: Mapping[str, int], rows_by_token: Mapping[Path, Mapping[str, int]],
               old: Mapping[Path, np.ndarray], base: Path | None):
    self._pads, self._old = bool(tokens.pad_to_multiple_of), old
    order = sorted(vocabulary, key=vocabulary.get)
    # For each token its row in the output, and in each model (-1 if it has none).
    self._rows = np.array([vocabulary[token] for token in order], np.int64)
    own = {folder: np.array([rows_by_token[folder].get(token, -1) for token in order], np.int64) for folder in old}
    self._own = {folder: np.where(rows < len(old[folder]), rows, -1) for folder, rows in own.items()}
    # For each token the model (an index, or _MEAN or _ZERO) and row that a model takes that lacks it, or must take.
    self._donors, self._donor_rows = np.full(len(order), _MEAN), np.full(len(order), -1)
    self._forced = np.zeros(len(order), bool)
    if base in old:
      has = self._own[base] >= 0
      self._donors[has], self._donor_rows[has] = list(old).index(base), self._own[base][has]
    number = {token: i for i, token in enumerate(order)} if tokens.tokens else {}
    for token, entry in tokens.tokens.items():
      self._choose(token, number[token], entry, rows_by_token)

  def _choose(self, token: str, i: int, entry: Mapping[str, Any], rows_by_token: Mapping[Path, Mapping[str, int]],
              ) -> None:
    """Applies a recipe's entry for one token."""
    source = entry["source"]
    self._forced[i] = entry["force"]
    if source is None:
      if entry["force"] or any(rows[i] < 0 for rows in self._own.values()):
        raise UserError(f"tokenizer.tokens.{token}: expected a source: a model, or kind: zero, or kind: model_token")
      return
    if source == {"kind": "zero"}:
      self._donors[i] = _ZERO
      return
    folder = source["model"] if isinstance(source, dict) else source
    row = rows_by_token.get(folder, {}).get(token, -1)
    if isinstance(source, dict):
      row = source.get("token_id")
      row = rows_by_token.get(folder, {}).get(source["token"], -1) if row is None else row
    if folder not in self._old or not 0 <= row < len(self._old[folder]):
      raise UserError(f"tokenizer.tokens.{token}: {folder} has no row for it; expected a model that is merged and has "
                      "the token")
    self._donors[i], self._donor_rows[i] = list(self._old).index(folder), row

  def blocks(self, folder: Path, size: int) -> Iterator[np.ndarray]:
    """Yields a model's new table of `size` rows in blocks of rows."""
    padding = None
    if self._pads and size > len(self._rows):  # padding rows are the mean of all others
      padding = sum(block[used].sum(axis=0, dtype=np.float64) for block, used in self._fill(folder, size))
      padding = (padding / len(self._rows)).astype(self._old[folder].dtype)
    for block, used in self._fill(folder, size):
      if padding is not None:
        block[~used] = padding
      yield block

  def _fill(self, folder: Path, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields blocks of rows, and for each row whether it stands for a token; others are zero."""
    rows = self._old[folder]
    token_of = np.full(size, -1)
    token_of[self._rows] = np.arange(len(self._rows))
    step = max(1, BLOCK // max(1, math.prod(rows.shape[1:])))
    for begin in range(0, size, step):
      at = token_of[begin:begin + step]
      block = np.zeros((len(at), *rows.shape[1:]), rows.dtype)
      kept = (at >= 0) & (self._own[folder][at] >= 0) & ~self._forced[at]
      block[kept] = rows[self._own[folder][at[kept]]]
      lacking = (at >= 0) & ~kept
      block[lacking] = self._default_rows(at[lacking], rows.shape[1:]).astype(rows.dtype)
      yield block, at >= 0

  def _default_rows(self, at: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Computes the rows [len(at), ...] in float32 that these tokens have in models that lack them."""
    result = np.zeros((len(at), *shape), np.float32)
    averaged, counts = self._donors[at] == _MEAN, np.zeros(len(at), np.float32)
    for i, (folder, rows) in enumerate(self._old.items()):
      given = self._donors[at] == i
      result[given] = rows[self._donor_rows[at[given]]]
      has = averaged & (self._own[folder][at] >= 0)
      result[has] += rows[self._own[folder][at[has]]].astype(np.float32)
      counts += has
    return result / np.maximum(np.where(averaged, counts, 1), 1).reshape(-1, *(1,) * len(shape))


def _load(folder: Path) -> Any:
  """Loads a tokenizer: tokenizer.json as written, where there is one, since AutoTokenizer may change its ids."""
  if not any((folder / name).exists() for name in _FILES):
    raise UserError(f"{folder}: has no tokenizer; expected {_FILES[0]} (or {', '.join(_FILES[1:])}) in it")
  try:
    if (folder / _FILES[0]).exists():
      from transformers import PreTrainedTokenizerFast  # imported here because few merges need transformers

      return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    from transformers import AutoTokenizer  # takes seconds to import, since it imports all models

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
  except Exception as e:  # tokenizers raises a bare Exception for a damaged file
    raise UserError(f"{folder}: its tokenizer cannot be read ({' '.join(str(e).split())})") from e


def _open_rows(entry: Entry) -> np.ndarray:
  return np.memmap(entry.path, entry.dtype, "r", entry.offset, entry.shape)
