"""Tokenizers of every form that published models have, against their files and what samplers give.

The sentencepiece model is trained here; its other forms are those that transformers has made of Llama 2's over time.
"""

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from configs import tiny
from imm_jax.errors import UserError
from imm_jax.model import hub, tokenizer as loading
from imm_jax.model.tokenization import decode_continuation, encode_continuation, encode_prompt
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.model.tokenizer_check import check_tokenizer
from imm_jax.sampling import Prompt, completions, native
from imm_jax.stages import tuning
from imm_jax.tasks import prompts

TINY = hub.resolve("tiny")
WORDS = ["the", "answer", "is", "so", "we", "have", "apples", "Tom", "and", "gives", "each", "of", "them", "step",
         "think", "total", "cost", "sum", "What", "number", "costs", "more", "than", "twice"]
TEXTS = ["What is 12 + 30?", "Tom has 3 apples.\n\nThe  answer is \\frac{1}{2}\t", "\u00e9 \U0001f600 \u2603"]
ANSWERS = ["The answer is 5", " so the answer", "  two spaces", "\nThe", "\n\n12", "7 apples", "\U0001f600 \u00e9", ".",
           "the  cost\t= 3 ", ""]
PROMPT = prompts.build("What is 12 + 30?")
LLAMA_CHAT = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
              "{% else %} {{ m.content }} {{ eos_token }}{{ bos_token }}{% endif %}{% endfor %}")


def train(**options: object) -> bytes:
  rng, model = random.Random(0), io.BytesIO()
  lines = [" ".join(rng.choices(WORDS, k=8)) + f" {rng.randint(0, 999)} + {rng.randint(0, 99)}." for _ in range(500)]
  sentencepiece.SentencePieceTrainer.train(**{
      "sentence_iterator": iter(lines), "model_writer": model, "vocab_size": 400, "model_type": "bpe",
      "byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity", "num_threads": 1,
      "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "minloglevel": 2, **options})
  return model.getvalue()


PIECES = train()


def alone(folder: Path, model: bytes = PIECES, config: dict | None = None) -> Path:
  """A folder with tokenizer.model, and tokenizer_config.json only where there is one."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "tokenizer.model").write_bytes(model)
  (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 400}))
  if config is not None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


def fast(folder: Path, kind: str) -> Path:
  """A folder with tokenizer.json as transformers has written it for Llama 2 over time, or for others."""
  backend = load_tokenizer(alone(folder)).backend_tokenizer
  (folder / "tokenizer.model").unlink()
  strip = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  if kind == "prepend":
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.pre_tokenizer, backend.decoder = None, decoders.Sequence(strip)
  elif kind in ("first", "always"):
    backend.normalizer, backend.pre_tokenizer = None, pre_tokenizers.Metaspace("\u2581", kind, split=False)
    backend.decoder = decoders.Sequence(strip)
  elif kind == "metaspace":  # with the decoder of that name, and words apart
    backend.normalizer, backend.pre_tokenizer = None, pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
  else:  # byte-level
    file = json.loads((TINY / "tokenizer.json").read_text())
    backend = Tokenizer.from_str(json.dumps(file))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "byte-level-space")
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = None
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps({
      "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "chat_template": LLAMA_CHAT}))
  return folder


KINDS = ("alone", "prepend", "first", "always", "metaspace", "byte-level", "byte-level-space")


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
  path = tmp_path_factory.mktemp(request.param)
  if request.param == "alone":
    return alone(path, config={"chat_template": LLAMA_CHAT})
  return fast(path, request.param)


def test_ids_are_the_files_and_come_back(folder: Path) -> None:
  tokenizer = load_tokenizer(folder)
  line = check_tokenizer(folder, TEXTS, rows=len(tokenizer))
  name = "tokenizer.json" if (folder / "tokenizer.json").exists() else "tokenizer.model"
  assert line.startswith(f"the tokenizer gives the ids of {name} for 3 texts")
  assert "and the texts come back" in line
  for text in TEXTS:
    ids = tokenizer(text)["input_ids"]
    if name == "tokenizer.json":
      assert ids == Tokenizer.from_file(str(folder / name)).encode(text).ids
    else:
      assert ids == [1, *sentencepiece.SentencePieceProcessor(model_proto=PIECES).encode(text)]


@pytest.mark.parametrize("prompt", [PROMPT, "Q:", "<s>[INST] What? [/INST]"])
def test_what_was_sampled_is_trained_on_as_it_was(folder: Path, prompt: str) -> None:
  """Ids that a model gives are those of the joint text after the prompt's; their text has to give them again."""
  tokenizer = load_tokenizer(folder)
  asked, seen = encode_prompt(tokenizer, prompt), 0
  for answer in ANSWERS:
    joint = encode_prompt(tokenizer, prompt + answer)
    if joint[:len(asked)] != asked:
      continue  # no model gives these ids after the prompt
    seen += 1
    sampled = joint[len(asked):]
    text = decode_continuation(tokenizer, sampled, skip_special_tokens=True)
    assert text == answer
    assert encode_continuation(tokenizer, text) == sampled
    # What ends it is no part of the text, and stop strings see the same one.
    ends, texts = completions.endings(tokenizer, [tokenizer.eos_token_id], ["</s>", "no such"], len(tokenizer))
    assert completions.completion(tokenizer, np.array([*sampled, tokenizer.eos_token_id]), ends, texts) == (
        answer, len(sampled) + 1, "stop")
  assert seen >= len(ANSWERS) - 3
  # A word with its space, as a model may begin whatever the prompt ends with.
  first = tokenizer("Tom Tom", add_special_tokens=False)["input_ids"][-1:]
  assert decode_continuation(tokenizer, first, skip_special_tokens=True) in (" Tom", "Tom", "om", "m")
  assert encode_continuation(tokenizer, decode_continuation(tokenizer, first, skip_special_tokens=True)) == first


def test_a_stop_string_with_a_space_is_found_at_the_very_front(folder: Path) -> None:
  tokenizer = load_tokenizer(folder)
  tokens = np.array(encode_continuation(tokenizer, " the answer"))
  assert completions.completion(tokenizer, tokens, (), (" the",)).text == ""
  assert completions.completion(tokenizer, tokens, (), ("answer",)).text == " the "


def test_a_chat_has_the_ids_that_its_template_gives(folder: Path) -> None:
  tokenizer = load_tokenizer(folder)
  text = prompts.build("What is 1+1?", style="chat", tokenizer=tokenizer)
  assert text.startswith("<s>[INST] What")
  ids = encode_prompt(tokenizer, text)
  turn = [{"role": "user", "content": "What is 1+1?\n\nLet's think step by step."}]
  assert ids == tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
  assert ids.count(tokenizer.bos_token_id) == 1


def test_the_embedded_tokenizer_encodes_as_ever() -> None:
  ours = load_tokenizer(TINY)
  theirs = transformers.AutoTokenizer.from_pretrained(TINY)
  for text in (*TEXTS, *ANSWERS[:-1], PROMPT):
    ids = theirs(text)["input_ids"]
    assert encode_prompt(ours, text) == encode_continuation(ours, text) == ids
    assert decode_continuation(ours, ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
  assert (ours.eos_token, ours.pad_token, ours.bos_token) == ("<|endoftext|>", "<|endoftext|>", None)
  assert check_tokenizer(TINY, TEXTS, rows=568).endswith("and the texts come back")


def test_the_sampler_s_tokens_are_the_ids_that_are_trained_on(
    checkpoint: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Of a model with a token of its tokenizer past its rows, as Llama 2's fine-tunes have `[PAD]`."""
  _, model = checkpoint("llama", vocab_size=400, max_position_embeddings=256)
  for file in alone(tmp_path / "alone", config={"pad_token": "[PAD]"}).glob("tokenizer*"):
    shutil.copy(file, model)
  sampler, drawn = native.NativeSampler(model, compute_dtype="float32", batch_size=8), []
  assert sampler.tokenizer.pad_token_id == 400
  # Bytes in a row are hardly ever text.
  sampler._allowed = sampler._allowed.at[:259].set(False)
  whole = completions.completion

  def completion(tokenizer, tokens, *ends):
    found = whole(tokenizer, tokens, *ends)
    drawn.append((found.text, tokens.tolist()))
    return found

  monkeypatch.setattr(completions, "completion", completion)
  questions = [f"What is {i} + {i}?" for i in range(10)]
  # The string names a token that is never drawn, and so may show as text alone.
  answers = sampler.generate([Prompt(q, prompts.build(q)) for q in questions], max_new_tokens=4, num_samples=8,
                             temperatures=(0.0, 2.0), stop=("[PAD]",))
  ids, encode = dict(drawn), tuning.encoder(tiny.get_config(), model)
  canonical = {False: 0, True: 0}
  for question, group in zip(questions, answers, strict=True):
    prompt = sampler.tokenizer(prompts.build(question))["input_ids"]
    for text in {completion.text for completion in group}:
      if sampler.tokenizer(prompts.build(question) + text)["input_ids"] == prompt + ids[text]:  # as texts are spelled
        canonical[text.startswith(" ")] += 1
        assert encode({"question": question, "response": text}) == (
            prompt, [*ids[text], sampler.tokenizer.eos_token_id])
  assert min(canonical.values()) >= 1
  with pytest.raises(UserError, match=r"'\[PAD\]', whose id 400 is past the 400 rows"):
    sampler.generate([Prompt("b", "Tom [PAD]")], max_new_tokens=4)
  for row in ({"question": "Tom", "response": "has [PAD]"}, {"question": "[PAD]", "response": "has"}):
    with pytest.raises(UserError, match=r"'\[PAD\]', whose id 400 is past the 400 rows"):
      encode(row)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_byte_level_file_keeps_its_spaces_whatever_class_is_named(tmp_path: Path, model_type: str) -> None:
  for name in ("tokenizer.json", "config.json"):
    shutil.copy(TINY / name, tmp_path)
  config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": model_type}
  (tmp_path / "config.json").write_text(json.dumps(config))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({
      "tokenizer_class": "LlamaTokenizerFast", "eos_token": "<|endoftext|>", "add_bos_token": True, "legacy": True,
      "add_eos_token": True, "add_prefix_space": True, "clean_up_tokenization_spaces": True,
      "split_special_tokens": True, "fix_mistral_regex": True}))
  tokenizer = load_tokenizer(tmp_path)
  file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  for text in (*TEXTS, "a . <|endoftext|>b"):
    ids = tokenizer(text)["input_ids"]
    assert ids == file.encode(text).ids
    assert decode_continuation(tokenizer, ids, skip_special_tokens=False) == text
  line = check_tokenizer(tmp_path, TEXTS, rows=568)
  if model_type == "llama":  # transformers' issue 45488
    assert "gives other ids for 3 of them, the first 'What is 12 + 30?'" in line


def test_what_is_beside_tokenizer_json_takes_effect_and_changes_no_id(tmp_path: Path) -> None:
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
  assert prompts.build("Q", style="chat", tokenizer=tokenizer).startswith("plain Q")
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
    ({"bos_token": "", "unk_token": "", "pad_token": ""}, None),
    ({"unk_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}, None),  # SmolLM and GPT-2: no text gives it
], ids=str)
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


def test_an_end_token_that_stands_for_the_unknown_is_refused(tmp_path: Path) -> None:
  with pytest.raises(UserError, match="end-of-text token is '<unk>', which also stands for"):
    load_tokenizer(alone(tmp_path, config={"eos_token": "<unk>"}))


@pytest.mark.parametrize("name", loading.FILES)
def test_a_pointer_of_git_lfs_is_called_so(tmp_path: Path, name: str) -> None:
  (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
  with pytest.raises(UserError, match=f"{name}: is a pointer of Git LFS, not the tokenizer; run `git lfs pull`"):
    load_tokenizer(tmp_path)


@pytest.mark.parametrize("options", [
    {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}, {"add_dummy_prefix": False},
    {"byte_fallback": False, "vocab_size": 150}, {"model_type": "unigram", "vocab_size": 300}], ids=str)
def test_a_sentencepiece_file_alone_is_followed(tmp_path: Path, options: dict) -> None:
  model = train(**options)
  folder = alone(tmp_path, model)
  assert "gives the ids of tokenizer.model" in check_tokenizer(folder, [*TEXTS, " a", "\u2460  x "], rows=400)
  assert load_tokenizer(folder)("hi")["input_ids"] == [
      1, *sentencepiece.SentencePieceProcessor(model_proto=model).encode("hi")]


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


def test_a_file_or_package_that_is_not_what_is_needed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  folder = alone(tmp_path, b"IQ== 0\nIg== 1\n")  # tiktoken's
  with pytest.raises(UserError, match=r"tokenizer\.model: is no sentencepiece model; give the tokenizer\.json"):
    load_tokenizer(folder)
  find = loading.importlib.util.find_spec
  for module, package in (("sentencepiece", "sentencepiece"), ("google.protobuf", "protobuf")):
    with monkeypatch.context() as m:
      m.setattr(loading.importlib.util, "find_spec", lambda n, no=module: None if n == no else find(n))
      with pytest.raises(UserError, match=rf"needs the package {package} to be read; `pip install {package}`"):
        load_tokenizer(alone(tmp_path))


def test_vocab_and_merges_load_where_transformers_keeps_them(tmp_path: Path) -> None:
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
  assert "the texts come back but for 1, which it normalises" in check_tokenizer(tmp_path, ["Tom has"], rows=4)
