"""Tokenizers of checkpoint folders, as their files say."""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imm_jax import files
from imm_jax.errors import UserError

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

# In the order in which they count, where a folder has several.
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# What sentencepiece writes for a space.
_SPACE = "\u2581"
# Of an added token, beside whether it is special: where it is found in a text.
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
# Encoded by a sentencepiece file and by what was made of it: runs of spaces, digits, bytes, an accent on its own.
_PROBES = ("What is 12 + 30?", "a  b\n\n   c", "x = 3.5, \\frac{1}{2}\t\u00e9 e\u0301 \u2460 \U0001f600", "\n1", " the")
# So is each of this many pieces that a file's maker defined, which are found whole in any text, within others.
_MOST_DEFINED = 100
_DEFINED = ("{0}a", "{0} a", "a{0}b", "a {0} b  {0}\n{0}{0}")


def has_tokenizer(folder: str | Path) -> bool:
  """Whether an HF checkpoint folder holds a tokenizer."""
  return any((Path(folder) / name).exists() for name in FILES)


def load_tokenizer(folder: str | Path, *, rows: int | None = None) -> "PreTrainedTokenizerBase":
  """The tokenizer of an HF checkpoint folder, which gives the ids that its files do.

  tokenizer.json is taken as written. transformers' AutoTokenizer rebuilds some from the name of a class, and then they
  give other ids (its issue 45488). tokenizer_config.json and what else is beside it name the special tokens and the
  chat templates, and may add tokens.

  Args:
    folder: holds tokenizer.json, tokenizer.model (sentencepiece) or vocab.json with merges.txt.
    rows: of the model's embedding. It may have some that are no id. Each id of the vocabulary and the end-of-text token
      need one; added tokens may lie past them (`[PAD]` of Llama-2's fine-tunes), see `tokenization.check_ids`.

  Raises:
    UserError: when the folder holds none that can be loaded, or what transformers makes of it is not what the file
      says; when it has no end-of-text token of its own, or ids past `rows`.
  """
  # At import transformers advises to install torch, which nothing here uses.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  folder = Path(folder)
  name = next((name for name in FILES if (folder / name).exists()), None)
  if name is None:
    raise UserError(f"{folder}: has no tokenizer; expected tokenizer.json (or tokenizer.model, vocab.json) in it")
  _check_file(folder / name)
  try:
    tokenizer = {"tokenizer.json": _from_json, "tokenizer.model": _from_sentencepiece, "vocab.json": _from_vocab}[name](
        folder)
  except UserError:
    raise
  except Exception as e:  # tokenizers raises a bare Exception for a damaged file
    raise UserError(f"{folder}: its tokenizer cannot be loaded ({str(e).strip().partition(chr(10))[0]})") from e
  for source, i, content in _named_tokens(folder):
    if (other := tokenizer.backend_tokenizer.token_to_id(content)) != i:
      raise UserError(f"{folder / source}: gives {content!r} the id {i}, with {name} it has {other}; correct one of "
                      "the files")
  tokenizer.model_max_length = 10**30  # nothing is cut here, and it may be no number
  _check_special(tokenizer, folder)
  vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).values()
  largest = max([*vocabulary, tokenizer.eos_token_id])
  if rows is not None and largest >= rows:
    raise UserError(f"{folder}: the tokenizer has ids up to {largest}, the embedding only {rows} rows; is it this "
                    "model's tokenizer?")
  return tokenizer


def _check_file(path: Path) -> None:
  if not path.is_file():
    raise UserError(f"{path}: is a folder; expected the tokenizer's file of that name")
  files.check_pointer(path)


def _from_pretrained(folder: Path) -> "PreTrainedTokenizerBase":
  """With the special tokens and chat templates beside it, and the class that changes the least."""
  from transformers import PreTrainedTokenizerFast

  # The last two: tokenizer_config.json may name them, and they change ids.
  return PreTrainedTokenizerFast.from_pretrained(
      str(folder), local_files_only=True, trust_remote_code=False, split_special_tokens=False, fix_mistral_regex=False)


def _from_json(folder: Path) -> "PreTrainedTokenizerBase":
  from tokenizers import AddedToken, Tokenizer

  named = {content for _, _, content in _named_tokens(folder)}
  backend, tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json")), _from_pretrained(folder)
  found, written = tokenizer.backend_tokenizer.get_added_tokens_decoder(), backend.get_added_tokens_decoder()
  # tokenizer_config.json may make added tokens special, which changes no id, and add others. A word of the vocabulary
  # that it names as padding, say, stays a word, or it would be cut out of texts.
  special = [AddedToken(token.content, special=True, **{flag: getattr(token, flag) for flag in _FLAGS})
             for i, token in written.items() if i in found and found[i].special and not token.special]
  new = [token for i, token in sorted(found.items()) if i not in written and (
      backend.token_to_id(token.content) is None or token.content == tokenizer.eos_token)]
  end = tokenizer.eos_token
  if end and backend.token_to_id(end) is None and end not in named:
    raise UserError(f"{folder}: tokenizer_config.json names the end-of-text token {end!r}, which tokenizer.json does "
                    "not have; set eos_token to the model's own")
  encode = lambda: [backend.encode(text, add_special_tokens=False).ids for text in _PROBES]
  before = encode()
  backend.add_tokens([*special, *new])
  if encode() != before:
    raise UserError(f"{folder}: {', '.join(repr(token.content) for token in (*special, *new))}: special by the files "
                    "beside tokenizer.json, and among them ordinary text, which would get other ids; set eos_token and "
                    "the like to the model's own")
  tokenizer._tokenizer = backend
  return tokenizer


def _from_sentencepiece(folder: Path) -> "PreTrainedTokenizerBase":
  """From tokenizer.model alone, whose normalisation and leading space transformers leaves out or changes."""
  from tokenizers import Regex, decoders, normalizers, pre_tokenizers

  path = folder / "tokenizer.model"
  pieces = read_sentencepiece(path)
  from sentencepiece import sentencepiece_model_pb2  # read_sentencepiece has said so where it is missing

  proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
  if proto.trainer_spec.model_type not in (1, 2):
    raise UserError(f"{path}: is of neither sentencepiece's BPE nor its unigram kind; expected one of them")
  tokenizer, spec, config = _from_pretrained(folder), proto.normalizer_spec, _config(folder)
  backend = tokenizer.backend_tokenizer
  steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
  if spec.remove_extra_whitespaces:
    steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
  # With transformers' `"legacy": false` a text has its space at the very front alone, and not after special tokens too.
  front = spec.add_dummy_prefix and config.get("legacy") is False
  if spec.add_dummy_prefix and not front:
    steps.append(normalizers.Prepend(_SPACE))
  backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
  backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, "first", split=False) if front else None
  strip = [decoders.Strip(content=" ", left=1)] if spec.add_dummy_prefix else []
  backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
  # Models with such a file begin a text with BOS, unless they say otherwise.
  tokenizer.add_bos_token = bool(config.get("add_bos_token", True)) and tokenizer.bos_token_id is not None
  tokenizer.add_eos_token = bool(config.get("add_eos_token", False))
  vocabulary = tokenizer.get_vocab()
  wrong = next((i for i in range(len(pieces)) if vocabulary.get(pieces.id_to_piece(i)) != i), None)
  if wrong is not None:
    raise UserError(f"{path}: transformers gives its piece {pieces.id_to_piece(wrong)!r} the id "
                    f"{vocabulary.get(pieces.id_to_piece(wrong))}, the file {wrong}; give a tokenizer.json")
  defined = [piece.piece.replace(_SPACE, " ") for piece in proto.pieces if piece.type == piece.USER_DEFINED]
  defined = defined[::max(1, len(defined) // _MOST_DEFINED)]
  probes = _PROBES[:-1] if front else _PROBES  # which adds none to a text that begins with one
  for text in (*probes, *(form.format(piece) for piece in defined for form in _DEFINED)):
    if tokenizer(text, add_special_tokens=False)["input_ids"] != pieces.encode(text):
      raise UserError(f"{path}: what transformers makes of it gives {text!r} other ids than sentencepiece does; give a "
                      "tokenizer.json")
  return tokenizer


def read_sentencepiece(path: Path) -> Any:
  """The sentencepiece.SentencePieceProcessor of a file.

  Raises:
    UserError: when a package is missing, or the file is none of sentencepiece's.
  """
  for package, module in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf")):
    try:
      missing = importlib.util.find_spec(module) is None
    except (ModuleNotFoundError, ValueError):
      missing = True
    if missing:
      raise UserError(f"{path}: needs the package {package} to be read; `pip install {package}`, or give a "
                      "tokenizer.json")
  import sentencepiece

  try:
    return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
  except RuntimeError as e:
    raise UserError(f"{path}: is no sentencepiece model; give the tokenizer.json that belongs to it") from e


def _from_vocab(folder: Path) -> "PreTrainedTokenizerBase":
  from transformers import AutoTokenizer

  tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
  found = tokenizer.get_vocab()
  wrong = next((token for token, i in files.read_json(folder / "vocab.json").items() if found.get(token) != i), None)
  if wrong is not None or not tokenizer.is_fast:
    raise UserError(f"{folder}: of vocab.json transformers makes a {type(tokenizer).__name__} without its tokens, such "
                    f"as {wrong!r}; give the tokenizer.json that belongs to it")
  return tokenizer


def _named_tokens(folder: Path) -> list[tuple[str, int, str]]:
  """What lies beside the vocabulary and says of added tokens: name of the file, id, content."""
  tokens = _config(folder).get("added_tokens_decoder", {})
  contents = lambda token: token.get("content") if isinstance(token, dict) else token
  if not isinstance(tokens, dict) or not all(i.isdigit() and isinstance(contents(token), str)
                                             for i, token in tokens.items()):
    raise UserError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder={str(tokens)[:60]}; expected an object "
                    "with the content of each token by its id, or no such key")
  path = folder / "added_tokens.json"
  ids = files.read_json(path) if path.exists() else {}
  if wrong := next((content for content, i in ids.items() if type(i) is not int), None):
    raise UserError(f"{path}: gives {wrong!r} the id {ids[wrong]!r}; expected an integer for each token")
  return [*(("tokenizer_config.json", int(i), contents(token)) for i, token in tokens.items()),
          *((path.name, i, content) for content, i in ids.items())]


def _config(folder: Path) -> dict[str, Any]:
  path = folder / "tokenizer_config.json"
  return files.read_json(path) if path.exists() else {}


def _check_special(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
  """Raises UserError unless there is an end-of-text token that no text can give; drops others that are empty."""
  end = tokenizer.eos_token
  if end == "":
    raise UserError(f"{folder}: its tokenizer's end-of-text token is empty; set eos_token in tokenizer_config.json to "
                    "the model's own")
  for name in ("bos_token", "unk_token", "pad_token"):
    if getattr(tokenizer, name) == "":
      setattr(tokenizer, name, None)  # transformers looks for the id of one that is not there until Python gives up
  if end is None or tokenizer.eos_token_id is None:
    raise UserError(f"{folder}: its tokenizer has no end-of-text token; set eos_token in tokenizer_config.json")
  # Byte-level models name one in tokenizer_config.json that no text gives, and often it is the end token.
  model = tokenizer.backend_tokenizer.model
  unknown = getattr(model, "unk_token", None) if type(model).__name__ != "Unigram" else tokenizer.unk_token
  if end == unknown:
    raise UserError(f"{folder}: its tokenizer's end-of-text token is {end!r}, which also stands for what it does not "
                    "know; set eos_token in tokenizer_config.json to the model's own")
