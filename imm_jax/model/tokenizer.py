"""Loads the tokenizers of checkpoint folders, faithful to their files."""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imm_jax import files
from imm_jax.errors import UserError

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

# In order of precedence, if a folder has several.
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Sentencepiece's symbol for a space.
_SPACE = "\u2581"
# Flags of an added token, other than `made_special`, that decide where it matches in a text.
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
# Texts on which a converted sentencepiece model is compared with the file: runs of spaces, digits, bytes, a combining
# accent.
_PROBES = ("What is 12 + 30?", "a  b\n\n   c", "x = 3.5, \\frac{1}{2}\t\u00e9 e\u0301 \u2460 \U0001f600", "\n1", " the")
# Number of user-defined pieces, which match as a whole anywhere in a text, to compare within these templates.
_MAX_DEFINED = 100
_DEFINED_FORMS = ("{0}a", "{0} a", "a{0}b", "a {0} b  {0}\n{0}{0}")


def has_tokenizer(folder: str | Path) -> bool:
  """Returns whether an HF checkpoint folder holds a tokenizer."""
  return any((Path(folder) / name).exists() for name in FILES)


def load_tokenizer(folder: str | Path, *, rows: int | None = None) -> "PreTrainedTokenizerBase":
  """Loads the tokenizer of an HF checkpoint folder such that its ids are those of the files.

  tokenizer.json is taken as written, whereas transformers' AutoTokenizer rebuilds some tokenizers from the name of a
  class and changes their ids (its issue 45488). tokenizer_config.json and the other files name the special tokens and
  chat templates, and may add tokens.

  Args:
    folder: holds tokenizer.json, tokenizer.model (sentencepiece) or vocab.json with merges.txt.
    rows: number of rows of the model's embedding. Every id of the vocabulary and the end-of-text token must have one;
      added tokens may lie past them (`[PAD]` of Llama-2's fine-tunes), see `tokenization.check_ids`.

  Raises:
    UserError: if the folder has no tokenizer that can be loaded, transformers' version of it differs from the file, it
      has no end-of-text token of its own, or ids past `rows`.
  """
  # On import transformers advises to install torch, which is not used here.
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
  tokenizer.model_max_length = 10**30  # texts are never truncated, and the file's value may be invalid
  _check_special_tokens(tokenizer, folder)
  vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).values()
  largest = max([*vocabulary, tokenizer.eos_token_id])
  if rows is not None and largest >= rows:
    raise UserError(f"{folder}: the tokenizer has ids up to {largest}, the embedding only {rows} rows; is it this "
                    "model's tokenizer?")
  return tokenizer


def _check_file(path: Path) -> None:
  if not path.is_file():
    raise UserError(f"{path}: is a folder; expected the tokenizer's file of that name")
  files.reject_lfs_pointer(path)


def _from_pretrained(folder: Path) -> "PreTrainedTokenizerBase":
  """Loads it with special tokens and chat templates, with the class that changes the least."""
  from transformers import PreTrainedTokenizerFast

  # The last two are set because tokenizer_config.json may, and they would change ids.
  return PreTrainedTokenizerFast.from_pretrained(
      str(folder), local_files_only=True, trust_remote_code=False, split_special_tokens=False, fix_mistral_regex=False)


def _from_json(folder: Path) -> "PreTrainedTokenizerBase":
  from tokenizers import AddedToken, Tokenizer

  named = {content for _, _, content in _named_tokens(folder)}
  backend, tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json")), _from_pretrained(folder)
  loaded, written = tokenizer.backend_tokenizer.get_added_tokens_decoder(), backend.get_added_tokens_decoder()
  # tokenizer_config.json may make added tokens special, which changes no id, and add others. But an ordinary word of
  # the vocabulary that it names as padding, say, must remain one, or it would be cut out of texts.
  made_special = [AddedToken(token.content, special=True, **{flag: getattr(token, flag) for flag in _FLAGS})
                  for i, token in written.items() if i in loaded and loaded[i].special and not token.special]
  added = [token for i, token in sorted(loaded.items()) if i not in written and (
      backend.token_to_id(token.content) is None or token.content == tokenizer.eos_token)]
  eos = tokenizer.eos_token
  if eos and backend.token_to_id(eos) is None and eos not in named:
    raise UserError(f"{folder}: tokenizer_config.json names the end-of-text token {eos!r}, which tokenizer.json does "
                    "not have; set eos_token to the model's own")
  encode = lambda: [backend.encode(text, add_special_tokens=False).ids for text in _PROBES]
  before = encode()
  backend.add_tokens([*made_special, *added])
  if encode() != before:
    raise UserError(f"{folder}: {', '.join(repr(token.content) for token in (*made_special, *added))}: special by the "
                    "files next to tokenizer.json, and some are ordinary text, which would get other ids; set "
                    "eos_token and the like to the model's own")
  tokenizer._tokenizer = backend
  return tokenizer


def _from_sentencepiece(folder: Path) -> "PreTrainedTokenizerBase":
  """Converts tokenizer.model, whose normalization and leading space transformers omits or changes."""
  from tokenizers import Regex, decoders, normalizers, pre_tokenizers

  path = folder / "tokenizer.model"
  pieces = read_sentencepiece(path)
  from sentencepiece import sentencepiece_model_pb2  # read_sentencepiece has checked that it is installed

  proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
  if proto.trainer_spec.model_type not in (1, 2):
    raise UserError(f"{path}: is of neither sentencepiece's BPE nor its unigram kind; expected one of them")
  tokenizer, spec, config = _from_pretrained(folder), proto.normalizer_spec, _config(folder)
  backend = tokenizer.backend_tokenizer
  steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
  if spec.remove_extra_whitespaces:
    steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
  # With `"legacy": false` transformers prepends the space only at the start of a text, not after special tokens.
  prefix_at_start_only = spec.add_dummy_prefix and config.get("legacy") is False
  if spec.add_dummy_prefix and not prefix_at_start_only:
    steps.append(normalizers.Prepend(_SPACE))
  backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
  backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, "first", split=False) if prefix_at_start_only else None
  strip_prefix = [decoders.Strip(content=" ", left=1)] if spec.add_dummy_prefix else []
  backend.decoder = decoders.Sequence([
      decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip_prefix])
  # Models with a tokenizer.model begin texts with BOS by default.
  tokenizer.add_bos_token = bool(config.get("add_bos_token", True)) and tokenizer.bos_token_id is not None
  tokenizer.add_eos_token = bool(config.get("add_eos_token", False))
  vocabulary = tokenizer.get_vocab()
  mismatch = next((i for i in range(len(pieces)) if vocabulary.get(pieces.id_to_piece(i)) != i), None)
  if mismatch is not None:
    raise UserError(f"{path}: transformers gives its piece {pieces.id_to_piece(mismatch)!r} the id "
                    f"{vocabulary.get(pieces.id_to_piece(mismatch))}, the file {mismatch}; give a tokenizer.json")
  defined = [piece.piece.replace(_SPACE, " ") for piece in proto.pieces if piece.type == piece.USER_DEFINED]
  defined = defined[::max(1, len(defined) // _MAX_DEFINED)]
  # Such a tokenizer adds no space to a text that begins with one, which sentencepiece does.
  probes = _PROBES[:-1] if prefix_at_start_only else _PROBES
  for text in (*probes, *(template.format(piece) for piece in defined for template in _DEFINED_FORMS)):
    if tokenizer(text, add_special_tokens=False)["input_ids"] != pieces.encode(text):
      raise UserError(f"{path}: what transformers makes of it gives {text!r} other ids than sentencepiece does; give a "
                      "tokenizer.json")
  return tokenizer


def read_sentencepiece(path: Path) -> Any:
  """Loads a sentencepiece.SentencePieceProcessor from a file.

  Raises:
    UserError: if a package is missing, or the file is not a sentencepiece model.
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
  loaded = tokenizer.get_vocab()
  written = files.read_json(folder / "vocab.json")
  mismatch = next((token for token, i in written.items() if loaded.get(token) != i), None)
  if mismatch is not None or not tokenizer.is_fast:
    raise UserError(f"{folder}: of vocab.json transformers makes a {type(tokenizer).__name__} without its tokens, such "
                    f"as {mismatch!r}; give the tokenizer.json that belongs to it")
  return tokenizer


def _named_tokens(folder: Path) -> list[tuple[str, int, str]]:
  """Lists the added tokens of tokenizer_config.json and added_tokens.json: (file name, id, content)."""
  tokens = _config(folder).get("added_tokens_decoder", {})
  contents = lambda token: token.get("content") if isinstance(token, dict) else token
  if not isinstance(tokens, dict) or not all(i.isdigit() and isinstance(contents(token), str)
                                             for i, token in tokens.items()):
    raise UserError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder={str(tokens)[:60]}; expected an object "
                    "with the content of each token by its id, or no such key")
  path = folder / "added_tokens.json"
  ids = files.read_json(path) if path.exists() else {}
  if mismatch := next((content for content, i in ids.items() if type(i) is not int), None):
    raise UserError(f"{path}: gives {mismatch!r} the id {ids[mismatch]!r}; expected an integer for each token")
  return [*(("tokenizer_config.json", int(i), contents(token)) for i, token in tokens.items()),
          *((path.name, i, content) for content, i in ids.items())]


def _config(folder: Path) -> dict[str, Any]:
  path = folder / "tokenizer_config.json"
  return files.read_json(path) if path.exists() else {}


def _check_special_tokens(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
  """Raises UserError unless there is an end-of-text token that no text encodes to; drops empty special tokens."""
  eos = tokenizer.eos_token
  if eos == "":
    raise UserError(f"{folder}: its tokenizer's end-of-text token is empty; set eos_token in tokenizer_config.json to "
                    "the model's own")
  for name in ("bos_token", "unk_token", "pad_token"):
    if getattr(tokenizer, name) == "":
      setattr(tokenizer, name, None)  # transformers recurses endlessly in looking up the id of an empty token
  if eos is None or tokenizer.eos_token_id is None:
    raise UserError(f"{folder}: its tokenizer has no end-of-text token; set eos_token in tokenizer_config.json")
  # Byte-level models never produce the unknown token of tokenizer_config.json, which often is the end-of-text token.
  model = tokenizer.backend_tokenizer.model
  unknown = getattr(model, "unk_token", None) if type(model).__name__ != "Unigram" else tokenizer.unk_token
  if eos == unknown:
    raise UserError(f"{folder}: its tokenizer's end-of-text token is {eos!r}, which is also its unknown token; "
                    "set eos_token in tokenizer_config.json to the model's own")
