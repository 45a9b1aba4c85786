"""Aligns models whose tokenizers differ: builds one tokenizer and reorders every model's token rows to match it.

If a model has no row for a token, it gets, as in mergekit, the base's row, or else the mean of the rows of all models
that have one, or else zeros.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imm_jax import files
from imm_jax.errors import UserError
from imm_jax.merging.recipe import Tokens
from imm_jax.merging.source import Table
from imm_jax.model import folder as model_folder, safetensors
from imm_jax.model.safetensors import Entry

# Tensors with a row for each token.
_TOKEN_TENSORS = (model_folder.EMBEDDING, model_folder.HEAD)


def build_tokenizer(tokens: Tokens, base: Path, models: Sequence[Path]) -> tuple[Any, dict[Path, dict[str, int]]]:
  """Builds the output's tokenizer.

  Args:
    tokens: specification of the tokenizer.
    base: folder of the base, whose tokenizer comes first in a union.
    models: all folders.

  Returns:
    (tokenizer, folder -> token -> row of that model).

  Raises:
    UserError: if a folder has no readable tokenizer.
  """
  from transformers import AutoTokenizer  # imported here because few merges need transformers

  def load(folder: Path) -> Any:
    try:
      return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as e:
      raise UserError(f"{folder}: its tokenizer cannot be read ({str(e).splitlines()[0]})") from e

  # A tokenizer may have more tokens than the model has rows.
  rows = {folder: files.read_json(folder / "config.json").get("vocab_size") for folder in models}
  loaded = {folder: load(folder) for folder in dict.fromkeys([base, *models])}
  rows_by_token = {folder: {token: i for token, i in own.get_vocab().items()
                            if rows.get(folder) is None or i < rows[folder]} for folder, own in loaded.items()}
  tokenizer = load(tokens.source) if isinstance(tokens.source, Path) else load(base)
  if tokens.source == "union":
    added = {}
    for folder, own in loaded.items():
      special = {info.content: info for info in own.added_tokens_decoder.values()
                 if info.content in rows_by_token[folder]}
      plain = [token for token in sorted(rows_by_token[folder], key=rows_by_token[folder].get) if token not in special]
      tokenizer.add_tokens([token for token in plain if token not in tokenizer.get_vocab()])
      added = special | added
    tokenizer.add_tokens([info for token, info in added.items() if token not in tokenizer.get_vocab()])
  tokenizer.add_tokens([token for token in tokens.tokens if token not in tokenizer.get_vocab()])
  return tokenizer, {folder: rows_by_token[folder] for folder in models}


def align_rows(tokens: Tokens, vocabulary: Mapping[str, int], rows_by_token: Mapping[Path, Mapping[str, int]],
               tables: Mapping[Path, Table], base: Path | None, scratch: Path) -> dict[Path, Table]:
  """Writes each model's embedding and head with rows in the order of the output's tokenizer.

  Args:
    tokens: specification of the tokenizer.
    vocabulary: token -> row of the output.
    known: folder -> token -> row of that model.
    tables: folder -> its tensors.
    base: folder of the base, if there is one.
    scratch: folder for the new tensors.

  Returns:
    Folder -> entries of its rewritten tensors.

  Raises:
    UserError: if a token's source is a model that has no row for it.
  """
  size = max(vocabulary.values(), default=-1) + 1
  if tokens.pad_to_multiple_of:
    size = -(-size // tokens.pad_to_multiple_of) * tokens.pad_to_multiple_of
  # Row of each model for each token of the output, -1 if it has none.
  order = sorted(vocabulary, key=vocabulary.get)
  at = np.array([vocabulary[token] for token in order])
  place = {folder: np.array([rows.get(token, -1) for token in order]) for folder, rows in rows_by_token.items()}
  result: dict[Path, Table] = {folder: {} for folder in tables}
  for name in _TOKEN_TENSORS:
    old = {folder: _open_rows(table[name]) for folder, table in tables.items() if name in table}
    unchanged = all(len(rows) == size and (place[folder] == at).all() for folder, rows in old.items())
    if not old or (unchanged and not tokens.tokens):
      continue
    place_of = {folder: np.where(place[folder] < len(rows), place[folder], -1) for folder, rows in old.items()}
    default = _default_rows(tokens, order, place_of, rows_by_token, old, base)
    for number, (folder, rows) in enumerate(old.items()):
      new = np.zeros((size, *rows.shape[1:]), rows.dtype)
      keep = (place_of[folder] >= 0) & ~default.override
      new[at[keep]] = rows[place_of[folder][keep]]
      new[at[~keep]] = default.rows[~keep].astype(rows.dtype)
      used = np.zeros(size, bool)
      used[at] = True
      if tokens.pad_to_multiple_of:  # padding rows are the mean of all others
        new[~used] = new[used].astype(np.float32).mean(axis=0).astype(rows.dtype)
      file = scratch / f"{name}-{number}.safetensors"
      safetensors.write(file, [(name, new.dtype, new.shape, lambda new=new: [new])])
      result[folder][name] = safetensors.read_entries(file)[name]
  return result


class _DefaultRows:
  """Rows [tokens, ...] for tokens that a model lacks, and whether they override the rows of models that have them."""

  def __init__(self, rows: np.ndarray, override: np.ndarray):
    self.rows, self.override = rows, override


def _default_rows(tokens: Tokens, order: Sequence[str], place: Mapping[Path, np.ndarray],
                  rows_by_token: Mapping[Path, Mapping[str, int]], old: Mapping[Path, np.ndarray], base: Path | None,
                  ) -> _DefaultRows:
  folders = list(old)
  rows = np.zeros((len(order), *old[folders[0]].shape[1:]), np.float32)
  has = np.stack([place[folder] >= 0 for folder in folders])
  count = has.sum(axis=0)
  some = np.flatnonzero(count < len(folders))
  if base in old:
    of_base = place[base] >= 0
    rows[of_base] = old[base][place[base][of_base]]
  else:
    of_base = np.zeros(len(order), bool)
  for i in some[~of_base[some]]:
    if count[i]:
      rows[i] = np.mean([old[f][place[f][i]].astype(np.float32) for f in folders if place[f][i] >= 0], axis=0)
  override = np.zeros(len(order), bool)
  number = {token: i for i, token in enumerate(order)}
  for token, entry in tokens.tokens.items():
    i, source = number[token], entry["source"]
    override[i] = entry["force"]
    if source is None:
      if entry["force"] or count[i] < len(folders):
        raise UserError(f"tokenizer.tokens.{token}: expected a source: a model, or kind: zero, or kind: model_token")
      continue
    if source == {"kind": "zero"}:
      rows[i] = 0
      continue
    folder = source["model"] if isinstance(source, dict) else source
    row = rows_by_token.get(folder, {}).get(token, -1)
    if isinstance(source, dict):
      row = source.get("token_id")
      row = rows_by_token.get(folder, {}).get(source["token"], -1) if row is None else row
    if folder not in old or not 0 <= row < len(old[folder]):
      raise UserError(f"tokenizer.tokens.{token}: {folder} has no row for it; expected a model that is merged and has "
                      "the token")
    rows[i] = old[folder][row]
  return _DefaultRows(rows, override)


def _open_rows(entry: Entry) -> np.ndarray:
  return np.memmap(entry.path, entry.dtype, "r", entry.offset, entry.shape)
