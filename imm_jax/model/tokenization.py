"""Encodes and decodes prompts and their continuations.

Sentencepiece-style tokenizers prepend a space to every text and strip it on decoding, and some strip spaces at both
ends. An answer continues a prompt: encoded as a text of its own, it would gain a space that the model never wrote, or
lose one that it did.
"""

import json
import re
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from imm_jax.errors import UserError

if TYPE_CHECKING:
  import numpy as np
  from transformers import PreTrainedTokenizerBase

# Matches regexes that are anchored at an end of the text: ^ and $ (not escaped or in a class), \A, \z.
_ANCHORED = re.compile(r"(?<![\\\[])\^|(?<!\\)\$|\\[AzZ]")
# Tokenizer -> (its size, a copy that keeps the spaces at the ends of texts, or None if the tokenizer itself does).
_continuation_tokenizers: "weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, Tokenizer | None]]" = (
    weakref.WeakKeyDictionary())


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", text: str, *, rows: int | None = None) -> list[int]:
  """Encodes a text that the model is to continue, with the special tokens that its tokenizer puts before texts.

  A text that begins with BOS, as chat templates write it, gets no second one; an end-of-text token that some tokenizers
  append is removed.

  Args:
    tokenizer: the model's tokenizer.
    text: the prompt.
    rows: number of rows of the model's embedding.

  Raises:
    UserError: for an id past `rows`.
  """
  has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
  ids = tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
  if ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token):
    ids = ids[:-1]
  return check_ids(tokenizer, ids, rows)


def encode_continuation(tokenizer: "PreTrainedTokenizerBase", text: str, *, rows: int | None = None) -> list[int]:
  """Encodes a text that continues another: without special tokens, and with exactly the spaces at its ends.

  Args:
    tokenizer: the model's tokenizer.
    text: the continuation, as `decode_continuation` returns it.
    rows: number of rows of the model's embedding.

  Raises:
    UserError: for an id past `rows`.
  """
  backend = _continuation_tokenizer(tokenizer)
  ids = tokenizer(text, add_special_tokens=False)["input_ids"] if backend is None else backend.encode(
      text, add_special_tokens=False).ids
  return check_ids(tokenizer, ids, rows)


def decode_continuation(tokenizer: "PreTrainedTokenizerBase", ids: "Sequence[int] | np.ndarray", *,
                        skip_special_tokens: bool) -> str:
  """Decodes ids that continue others, keeping a leading space that the model wrote.

  Args:
    tokenizer: the model's tokenizer.
    ids: the sampled ids, [T].
    skip_special_tokens: whether to omit special tokens from the text.
  """
  backend = _continuation_tokenizer(tokenizer)
  if backend is None:
    # The clean-up that some tokenizers request would remove spaces before punctuation.
    return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
  return backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)


def check_ids(tokenizer: "PreTrainedTokenizerBase", ids: list[int], rows: int | None) -> list[int]:
  """Returns the ids; raises UserError for one that has no row in the model's embedding, naming its token."""
  if rows is not None and ids and max(ids) >= rows:
    token = tokenizer.convert_ids_to_tokens(max(ids))
    raise UserError(f"{tokenizer.name_or_path}: a text has the token {token!r}, whose id {max(ids)} is past the "
                    f"{rows} rows of the model's embedding; take it out of the text")
  return ids


def known_ids(tokenizer: "PreTrainedTokenizerBase", rows: int) -> list[int]:
  """Lists in ascending order the tokenizer's ids that a model with this many rows can produce."""
  return sorted(i for i in tokenizer.get_vocab().values() if i < rows)


def _continuation_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> Tokenizer | None:
  """Returns a copy of the tokenizer that keeps the spaces at the ends of texts; None if the tokenizer itself does."""
  size, continuation = _continuation_tokenizers.get(tokenizer, (-1, None))
  if size != len(tokenizer):
    backend = tokenizer.backend_tokenizer
    steps: dict[str, Any] = {}
    for part in ("normalizer", "pre_tokenizer", "decoder"):
      state = getattr(backend, part)
      steps[part] = json.loads(state.__getstate__()) if state is not None else None
    changed = {part: _without_space(step, part) for part, step in steps.items()}
    continuation = Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | changed)) if changed != steps else None
    if continuation is not None:
      continuation.no_truncation()
      continuation.no_padding()
    _continuation_tokenizers[tokenizer] = len(tokenizer), continuation
  return continuation


def _without_space(step: dict[str, Any] | None, part: str) -> dict[str, Any] | None:
  """Changes a step of a tokenizer.json to neither add nor strip spaces at the ends of a text; None if nothing is left.
  """
  if step is None or step["type"] == "Prepend":
    return None
  if step["type"] == "Sequence":
    key = next(key for key in ("normalizers", "pretokenizers", "decoders") if key in step)
    return step | {key: [new for s in step[key] if (new := _without_space(s, part)) is not None]}
  if step["type"] == "Replace" and _ANCHORED.search(step["pattern"].get("Regex", "")):
    return None
  changes = {"prepend_scheme": "never", "add_prefix_space": False, "start": 0, "stop": 0, "strip_left": False,
             "strip_right": False}
  if step["type"] in ("Metaspace", "Strip") or (step["type"], part) == ("ByteLevel", "pre_tokenizer"):
    return step | {key: value for key, value in changes.items() if key in step}
  return step
