"""What every sampler shares: which arguments make sense, what ends a sample, and what of it is the completion."""

import bisect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from imm_jax import files
from imm_jax.errors import UserError
from imm_jax.model.tokenization import decode_continuation, encode_prompt
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.sampling import Completion, Prompt

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase


def check_arguments(max_new_tokens: int, num_samples: int, temperatures: Sequence[float], top_p: float,
                    stop: Sequence[str], seed: int) -> None:
  """Raises ValueError for an argument of `generate` that is out of range."""
  if max_new_tokens < 1 or num_samples < 1:
    raise ValueError(f"max_new_tokens={max_new_tokens}, num_samples={num_samples}: expected 1 or more")
  if not len(temperatures) or not all(math.isfinite(t) and t >= 0 for t in temperatures):
    raise ValueError(f"temperatures={temperatures}: expected one or more numbers >= 0")
  if not 0 < top_p <= 1:
    raise ValueError(f"top_p={top_p}: expected 0 < top_p <= 1")
  if isinstance(stop, str) or not all(stop):
    raise ValueError(f"stop={stop!r}: expected a sequence of strings that are not empty")
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed={seed}: expected 0 <= seed < 2**32")


def load(folder: Path, rows: int) -> tuple["PreTrainedTokenizerBase", tuple[int, ...]]:
  """A checkpoint's tokenizer, and tokens that end a text: its own, and generation_config.json's or else config.json's.

  Raises:
    UserError: when one of them is not below `rows`, the size of the embedding, or there is no such tokenizer.
  """
  path = folder / "generation_config.json"
  ids = files.read_json(path).get("eos_token_id") if path.exists() else None
  if ids is None:
    path = folder / "config.json"
    ids = files.read_json(path).get("eos_token_id")
  found = [i for i in (ids if isinstance(ids, list) else [ids]) if i is not None]
  if not all(type(i) is int and 0 <= i < rows for i in found):
    raise UserError(f"{path}: eos_token_id={ids!r}; expected a token id, from 0 to {rows - 1}, or a list of them")
  tokenizer = load_tokenizer(folder, rows=rows)
  return tokenizer, tuple(sorted({*found, tokenizer.eos_token_id}))


def encode(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], rows: int) -> list[list[int]]:
  """The prompts' token ids; raises ValueError for a prompt without a token, UserError for an id past `rows`."""
  ids = [list(p.ids) or encode_prompt(tokenizer, p.text, rows=rows) for p in prompts]
  if not all(ids):
    raise ValueError(f"prompt {prompts[ids.index([])].id!r} has no tokens")
  return ids


def endings(tokenizer: "PreTrainedTokenizerBase", eos: Sequence[int], stop: Sequence[str], rows: int,
            ) -> tuple[tuple[int, ...], tuple[str, ...]]:
  """(ids below `rows` that end a sample where they are drawn, strings that end it where its text shows them)."""
  special = {text: i for text, i in special_ids(tokenizer).items() if i < rows}
  return (tuple(sorted({*eos, *(special[s] for s in stop if s in special)})),
          tuple(s for s in stop if s not in special))


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
  """By text: what a decoded text may leave out; of some tokenizers `all_special_tokens` names only a few."""
  marked = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
  return marked | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def completion(tokenizer: "PreTrainedTokenizerBase", tokens: np.ndarray, ends: tuple[int, ...], stop: tuple[str, ...],
               ) -> Completion:
  """The completion in tokens that were drawn: up to the first of `ends`, and before the first of the strings `stop`.

  Args:
    tokenizer: of the model.
    tokens: int [T]; some may come after what ends the sample.
    ends: from `endings`.
    stop: from `endings`.
  """
  ended = np.flatnonzero(np.isin(tokens, ends))
  finish = "stop" if len(ended) else "length"
  if len(ended):
    tokens = tokens[:ended[0] + 1]
  plain = lambda n: decode_continuation(tokenizer, tokens[:n], skip_special_tokens=True)
  full = lambda n: decode_continuation(tokenizer, tokens[:n], skip_special_tokens=False)
  text = full(len(tokens)) if stop else ""
  cut = min((text.find(s) for s in stop if s in text), default=-1)
  if cut < 0:
    return Completion(plain(len(tokens)), len(tokens), finish)
  # The tokens that were needed for the stop string to show, and those that lie before it.
  count = bisect.bisect_left(range(len(tokens)), True, key=lambda n: any(s in full(n) for s in stop))
  before = next(n for n in range(count - 1, -1, -1) if text[:cut].startswith(full(n)))
  part = "" if tokens[before] in special_ids(tokenizer).values() else text[len(full(before)):cut]
  return Completion(plain(before) + part, count, "stop")
