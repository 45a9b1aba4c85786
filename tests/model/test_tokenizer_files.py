"""What lies in a tokenizer's folder: settings and tokens beside a vocabulary, sentencepiece files, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from imm_jax.errors import UserError
from imm_jax.model import tokenization, tokenizer as loading
from imm_jax.model.tokenization import decode_continuation, encode_continuation, encode_prompt
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.model.tokenizer_check import check_tokenizer
from imm_jax.sampling import completions
from imm_jax.tasks import prompts
from tests.model.test_tokenizers import PIECES, TEXTS, TINY, alone, fast, train


def test_files_beside_tokenizer_json_count(tmp_path: Path) -> None:
  """They take effect, and change no id."""
  shutil.copy(TINY / "tokenizer.json", tmp_path)
  loose = {"lstrip": True, "rstrip": True, "single_word": False, "normalized": True, "special": True}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({
      "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False, "rstrip": False,
                    "normalized": False, "single_word": False},
      "pad_token": "[PAD]", "bos_token": None,
      "added_tokens_decoder": {"566": {"content": prompts.INSTRUCTION, **loose},
                               "568": {"content": "<|im_end|>", **loose},
                               "569": {"content": "[PAD]", **loose}}}))
  (tmp_path / "chat_template.jinja").write_text("plain {{ messages[0].content }}")
  (tmp_path / "additional_chat_templates").mkdir()
  (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
  tokenizer = load_tokenizer(tmp_path, rows=569)
  assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token) == (568, 569, None)
  assert tokenizer.chat_template == {"default": "plain {{ messages[0].content }}", "tool_use": "tools"}
  assert prompts.build_prompt("Q", style="chat", tokenizer=tokenizer).startswith("plain Q")
  text = f"  {prompts.INSTRUCTION}  \nWhat"
  assert tokenizer(text)["input_ids"] == Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
  assert completions.special_ids(tokenizer)[prompts.INSTRUCTION] == 566
  assert encode_prompt(tokenizer, "a <|im_end|>b", rows=569)
  for encode in (encode_prompt, encode_continuation):
    with pytest.raises(UserError, match=r"the token '\[PAD\]', whose id 569 is past the 569 rows"):
      encode(tokenizer, "a [PAD] b", rows=569)
  with pytest.raises(UserError, match=r"ids up to 568, the embedding only 568 rows"):  # the end token
    load_tokenizer(tmp_path, rows=568)
  config = json.loads((tmp_path / "tokenizer_config.json").read_text())
  config["added_tokens_decoder"]["600"] = config["added_tokens_decoder"].pop("569")
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match=r"gives '\[PAD\]' the id 600, with tokenizer\.json it has 569"):
    load_tokenizer(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
  for ids, message in (({"[PAD]": 600}, r"added_tokens\.json: gives '\[PAD\]' the id 600, with tokenizer\.json it "),
                       ({"!": 568}, "gives '!' the id 568, with tokenizer"), ({"a": "b"}, "expected an integer")):
    (tmp_path / "added_tokens.json").write_text(json.dumps(ids))
    with pytest.raises(UserError, match=message):
      load_tokenizer(tmp_path)
  (tmp_path / "added_tokens.json").unlink()
  for value in (None, [], {"x": "y"}, {"5": {}}):
    config["added_tokens_decoder"] = value
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: added_tokens_decoder=.* expected an object"):
      load_tokenizer(tmp_path)


@pytest.mark.parametrize(("changes", "message"), [
    ({"eos_token": ""}, "end-of-text token is empty; set eos_token"),
    ({"eos_token": "", "bos_token": "", "unk_token": ""}, "end-of-text token is empty"),
    ({"eos_token": "", "unk_token": "!"}, "end-of-text token is empty"),
    ({"eos_token": None}, "no end-of-text token"),
    ({"eos_token": "a"}, "'a': special by the files next to tokenizer.json, and some are ordinary text"),
    ({"bos_token": "", "unk_token": "", "pad_token": ""}, None),
    ({"unk_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}, None),  # SmolLM and GPT-2: no text gives it
])
def test_an_end_token_that_is_none_is_refused(tmp_path: Path, changes: dict, message: str | None) -> None:
  shutil.copy(TINY / "tokenizer.json", tmp_path)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", **changes}))
  if message:
    with pytest.raises(UserError, match=message):
      load_tokenizer(tmp_path)
  else:
    assert completions.special_ids(load_tokenizer(tmp_path)) == {"<|endoftext|>": 0}


def test_words_stay_words_whatever_is_called_special(tmp_path: Path) -> None:
  """A word of the vocabulary as padding, as fine-tunes have it, is not cut out of texts."""
  shutil.copytree(TINY, tmp_path / "copy")
  path = tmp_path / "copy/tokenizer_config.json"
  settings = json.loads(path.read_text())
  path.write_text(json.dumps({**settings, "pad_token": "!", "additional_special_tokens": ["5", "<new>"]}))
  plain, tokenizer = load_tokenizer(TINY), load_tokenizer(tmp_path / "copy")
  text = "Wow!! So 5! = 5 x 24."
  ids = encode_continuation(tokenizer, text)
  assert ids == encode_continuation(plain, text)
  assert decode_continuation(tokenizer, ids, skip_special_tokens=True) == text
  assert encode_continuation(tokenizer, "<new>") == [len(plain)]
  path.write_text(json.dumps({**settings, "eos_token": "</s>"}))
  with pytest.raises(UserError, match=r"end-of-text token '</s>', which tokenizer\.json does not have"):
    load_tokenizer(tmp_path / "copy")


def test_unknown_as_end_token_is_refused(tmp_path: Path) -> None:
  """No end token may stand for the unknown one."""
  with pytest.raises(UserError, match="end-of-text token is '<unk>', which is also its unknown"):
    load_tokenizer(alone(tmp_path, config={"eos_token": "<unk>"}))


@pytest.mark.parametrize("name", [*loading.FILES, "tokenizer_config.json"])
def test_lfs_pointers_and_folders_are_named(tmp_path: Path, name: str) -> None:
  """A pointer of Git LFS, or a folder, is called so."""
  if name not in loading.FILES:
    shutil.copy(TINY / "tokenizer.json", tmp_path)
  (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
  with pytest.raises(UserError, match=f"{name}: is a pointer of Git LFS, not the file itself; run `git lfs pull`"):
    load_tokenizer(tmp_path)
  (tmp_path / name).unlink()
  (tmp_path / name).mkdir()
  with pytest.raises(UserError, match=rf"{name}: (is a folder; expected|cannot be read \(Is a directory)"):
    load_tokenizer(tmp_path)


STRIPS = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}  # sentencepiece's defaults


@pytest.mark.parametrize("options", [
    STRIPS, {"add_dummy_prefix": False}, {"byte_fallback": False, "vocab_size": 150},
    {"model_type": "unigram", "vocab_size": 300, **STRIPS},
    {"user_defined_symbols": ["[INST]", "\n\n"], "add_dummy_prefix": False}])
def test_a_sentencepiece_file_alone_is_followed(tmp_path: Path, options: dict) -> None:
  model = train(**options)
  folder = alone(tmp_path, model)
  assert "gives the ids of tokenizer.model" in check_tokenizer(folder, [*TEXTS, " a", "\u2460  x "], rows=400)
  tokenizer, pieces = load_tokenizer(folder), sentencepiece.SentencePieceProcessor(model_proto=model)
  assert tokenizer("hi")["input_ids"] == [1, *pieces.encode("hi")]
  # A model gives these after a prompt.
  joint = pieces.encode("so the answer")
  sampled = joint[next(i for i in range(1, len(joint)) if pieces.id_to_piece(joint[i])[0] == "\u2581"):]
  text = decode_continuation(tokenizer, sampled, skip_special_tokens=True)
  assert (text, encode_continuation(tokenizer, text)) == (" the answer", sampled)
  space = tokenizer.convert_tokens_to_ids("\u2581")
  assert encode_continuation(tokenizer, text + " ") == [*sampled, space]


def test_changed_user_pieces_are_refused(tmp_path: Path) -> None:
  """sentencepiece puts a text's space before such a piece, and none after it."""
  folder = alone(tmp_path, train(user_defined_symbols=["[INST]", "<|x|>"]))
  with pytest.raises(UserError, match=r"gives '\[INST\]a' other ids than sentencepiece does; give a tokenizer\.json"):
    load_tokenizer(folder)


@pytest.mark.parametrize(("left", "message"), [
    (False, "loses the space at the end of"), (True, "where ' 3 apples' continues another text, .* other ids than")])
def test_stripped_spaces_stay_inside_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bool, message: str) -> None:
  """Spaces that tokenizer.json strips stay where a text goes on."""
  folder = fast(tmp_path, "always")
  file = json.loads((folder / "tokenizer.json").read_text())
  file["normalizer"] = {"type": "Strip", "strip_left": left, "strip_right": True}
  (folder / "tokenizer.json").write_text(json.dumps(file))
  tokenizer = load_tokenizer(folder)
  assert tokenizer("Tom ")["input_ids"] == tokenizer("Tom")["input_ids"]
  for text in (" Tom ", "Tom  "):
    assert decode_continuation(tokenizer, encode_continuation(tokenizer, text), skip_special_tokens=True) == text
  check_tokenizer(folder, TEXTS[:1], rows=400)
  # What does not stay is found.
  keeps = tokenization._without_space
  monkeypatch.setattr(tokenization, "_without_space",
                      lambda step, part: step if part == "normalizer" else keeps(step, part))
  with pytest.raises(UserError, match=message):
    check_tokenizer(folder, ["Tom has 3 apples"], rows=400)


def test_settings_beside_a_sentencepiece_file_count(tmp_path: Path) -> None:
  bare = load_tokenizer(alone(tmp_path, config={"add_bos_token": False}))
  assert bare("hi")["input_ids"] == sentencepiece.SentencePieceProcessor(model_proto=PIECES).encode("hi")
  ends = load_tokenizer(alone(tmp_path, config={"add_eos_token": True}))
  assert ends("hi")["input_ids"] == [1, *bare("hi")["input_ids"], 2]
  assert encode_prompt(ends, "hi") == [1, *bare("hi")["input_ids"]]  # nothing goes on after an end
  for legacy in (True, False):
    found = load_tokenizer(alone(tmp_path, config={"legacy": legacy}))
    first = found.convert_ids_to_tokens(found("<s>the", add_special_tokens=False)["input_ids"])[1]
    assert first.startswith("\u2581") == legacy


def test_missing_files_or_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """So is a file that is not what is needed."""
  folder = alone(tmp_path, b"IQ== 0\nIg== 1\n")  # tiktoken's
  with pytest.raises(UserError, match=r"tokenizer\.model: is no sentencepiece model; give the tokenizer\.json"):
    load_tokenizer(folder)
  find = loading.importlib.util.find_spec
  for module, package in (("sentencepiece", "sentencepiece"), ("google.protobuf", "protobuf")):
    with monkeypatch.context() as m:
      m.setattr(loading.importlib.util, "find_spec", lambda n, no=module: None if n == no else find(n))
      with pytest.raises(UserError, match=rf"needs the package {package} to be read; `pip install {package}`"):
        load_tokenizer(alone(tmp_path))


def test_vocab_and_merges_files_load(tmp_path: Path) -> None:
  """They lie where transformers keeps them."""
  model = json.loads((TINY / "tokenizer.json").read_text())["model"]
  (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
  merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
  (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
  shutil.copy(TINY / "config.json", tmp_path)
  shutil.copy(TINY / "tokenizer_config.json", tmp_path)
  assert load_tokenizer(tmp_path)(TEXTS)["input_ids"] == load_tokenizer(TINY)(TEXTS)["input_ids"]
  assert "gives the ids of vocab.json" in check_tokenizer(tmp_path, TEXTS, rows=568)
  for name, key in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
    content = json.loads((tmp_path / name).read_text())
    content[key] = {"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}[key]
    (tmp_path / name).write_text(json.dumps(content))
  with pytest.raises(UserError, match=r"of vocab\.json transformers makes a LlamaTokenizer without its tokens"):
    load_tokenizer(tmp_path)


def test_what_differs_from_the_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  folder = fast(tmp_path, "prepend")
  right = load_tokenizer(folder)
  wrong = load_tokenizer(folder)
  wrong.backend_tokenizer.normalizer = normalizers.Replace(" ", "")
  monkeypatch.setattr("imm_jax.model.tokenizer_check.load_tokenizer", lambda *a, **k: wrong)
  with pytest.raises(UserError, match=r"gives 'What is 12 \+ 30\?' other ids than tokenizer\.json does: from token"):
    check_tokenizer(folder, TEXTS, rows=400)
  wrong = right
  wrong.backend_tokenizer.decoder = decoders.Fuse()
  with pytest.raises(UserError, match=r"'What is 12 \+ 30\?' comes back from the tokenizer's ids as '\u2581What"):
    check_tokenizer(folder, TEXTS, rows=400)
  with pytest.raises(UserError, match="past the 300 rows"):
    check_tokenizer(folder, TEXTS, rows=300)


def test_a_file_that_lowers_all_letters_is_no_error(tmp_path: Path) -> None:
  file = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "tom": 2, "has": 3}, unk_token="<unk>"))
  file.normalizer, file.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
  file.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
  assert "the texts come back but for 1, which it normalizes" in check_tokenizer(tmp_path, ["Tom has"], rows=4)
