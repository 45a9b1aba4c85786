"""Text to token ids and back, where an answer continues a prompt.

Tokenizers of sentencepiece's kind put a space before every text and take one away when they decode, and some drop the
spaces at its ends. An answer is no text of its own: what is trained on would get a space that the model never wrote,
and lose one that it did.
"""

import json
import re
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from imm_jax.errors import UserError

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

# A regex that matches at the ends of a text alone: ^ and $ as no other characters, \A, \z.
_ANCHORED = re.compile(r"(?<![\\\[])\^|(?<!\\)\$|\\[AzZ]")
# By tokenizer: how many ids it had, and the one that adds and takes away nothing, or None where it does so itself.
_continuing: "weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, Tokenizer | None]]" = (
    weakref.WeakKeyDictionary())


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", text: str, *, rows: int | None = None) -> list[int]:
  """The ids of a text that the model is to continue, with what its tokenizer puts before every text.

  A text that brings its own BOS, as chat templates write it, gets no second one; an end-of-text token after the text,
  which some tokenizers add, is left out.

  Args:
    tokenizer: of the model.
    text: the prompt.
    rows: of the model's embedding.

  Raises:
    UserError: for an id past `rows`.
  """
  own = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
  ids = tokenizer(text, add_special_tokens=not own)["input_ids"]
  if ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token):
    ids = ids[:-1]
  return check_ids(tokenizer, ids, rows)


def encode_continuation(tokenizer: "PreTrainedTokenizerBase", text: str, *, rows: int | None = None) -> list[int]:
  """The ids of a text that continues another: no special tokens, and the spaces at its ends that are in it.

  Args:
    tokenizer: of the model.
    text: what follows the prompt, as `decode_continuation` gives it.
    rows: of the model's embedding.

  Raises:
    UserError: for an id past `rows`.
  """
  plain = _plain(tokenizer)
  ids = tokenizer(text, add_special_tokens=False)["input_ids"] if plain is None else plain.encode(
      text, add_special_tokens=False).ids
  return check_ids(tokenizer, ids, rows)


def decode_continuation(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], *, skip_special_tokens: bool) -> str:
  """The text of ids that continue others, with the space at its front where the model wrote one.

  Args:
    tokenizer: of the model.
    ids: what was sampled, [T].
    skip_special_tokens: whether special tokens are left out of the text.
  """
  plain = _plain(tokenizer)
  if plain is None:
    # The clean-up that some ask for takes spaces away before punctuation.
    return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
  return plain.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)


def check_ids(tokenizer: "PreTrainedTokenizerBase", ids: list[int], rows: int | None) -> list[int]:
  """The ids; raises UserError for one that has no row of the model's embedding, naming its token."""
  if rows is not None and ids and max(ids) >= rows:
    token = tokenizer.convert_ids_to_tokens(max(ids))
    raise UserError(f"{tokenizer.name_or_path}: a text has the token {token!r}, whose id {max(ids)} is past the "
                    f"{rows} rows of the model's embedding; take it out of the text")
  return ids


def known_ids(tokenizer: "PreTrainedTokenizerBase", rows: int) -> list[int]:
  """The ids that the tokenizer has and a model with so many rows can give, ascending."""
  return sorted(i for i in tokenizer.get_vocab().values() if i < rows)


def _plain(tokenizer: "PreTrainedTokenizerBase") -> Tokenizer | None:
  """One that adds and takes away no space at the ends of a text; None where the tokenizer itself is such."""
  size, found = _continuing.get(tokenizer, (-1, None))
  if size != len(tokenizer):
    backend = tokenizer.backend_tokenizer
    now: dict[str, Any] = {}
    for part in ("normalizer", "pre_tokenizer", "decoder"):
      state = getattr(backend, part)
      now[part] = json.loads(state.__getstate__()) if state is not None else None
    changed = {part: _without_space(step, part) for part, step in now.items()}
    found = Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | changed)) if changed != now else None
    if found is not None:
      found.no_truncation()
      found.no_padding()
    _continuing[tokenizer] = len(tokenizer), found
  return found


def _without_space(step: dict[str, Any] | None, part: str) -> dict[str, Any] | None:
  """A step of a tokenizer, as tokenizer.json writes it, that neither adds nor takes away a space at the ends of a text;
  None for none."""
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
