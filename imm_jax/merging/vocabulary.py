"""Merges of models whose tokenizers differ: one tokenizer, and every model's rows in its order.

What a token's row is where a model has none follows mergekit: the base's, or that of the only model that has one, or
the mean of those that have one, or zeros.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imm_jax import files
from imm_jax.errors import UserError
from imm_jax.merging.recipe import Tokens
from imm_jax.merging.source import Table
from imm_jax.model import folder as checkpoint, safetensors
from imm_jax.model.safetensors import Entry

# Tensors with a row for each token.
_BY_TOKEN = (checkpoint.EMBEDDING, checkpoint.HEAD)


def build(tokens: Tokens, base: Path, models: Sequence[Path]) -> tuple[Any, dict[Path, dict[str, int]]]:
  """The output's tokenizer, and each model's rows by token.

  Args:
    tokens: what is asked for.
    base: whose tokenizer `base` means, and which a union begins with.
    models: all folders.

  Raises:
    UserError: for a folder without a tokenizer.
  """
  from transformers import AutoTokenizer  # late: most merges need none

  def load(folder: Path) -> Any:
    try:
      return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as e:
      raise UserError(f"{folder}: its tokenizer cannot be read ({str(e).splitlines()[0]})") from e

  # Rows that the model has; a tokenizer may know more.
  rows = {folder: files.read_json(folder / "config.json").get("vocab_size") for folder in models}
  loaded = {folder: load(folder) for folder in dict.fromkeys([base, *models])}
  known = {folder: {token: i for token, i in tokenizer.get_vocab().items()
                    if rows.get(folder) is None or i < rows[folder]} for folder, tokenizer in loaded.items()}
  made = load(tokens.source) if isinstance(tokens.source, Path) else load(base)
  if tokens.source == "union":
    added = {}
    for folder, tokenizer in loaded.items():
      special = {info.content: info for info in tokenizer.added_tokens_decoder.values()
                 if info.content in known[folder]}
      plain = [token for token in sorted(known[folder], key=known[folder].get) if token not in special]
      made.add_tokens([token for token in plain if token not in made.get_vocab()])
      added = special | added
    made.add_tokens([info for token, info in added.items() if token not in made.get_vocab()])
  made.add_tokens([token for token in tokens.tokens if token not in made.get_vocab()])
  return made, {folder: known[folder] for folder in models}


def aligned(tokens: Tokens, vocabulary: Mapping[str, int], known: Mapping[Path, Mapping[str, int]],
            tables: Mapping[Path, Table], base: Path | None, scratch: Path) -> dict[Path, Table]:
  """Writes each model's rows in the output's order.

  Args:
    tokens: what is asked for.
    vocabulary: the output's tokens and their rows.
    known: folder -> token -> row.
    tables: folder -> its tensors.
    base: of the models, if they have one.
    scratch: a folder for the new tensors.

  Returns:
    Folder -> where its tensors with a row for each token lie now.

  Raises:
    UserError: for a token that a model is asked for and has not.
  """
  size = max(vocabulary.values(), default=-1) + 1
  if tokens.pad_to_multiple_of:
    size = -(-size // tokens.pad_to_multiple_of) * tokens.pad_to_multiple_of
  # Row of each model for each token of the output, -1 where it has none.
  order = sorted(vocabulary, key=vocabulary.get)
  at = np.array([vocabulary[token] for token in order])
  place = {folder: np.array([rows.get(token, -1) for token in order]) for folder, rows in known.items()}
  result: dict[Path, Table] = {folder: {} for folder in tables}
  for name in _BY_TOKEN:
    old = {folder: _read(table[name]) for folder, table in tables.items() if name in table}
    as_they_are = all(len(rows) == size and (place[folder] == at).all() for folder, rows in old.items())
    if not old or (as_they_are and not tokens.tokens):
      continue
    place_of = {folder: np.where(place[folder] < len(rows), place[folder], -1) for folder, rows in old.items()}
    default = _defaults(tokens, order, place_of, known, old, base)
    for number, (folder, rows) in enumerate(old.items()):
      new = np.zeros((size, *rows.shape[1:]), rows.dtype)
      mine = (place_of[folder] >= 0) & ~default.forced
      new[at[mine]] = rows[place_of[folder][mine]]
      new[at[~mine]] = default.rows[~mine].astype(rows.dtype)
      used = np.zeros(size, bool)
      used[at] = True
      if tokens.pad_to_multiple_of:  # a row that no token has is the mean of all others
        new[~used] = new[used].astype(np.float32).mean(axis=0).astype(rows.dtype)
      file = scratch / f"{name}-{number}.safetensors"
      safetensors.write(file, [(name, new.dtype, new.shape, lambda new=new: [new])])
      result[folder][name] = safetensors.entries(file)[name]
  return result


class _Defaults:
  """Rows for tokens that a model has none for, [tokens, ...], and whether they take the place of its own."""

  def __init__(self, rows: np.ndarray, forced: np.ndarray):
    self.rows, self.forced = rows, forced


def _defaults(tokens: Tokens, order: Sequence[str], place: Mapping[Path, np.ndarray],
              known: Mapping[Path, Mapping[str, int]], old: Mapping[Path, np.ndarray], base: Path | None) -> _Defaults:
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
  forced = np.zeros(len(order), bool)
  number = {token: i for i, token in enumerate(order)}
  for token, entry in tokens.tokens.items():
    i, source = number[token], entry["source"]
    forced[i] = entry["force"]
    if source is None:
      if entry["force"] or count[i] < len(folders):
        raise UserError(f"tokenizer.tokens.{token}: expected a source: a model, or kind: zero, or kind: model_token")
      continue
    if source == {"kind": "zero"}:
      rows[i] = 0
      continue
    folder = source["model"] if isinstance(source, dict) else source
    row = known.get(folder, {}).get(token, -1)
    if isinstance(source, dict):
      row = source["token_id"] if source.get("token_id") is not None else known.get(folder, {}).get(source["token"], -1)
    if folder not in old or not 0 <= row < len(old[folder]):
      raise UserError(f"tokenizer.tokens.{token}: {folder} has no row for it; expected a model that is merged and has "
                      "the token")
    rows[i] = old[folder][row]
  return _Defaults(rows, forced)


def _read(entry: Entry) -> np.ndarray:
  return np.memmap(entry.path, entry.dtype, "r", entry.offset, entry.shape)
