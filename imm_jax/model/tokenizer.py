"""Tokenizers of checkpoint folders."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from imm_jax.errors import UserError

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase


def has_tokenizer(folder: str | Path) -> bool:
  """Whether an HF checkpoint folder holds a tokenizer."""
  return any((Path(folder) / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def load_tokenizer(folder: str | Path, *, rows: int | None = None) -> "PreTrainedTokenizerBase":
  """The tokenizer of an HF checkpoint folder.

  Args:
    folder: holds tokenizer.json, tokenizer.model or vocab.json.
    rows: of the model's embedding; it may have some that are no id, but each id needs one.

  Raises:
    UserError: when the folder holds none that can be loaded, it has no end-of-text token, or ids past `rows`.
  """
  # At import transformers advises to install torch, which nothing here uses.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  from transformers import AutoTokenizer

  if not has_tokenizer(folder):
    raise UserError(f"{folder}: has no tokenizer; expected tokenizer.json (or tokenizer.model, vocab.json) in it")
  try:
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
  except Exception as e:  # tokenizers raises a bare Exception for a damaged file
    raise UserError(f"{folder}: its tokenizer cannot be loaded ({str(e).partition(chr(10))[0]})") from e
  if tokenizer.eos_token_id is None:
    raise UserError(f"{folder}: its tokenizer has no end-of-text token; set eos_token in tokenizer_config.json")
  largest = max(tokenizer.get_vocab().values())
  if rows is not None and largest >= rows:
    raise UserError(f"{folder}: the tokenizer has ids up to {largest}, the embedding only {rows} rows; is it this "
                    "model's tokenizer?")
  return tokenizer
