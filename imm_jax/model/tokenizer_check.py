"""Checks that a loaded tokenizer has the ids and texts of its file."""

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imm_jax.errors import UserError
from imm_jax.model.tokenization import check_ids, decode_continuation, encode_continuation
from imm_jax.model.tokenizer import load_tokenizer, read_sentencepiece

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

Codec = tuple[Callable[[str], list[int]], Callable[[list[int]], str]]


def check_tokenizer(folder: str | Path, texts: Sequence[str], *, rows: int) -> str:
  """Compares a folder's tokenizer on texts with its file, as read by the file's own library.

  The ids must be the file's, and so must the decoded text. A text that is decoded unchanged must also round-trip as a
  continuation, and so must the ids of its second half from a word with a leading space on. Differences to
  `AutoTokenizer` are only reported.

  Args:
    folder: an HF checkpoint folder with a tokenizer.
    texts: texts to encode, such as questions and answers.
    rows: number of rows of the model's embedding.

  Returns:
    A summary in one line.

  Raises:
    UserError: for the first text that differs or has an id past `rows`, and as `load_tokenizer` does.
  """
  folder = Path(folder)
  tokenizer = load_tokenizer(folder, rows=rows)
  decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
  name, special, reference = _load_reference(folder)
  encode = lambda text: tokenizer(text, add_special_tokens=special)["input_ids"]
  num_normalized, tokens = 0, 0
  for text in texts:
    ids = check_ids(tokenizer, encode(text), rows)
    expected = reference[0](text) if reference else ids
    if ids != expected:
      at = _first_difference(ids, expected)
      raise UserError(f"{folder}: its tokenizer gives {_excerpt(text)} other ids than {name} does: from token {at} on "
                      f"{ids[at:at + 4]}, expected {expected[at:at + 4]}")
    decoded = decode(ids)
    expected_text = reference[1](ids) if reference else unicodedata.normalize("NFC", text) if decoded != text else text
    if decoded != expected_text:
      at = _first_difference(decoded, expected_text)
      raise UserError(f"{folder}: {_excerpt(text)} comes back from the tokenizer's ids as {_excerpt(decoded, at)}, "
                      f"expected {_excerpt(expected_text, at)}")
    if decoded == text and decode_continuation(
        tokenizer, encode_continuation(tokenizer, text), skip_special_tokens=True) != text:
      raise UserError(f"{folder}: {_excerpt(text)} does not come back from the tokenizer's ids where it continues "
                      "another text")
    _check_continuation(folder, tokenizer, ids)
    num_normalized += decoded != text
    tokens += len(ids)
  summary = f"the tokenizer gives the ids of {name} for {len(texts)} texts ({tokens:,} tokens)"
  summary += ", and the texts come back" + (f" but for {num_normalized}, which it normalizes" if num_normalized else "")
  return summary + _compare_auto(folder, texts, lambda text: tokenizer(text)["input_ids"])


def _check_continuation(folder: Path, tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> None:
  """Raises UserError if a text's end, from a word with a leading space on, has other ids as a continuation."""
  to_text = lambda ids: decode_continuation(tokenizer, ids, skip_special_tokens=False)
  for begin in range(max(1, len(ids) // 2), len(ids)):
    tail, text = ids[begin:], to_text(ids[begin:])
    if tokenizer.unk_token_id in tail:
      continue  # unknown tokens lose their text
    if text[:1] == " " and text[1:2].strip():
      encoded, spaced = encode_continuation(tokenizer, text), text.rstrip() + " "
      if encoded != tail:
        at = _first_difference(encoded, tail)
        raise UserError(f"{folder}: where {_excerpt(text)} continues another text, the tokenizer gives other ids than "
                        f"within it: from token {at} on {encoded[at:at + 4]}, expected {tail[at:at + 4]}")
      if to_text(encode_continuation(tokenizer, spaced)) != spaced:
        raise UserError(f"{folder}: the tokenizer loses the space at the end of {_excerpt(spaced, len(spaced))} where "
                        "it continues another text")
      return


def _first_difference(one: Sequence[object], other: Sequence[object]) -> int:
  """Returns the first index at which two sequences differ, or the length of the shorter one."""
  shorter = min(len(one), len(other))
  return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def _load_reference(folder: Path) -> tuple[str, bool, Codec | None]:
  """Loads the tokenizer's file: its name, whether it defines special tokens of texts, and its (encode, decode)."""
  if (path := folder / "tokenizer.json").exists():
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(path))
    reference.no_truncation()
    reference.no_padding()
    return path.name, True, (lambda text: reference.encode(text).ids,
                             lambda ids: reference.decode(ids, skip_special_tokens=True))
  if (path := folder / "tokenizer.model").exists():
    pieces = read_sentencepiece(path)
    # The tokenizer omits unknown tokens, for which sentencepiece would write a symbol.
    return path.name, False, (pieces.encode, lambda ids: pieces.decode([i for i in ids if i != pieces.unk_id()]))
  return "vocab.json", True, None


def _compare_auto(folder: Path, texts: Sequence[str], encode: Callable[[str], list[int]]) -> str:
  """Describes how ids differ if programs load the tokenizer with transformers' AutoTokenizer; "" if they do not."""
  from transformers import AutoTokenizer, __version__

  try:
    auto = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    differing = [text for text in texts if auto(text)["input_ids"] != encode(text)]
  except Exception as e:  # transformers raises exceptions of all kinds here
    return (f"; AutoTokenizer of transformers {__version__} cannot load it ({str(e).strip().partition(chr(10))[0]})")
  return (f"; AutoTokenizer of transformers {__version__} gives other ids for {len(differing)} of them, the first "
          f"{_excerpt(differing[0])}: programs that load it so see other tokens") if differing else ""


def _excerpt(text: str, at: int = 0) -> str:
  """Quotes about 40 characters of a text around a position."""
  begin = max(0, min(at - 17, len(text) - 37))
  return repr("..." * (begin > 0) + text[begin:begin + 37] + "..." * (begin + 37 < len(text)))
