"""Whether a loaded tokenizer gives the ids and texts that its file does."""

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imm_jax.errors import UserError
from imm_jax.model.tokenization import check_ids, decode_continuation, encode_continuation
from imm_jax.model.tokenizer import load_tokenizer, read_sentencepiece

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

_Codec = tuple[Callable[[str], list[int]], Callable[[list[int]], str]]


def check_tokenizer(folder: str | Path, texts: Sequence[str], *, rows: int) -> str:
  """Compares a folder's tokenizer with its file, read by the library that the file is of, on texts.

  The ids have to be the file's, and so does the text that they decode to; where that is the text itself, it also has to
  come back as one that continues another. So have ids that a model could give after others, from a word with its space
  on: their text has to give the same ids. What `AutoTokenizer` would give is said, not judged.

  Args:
    folder: an HF checkpoint folder with a tokenizer.
    texts: what to encode, such as questions and answers.
    rows: of the model's embedding.

  Returns:
    A line that says what was found.

  Raises:
    UserError: for the first text that differs or has an id past `rows`, and as `load_tokenizer` does.
  """
  folder = Path(folder)
  tokenizer = load_tokenizer(folder, rows=rows)
  decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
  name, special, file = _file(folder)
  encode = lambda text: tokenizer(text, add_special_tokens=special)["input_ids"]
  others, tokens = 0, 0
  for text in texts:
    ids = check_ids(tokenizer, encode(text), rows)
    expected = file[0](text) if file else ids
    if ids != expected:
      at = _first_difference(ids, expected)
      raise UserError(f"{folder}: its tokenizer gives {_short(text)} other ids than {name} does: from token {at} on "
                      f"{ids[at:at + 4]}, expected {expected[at:at + 4]}")
    back = decode(ids)
    should = file[1](ids) if file else unicodedata.normalize("NFC", text) if back != text else text
    if back != should:
      at = _first_difference(back, should)
      raise UserError(f"{folder}: {_short(text)} comes back from the tokenizer's ids as {_short(back, at)}, expected "
                      f"{_short(should, at)}")
    if back == text and decode_continuation(
        tokenizer, encode_continuation(tokenizer, text), skip_special_tokens=True) != text:
      raise UserError(f"{folder}: {_short(text)} does not come back from the tokenizer's ids where it continues "
                      "another text")
    _check_continuation(folder, tokenizer, ids)
    others += back != text
    tokens += len(ids)
  found = f"the tokenizer gives the ids of {name} for {len(texts)} texts ({tokens:,} tokens)"
  found += f", and the texts come back but for {others}, which it normalises" if others else ", and the texts come back"
  return found + _auto(folder, texts, lambda text: tokenizer(text)["input_ids"])


def _check_continuation(folder: Path, tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> None:
  """Raises UserError where the end of a text, from a word with its space on, continues another with other ids."""
  to_text = lambda ids: decode_continuation(tokenizer, ids, skip_special_tokens=False)
  for begin in range(max(1, len(ids) // 2), len(ids)):
    tail, text = ids[begin:], to_text(ids[begin:])
    if tokenizer.unk_token_id in tail:
      continue  # its text is lost anyhow
    if text[:1] == " " and text[1:2].strip():
      found, ended = encode_continuation(tokenizer, text), text.rstrip() + " "
      if found != tail:
        at = _first_difference(found, tail)
        raise UserError(f"{folder}: where {_short(text)} continues another text, the tokenizer gives other ids than "
                        f"within it: from token {at} on {found[at:at + 4]}, expected {tail[at:at + 4]}")
      if to_text(encode_continuation(tokenizer, ended)) != ended:
        raise UserError(f"{folder}: the tokenizer loses the space at the end of {_short(ended, len(ended))} where it "
                        "continues another text")
      return


def _first_difference(one: Sequence[object], other: Sequence[object]) -> int:
  """The first place where two sequences differ, or the end of the shorter one."""
  shorter = min(len(one), len(other))
  return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def _file(folder: Path) -> tuple[str, bool, _Codec | None]:
  """The name of the file that counts, whether it says which special tokens a text gets, and (encode, decode) by it."""
  if (path := folder / "tokenizer.json").exists():
    from tokenizers import Tokenizer

    file = Tokenizer.from_file(str(path))
    file.no_truncation()
    file.no_padding()
    return path.name, True, (lambda text: file.encode(text).ids, lambda ids: file.decode(ids, skip_special_tokens=True))
  if (path := folder / "tokenizer.model").exists():
    pieces = read_sentencepiece(path)
    # Like the tokenizer, which leaves out what it does not know; sentencepiece writes a sign for it.
    return path.name, False, (pieces.encode, lambda ids: pieces.decode([i for i in ids if i != pieces.unk_id()]))
  return "vocab.json", True, None


def _auto(folder: Path, texts: Sequence[str], encode: Callable[[str], list[int]]) -> str:
  """What is to be said of programs that load the tokenizer by transformers' AutoTokenizer; "" for nothing."""
  from transformers import AutoTokenizer, __version__

  try:
    auto = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    differ = [text for text in texts if auto(text)["input_ids"] != encode(text)]
  except Exception as e:  # of any kind
    return (f"; AutoTokenizer of transformers {__version__} cannot load it ({str(e).strip().partition(chr(10))[0]})")
  return (f"; AutoTokenizer of transformers {__version__} gives other ids for {len(differ)} of them, the first "
          f"{_short(differ[0])}: programs that load it so see other tokens") if differ else ""


def _short(text: str, at: int = 0) -> str:
  """Some 40 characters of a text, those around a place in it."""
  begin = max(0, min(at - 17, len(text) - 37))
  return repr("..." * (begin > 0) + text[begin:begin + 37] + "..." * (begin + 37 < len(text)))
