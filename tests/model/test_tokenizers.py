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
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors

from configs import tiny
from imm_jax.errors import UserError
from imm_jax.model.tokenization import decode_continuation, encode_continuation, encode_prompt
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.model.tokenizer_check import check_tokenizer
from imm_jax.sampling import Prompt, completions
from imm_jax.sampling.native import sampler as native
from imm_jax.stages import fine_tune
from imm_jax.tasks import prompts
from tests import TINY

WORDS = ["the", "answer", "is", "so", "we", "have", "apples", "Tom", "and", "gives", "each", "of", "them", "step",
         "think", "total", "cost", "sum", "What", "number", "costs", "more", "than", "twice"]
TEXTS = ["What is 12 + 30?", "Tom has 3 apples.\n\nThe  answer is \\frac{1}{2}\t", "\u00e9 \U0001f600 \u2603"]
ANSWERS = ["The answer is 5", " so the answer", "  two spaces", "\nThe", "\n\n12", "7 apples", "\U0001f600 \u00e9", ".",
           "the  cost\t= 3 ", ""]
PROMPT = prompts.build_prompt("What is 12 + 30?")
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


def test_leading_space_stop_string_is_found(folder: Path) -> None:
  """It is found at the very front of a text, too."""
  tokenizer = load_tokenizer(folder)
  tokens = np.array(encode_continuation(tokenizer, " the answer"))
  assert completions.completion(tokenizer, tokens, (), (" the",)).text == ""
  assert completions.completion(tokenizer, tokens, (), ("answer",)).text == " the "


def test_a_chat_has_the_ids_that_its_template_gives(folder: Path) -> None:
  tokenizer = load_tokenizer(folder)
  text = prompts.build_prompt("What is 1+1?", style="chat", tokenizer=tokenizer)
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


def test_sampled_ids_are_trained_on(checkpoint: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
  answers = sampler.generate([Prompt(q, prompts.build_prompt(q)) for q in questions], max_new_tokens=4, num_samples=8,
                             temperatures=(0.0, 2.0), stop=("[PAD]",))
  ids, encode = dict(drawn), fine_tune.make_encoder(tiny.get_config(), model)
  canonical = {False: 0, True: 0}
  for question, group in zip(questions, answers, strict=True):
    prompt = sampler.tokenizer(prompts.build_prompt(question))["input_ids"]
    for text in {completion.text for completion in group}:
      # as texts are spelled
      if sampler.tokenizer(prompts.build_prompt(question) + text)["input_ids"] == prompt + ids[text]:
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
def test_byte_level_spaces_survive_any_class(tmp_path: Path, model_type: str) -> None:
  """A byte-level file keeps its spaces whatever class is named."""
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


@pytest.mark.parametrize(("after", "ends", "learned"), [
    ("<|im_end|>\n", [0, 568], 568), (" <|im_end|><|endoftext|>", [568], 568), ("<|im_end|>\n", [0], 0),
    ("\n", [0, 568], 0), (None, [0, 568], 0)], ids=["turn", "both", "other-end", "newline", "no-template"])
def test_the_end_that_a_chat_learns_is_its_templates(
    tmp_path: Path, after: str | None, ends: list[int], learned: int) -> None:
  for name in ("config.json", "tokenizer.json"):
    shutil.copy(TINY / name, tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(
      json.loads((TINY / "config.json").read_text()) | {"vocab_size": 569}))
  (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
  answer = "{{ raise_exception('none') }}" if after is None else "<|a|>{{ m.content | trim }}" + after
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({
      "eos_token": "<|endoftext|>", "added_tokens_decoder": {"568": {"content": "<|im_end|>", "special": True}},
      "chat_template": "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_end|>{% else %}" + answer
                       + "{% endif %}{% endfor %}"}))
  config = tiny.get_config()
  for style, end in (("chat", learned), ("paper", 0)):
    config.prompt.style = style
    encode = fine_tune.make_encoder(config, tmp_path)
    assert encode({"question": "1 + 1?", "response": "It is 2."}).response[-1] == end
