"""Shared by all samplers: checks of arguments, end tokens and stop strings, and the text of completions."""

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
  """Raises ValueError if an argument of `Sampler.generate` is out of range."""
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
  """Loads a checkpoint's tokenizer and the ids of its end-of-text tokens.

  These are the tokenizer's own, and those of generation_config.json or else of config.json.

  Raises:
    UserError: when an id is not below `rows`, the size of the embedding, or the tokenizer cannot be loaded.
  """
  path = folder / "generation_config.json"
  ids = files.read_json(path).get("eos_token_id") if path.exists() else None
  if ids is None:
    path = folder / "config.json"
    ids = files.read_json(path).get("eos_token_id")
  eos = [i for i in (ids if isinstance(ids, list) else [ids]) if i is not None]
  if not all(type(i) is int and 0 <= i < rows for i in eos):
    raise UserError(f"{path}: eos_token_id={ids!r}; expected a token id, from 0 to {rows - 1}, or a list of them")
  tokenizer = load_tokenizer(folder, rows=rows)
  return tokenizer, tuple(sorted({*eos, tokenizer.eos_token_id}))


def encode(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], rows: int) -> list[list[int]]:
  """Tokenizes prompts; raises ValueError for an empty prompt, UserError for an id outside of the `rows`."""
  ids = [list(p.ids) or encode_prompt(tokenizer, p.text, rows=rows) for p in prompts]
  if not all(ids):
    raise ValueError(f"prompt {prompts[ids.index([])].id!r} has no tokens")
  for prompt, tokens in zip(prompts, ids, strict=True):
    if wrong := [i for i in (min(tokens), max(tokens)) if not 0 <= i < rows]:
      raise UserError(f"prompt {prompt.id!r} has token id {wrong[0]}; expected ids from 0 to {rows - 1}, the rows of "
                      "the embedding")
  return ids


def endings(tokenizer: "PreTrainedTokenizerBase", eos: Sequence[int], stop: Sequence[str], rows: int,
            ) -> tuple[tuple[int, ...], tuple[str, ...]]:
  """Splits the ends of a sample into token ids below `rows` and stop strings to look for in its text."""
  special = {text: i for text, i in special_ids(tokenizer).items() if i < rows}
  return (tuple(sorted({*eos, *(special[s] for s in stop if s in special)})),
          tuple(s for s in stop if s not in special))


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
  """Returns all special tokens' ids by text; some tokenizers list only a few of them in `all_special_tokens`."""
  added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
  return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def completion(tokenizer: "PreTrainedTokenizerBase", tokens: np.ndarray, ends: tuple[int, ...], stop: tuple[str, ...],
               ) -> Completion:
  """Decodes drawn tokens up to the first of the ids `ends`, and before the first of the strings `stop`.

  Args:
    tokenizer: the model's tokenizer.
    tokens: int [T]; tokens after the end of the sample are ignored.
    ends: token ids from `endings`.
    stop: strings from `endings`.
  """
  end_positions = np.flatnonzero(np.isin(tokens, ends))
  finish = "stop" if len(end_positions) else "length"
  if len(end_positions):
    tokens = tokens[:end_positions[0] + 1]
  decode_plain = lambda n: decode_continuation(tokenizer, tokens[:n], skip_special_tokens=True)
  decode_full = lambda n: decode_continuation(tokenizer, tokens[:n], skip_special_tokens=False)
  text = decode_full(len(tokens)) if stop else ""
  cut = min((text.find(s) for s in stop if s in text), default=-1)
  if cut < 0:
    return Completion(decode_plain(len(tokens)), len(tokens), finish)
  # The number of tokens until a stop string appears, and the number that lie entirely before it.
  count = bisect.bisect_left(range(len(tokens)), True, key=lambda n: any(s in decode_full(n) for s in stop))
  shorter = next(n for n in range(count - 1, -1, -1) if text[:cut].startswith(decode_full(n)))
  part = "" if tokens[shorter] in special_ids(tokenizer).values() else text[len(decode_full(shorter)):cut]
  return Completion(decode_plain(shorter) + part, count, "stop")
