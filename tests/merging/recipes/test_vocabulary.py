"""Models with different tokenizers: the output's tokenizer, and the rows of embeddings and heads."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from imm_jax.errors import UserError
from imm_jax.merging.recipes import vocabulary
from tests.merge_folders import read
from tests.merging.recipe_models import SHAPES, merged, save


def tokenizer(folder: Path, words: list[str], added: tuple[str, ...] = ()) -> None:
  vocabulary = {word: i for i, word in enumerate(words)}
  made = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token=words[0])
  fast.add_tokens(list(added))
  fast.save_pretrained(folder)


WORDS = [f"w{i}" for i in range(12)]


@pytest.fixture
def worded(tmp_path: Path) -> dict[str, Path]:
  """Three models: the words, the words in another order with two more, the words with one more and padding."""
  shapes = lambda rows: {n: (rows, 8) if n in ("model.embed_tokens.weight", "lm_head.weight") else s
                         for n, s in SHAPES.items()}
  found = {"base": save(tmp_path / "base", 0),
           "more": save(tmp_path / "more", 1, shapes(14), vocab_size=14),
           "padded": save(tmp_path / "padded", 2, shapes(16), vocab_size=16)}
  tokenizer(found["base"], WORDS)
  tokenizer(found["more"], WORDS[:1] + WORDS[:0:-1], ("<a>", "<b>"))
  tokenizer(found["padded"], WORDS, ("<a>",))
  return found


def rows(folder: Path) -> dict[str, np.ndarray]:
  """Token -> its row of the embedding."""
  embedding = read(folder)["model.embed_tokens.weight"]
  return {token: embedding[i] for token, i in AutoTokenizer.from_pretrained(folder).get_vocab().items()}


def test_union_has_rows_for_all_tokens(worded, tmp_path: Path):
  """Every model is given them."""
  base, more, padded = map(rows, worded.values())
  made = {"merge_method": "linear", "base_model": str(worded["base"]), "dtype": "float32",
          "tokenizer": {"source": "union", "pad_to_multiple_of": 8},
          "models": [{"model": str(folder), "parameters": {"weight": 1}} for folder in worded.values()]}
  got = merged(tmp_path, made)
  assert got["model.embed_tokens.weight"].shape == got["lm_head.weight"].shape == (16, 8)
  assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 16
  found = rows(tmp_path / "out")
  assert set(found) == {*WORDS, "<a>", "<b>"}
  for word in WORDS:
    np.testing.assert_allclose(found[word], (base[word] + more[word] + padded[word]) / 3, rtol=1e-5, atol=1e-6)
  # The base has no <a>: it gets the mean of those that do. Only one has <b>.
  np.testing.assert_allclose(found["<a>"], (more["<a>"] + padded["<a>"]) / 2, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found["<b>"], more["<b>"], rtol=1e-5)
  free = sorted(set(range(16)) - set(AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab().values()))
  used = [i for i in range(16) if i not in free]
  embedding = got["model.embed_tokens.weight"]
  for i in free:
    np.testing.assert_allclose(embedding[i], embedding[used].mean(axis=0), rtol=1e-4, atol=1e-6)


def test_tokens_may_be_chosen_one_by_one(worded, tmp_path: Path):
  base, more, _ = map(rows, worded.values())
  made = {"merge_method": "linear", "base_model": str(worded["base"]), "dtype": "float32",
          "models": [{"model": str(worded[name]), "parameters": {"weight": 1}} for name in ("base", "more")],
          "tokenizer": {"source": "base", "tokens": {
              "<b>": {"source": str(worded["more"])}, "w3": {"source": {"kind": "zero"}, "force": True},
              "new": {"source": {"kind": "model_token", "model": str(worded["base"]), "token": "w5"}}}}}
  merged(tmp_path, made)
  found = rows(tmp_path / "out")
  np.testing.assert_allclose(found["<b>"], more["<b>"], rtol=1e-6)
  np.testing.assert_array_equal(found["w3"], 0)
  np.testing.assert_allclose(found["new"], base["w5"], rtol=1e-6)
  np.testing.assert_allclose(found["w4"], (base["w4"] + more["w4"]) / 2, rtol=1e-5, atol=1e-6)
  made["tokenizer"]["tokens"]["<b>"]["source"] = str(worded["base"])
  with pytest.raises(UserError, match=r"tokens\.<b>: .* has no row for it"):
    merged(tmp_path, made, "again")
  del made["tokenizer"]
  with pytest.raises(UserError, match=r"other vocabularies: a recipe with tokenizer_source"):
    merged(tmp_path, made, "without")


@pytest.mark.parametrize("tokens", [{}, {"<b>": {"source": "more"}}])
def test_tied_head_is_the_embedding(tokens: dict, worded, tmp_path: Path):
  """The head of a tied model is its embedding for every token."""
  tied = {name: x for name, x in read(worded["more"]).items() if name != "lm_head.weight"}
  more = save(tmp_path / "tied", 0, tree=tied, vocab_size=14, tie_word_embeddings=True)
  tokenizer(more, WORDS[:1] + WORDS[:0:-1], ("<a>", "<b>"))
  got = merged(tmp_path, {"merge_method": "linear", "dtype": "float32", "models": [
      {"model": str(folder), "parameters": {"weight": 1}} for folder in (worded["base"], more)], "tokenizer": {
          "source": "union", "tokens": {token: {"source": str(more)} for token in tokens}}})
  ids = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
  np.testing.assert_allclose(got["lm_head.weight"][ids["<b>"]], rows(more)["<b>"], rtol=1e-6)
  own = read(worded["base"])["lm_head.weight"][int("w3".removeprefix("w"))]
  np.testing.assert_allclose(got["lm_head.weight"][ids["w3"]], (own + rows(more)["w3"]) / 2, rtol=1e-5, atol=1e-6)


def test_chat_templates(worded, tmp_path: Path):
  (worded["more"] / "chat_template.jinja").write_text("{{ messages }}")
  made = {"merge_method": "passthrough", "models": [{"model": str(worded["more"])}]}
  own = "{{ bos_token }} hello"
  for name, text, expected in (("auto", "auto", "{{ messages }}"), ("own", own, own), ("chatml", "chatml", "<|im_")):
    merged(tmp_path, {**made, "chat_template": text}, name)
    assert expected in AutoTokenizer.from_pretrained(tmp_path / name).chat_template


def linear(folders, **more) -> dict:
  return {"merge_method": "linear", "base_model": str(folders[0]), "dtype": "float32",
          "models": [{"model": str(folder), "parameters": {"weight": 1}} for folder in folders], **more}


def test_a_union_of_large_vocabularies_takes_seconds(tmp_path: Path):
  """Asking a tokenizer for its vocabulary copies it, so it must not be asked for every token."""
  count, rng = 30_000, np.random.default_rng(0)
  orders = [rng.permutation(count) for _ in range(2)]
  folders = []
  for i, order in enumerate(orders):
    folders.append(save(tmp_path / str(i), i, {"model.embed_tokens.weight": (count, 2)}, vocab_size=count))
    # The second has 100 words that the first has not.
    tokenizer(folders[-1], ["?", *(f"w{n if n >= 100 else n - i * 1000}" for n in order[1:])])
  started = time.process_time()
  got = merged(tmp_path, linear(folders, tokenizer_source="union"))["model.embed_tokens.weight"]
  assert time.process_time() - started < 20
  first, second, found = (AutoTokenizer.from_pretrained(f).get_vocab() for f in (*folders, tmp_path / "out"))
  a, b = (read(folder)["model.embed_tokens.weight"] for folder in folders)
  assert found.keys() == first.keys() | second.keys()
  for word in ("?", "w50", "w-950", "w200", *(f"w{n}" for n in orders[0][-20:] if n >= 100)):
    rows_of = [x[v[word]] for x, v in ((a, first), (b, second)) if word in v]
    np.testing.assert_allclose(got[found[word]], np.mean(rows_of, axis=0), rtol=1e-6, atol=1e-6)


# For each family its tables of tokens, and tensors that happen to have as many rows.
FAMILIES = {
    "gpt2": (["transformer.wte.weight"], ["transformer.wpe.weight", "transformer.h.0.mlp.c_fc.weight"]),
    "gpt_neox": (["gpt_neox.embed_in.weight", "embed_out.weight"], []),
    "gemma3": (["language_model.model.embed_tokens.weight"], ["vision_tower.embeddings.position_embedding.weight"]),
    "bert": (["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"],
             ["bert.embeddings.position_embeddings.weight"]),
    "mamba": (["backbone.embeddings.weight"], ["backbone.layers.0.mixer.in_proj.weight"]),
    "t5": (["shared.weight", "lm_head.weight"], ["decoder.block.0.layer.0.SelfAttention.q.weight"])}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rows_of_any_family_are_aligned(family: str, tmp_path: Path):
  tables, others = FAMILIES[family]
  folders = [tmp_path / "a", tmp_path / "b"]
  for i, (folder, order) in enumerate(zip(folders, (WORDS, WORDS[:1] + WORDS[:0:-1]), strict=True)):
    count = 12 + i
    shapes = {name: (count,) if name.endswith("bias") else (count, 8) for name in tables}
    save(folder, i, {**shapes, **dict.fromkeys(others, (12, 8))})
    tokenizer(folder, order, ("<a>",) * i)
    sizes = {"vocab_size": count}
    if family == "gemma3":  # of models of several parts the language model has a config of its own
      sizes = {"text_config": sizes, "vision_config": {"num_hidden_layers": 1}}
    (folder / "config.json").write_text(json.dumps({"model_type": family, **sizes}))
  got = merged(tmp_path, linear(folders, tokenizer_source="union"))
  a, b = map(read, folders)
  words = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (*folders, tmp_path / "out")]
  assert len(words[2]) == 13
  for name in tables:
    assert len(got[name]) == 13
    for word, row in words[2].items():
      expected = b[name][words[1][word]] if word == "<a>" else (a[name][words[0][word]] + b[name][words[1][word]]) / 2
      np.testing.assert_allclose(got[name][row], expected, rtol=1e-6, atol=1e-6)
  for name in others:
    np.testing.assert_allclose(got[name], (a[name] + b[name]) / 2, rtol=1e-6, atol=1e-6)
  config = json.loads((tmp_path / "out/config.json").read_text())
  assert config.get("text_config", config)["vocab_size"] == 13
  assert ("vocab_size" in config) == (family != "gemma3")


@pytest.mark.parametrize(("shapes", "expected"), [
    ({"model.tokens.weight": (12, 8)}, "none of its tensors is known as the embedding"),
    ({"model.embed_tokens.weight": (12, 8), "model.mystery.weight": (12, 3)}, "model.mystery.weight"),
    ({"model.embed_tokens.weight": (12, 8), "final_logits_bias": (1, 12)}, "final_logits_bias"),
    ({"model.embed_tokens.weight": (12, 8), "model.layers.0.q.weight": (12, 8), "model.layers.1.mtp.weight": (12, 8)},
     "layers.1.mtp.weight"),
    ({"encoder.embed_tokens.weight": (12, 8), "decoder.embed_tokens.weight": (9, 8)}, "different numbers of tokens")])
def test_unknown_tables_are_refused(shapes, expected: str, tmp_path: Path):
  """Tables by token that are not known are refused, not left in the wrong order."""
  folders = [save(tmp_path / name, i, shapes) for i, name in enumerate("ab")]
  tokenizer(folders[0], WORDS)
  tokenizer(folders[1], WORDS[::-1])
  with pytest.raises(UserError, match=expected):
    merged(tmp_path, linear(folders, tokenizer_source="base"))
  tokenizer(folders[1], WORDS)  # nothing depends on what equal tokenizers' tables are called
  merged(tmp_path, linear(folders, tokenizer_source="base"), "equal")


def test_blocks_of_any_size_give_the_same_rows(worded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  made = linear(list(worded.values()), tokenizer={"source": "union", "pad_to_multiple_of": 9})
  whole = merged(tmp_path, made, "whole")
  monkeypatch.setattr(vocabulary, "BLOCK", 24)
  for name, x in merged(tmp_path, made, "blocks").items():
    np.testing.assert_array_equal(x, whole[name])


def test_tokenizer_keeps_its_class(worded, tmp_path: Path):
  """The class that its source names."""
  path = worded["base"] / "tokenizer_config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}))
  merged(tmp_path, linear(list(worded.values()), tokenizer_source="union"))
  written = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
  assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
  assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 14


# Files of old models, which AutoTokenizer and others read beside tokenizer.json.
STALE = {"special_tokens_map.json": '{"eos_token": "w1"}', "added_tokens.json": '{"extra": 12}', "vocab.json": "{}",
         "tokenizer.model": "", "spm.model": "", "chat_template.jinja": "of the base", "chat_template.json": "{}"}


@pytest.mark.parametrize("source", ["more", "union"])
def test_own_tokenizer_replaces_base_files(source: str, worded, tmp_path: Path):
  """A tokenizer of its own has no files of the base beside it."""
  for name, text in STALE.items():
    (worded["base"] / name).write_text(text)
  (worded["more"] / "chat_template.jinja").write_text("of more")
  got = merged(tmp_path, linear([worded["base"], worded["more"]], tokenizer={
      "source": source if source == "union" else str(worded["more"])}))
  left = {name for name in STALE if (tmp_path / "out" / name).exists()}
  assert left == ({"chat_template.jinja", "chat_template.json"} if source == "union" else {"chat_template.jinja"})
  made = AutoTokenizer.from_pretrained(tmp_path / "out")
  assert len(made) == len(got["model.embed_tokens.weight"])
  assert ("extra" in made.get_vocab()) == (source == "union")  # it is a token of the base
  assert made.chat_template == ("of the base" if source == "union" else "of more")


def test_config_ids_follow_their_tokens(worded, tmp_path: Path, capsys: pytest.CaptureFixture):
  """The ids in configs are those of the same tokens."""
  base, more = worded["base"], worded["more"]
  fast = PreTrainedTokenizerFast.from_pretrained(more, eos_token="<b>")
  fast.save_pretrained(more)
  tokenizer(base, [*WORDS[:10], "</s>", "<image>"])
  ids = {"bos_token_id": 1, "eos_token_id": 10, "pad_token_id": -1, "sep_token_id": None, "image_token_index": 11,
         "unk_token_id": 99}
  (base / "config.json").write_text(json.dumps({**json.loads((base / "config.json").read_text()), **ids,
                                                "text_config": {"eos_token_id": [2, 10], "vocab_size": 12}}))
  (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [10, 2, 10], "suppress_tokens": [3],
                                                           "bad_words_ids": [[1, 2]], "top_k": 1}))
  merged(tmp_path, linear([base, more], tokenizer={"source": str(more)}))
  new = fast.get_vocab()
  config, generation = (json.loads((tmp_path / "out" / name).read_text())
                        for name in ("config.json", "generation_config.json"))
  assert {key: config[key] for key in ids} == {**ids, "bos_token_id": new["w1"], "eos_token_id": new["<b>"],
                                               "unk_token_id": new["w0"]}
  assert config["text_config"]["eos_token_id"] == [new["w2"], new["<b>"]]
  assert generation == {"eos_token_id": [new["<b>"], new["w2"]], "suppress_tokens": [new["w3"]],
                        "bad_words_ids": [[new["w1"], new["w2"]]], "top_k": 1}
  notes = capsys.readouterr().err
  assert "config.json: image_token_index 11 is '<image>' of the base's tokenizer and has no like in" in notes
  assert "eos_token_id" not in notes


def test_tokenizers_that_cannot_be_read_are_named(worded, tmp_path: Path):
  made = linear(list(worded.values()), tokenizer_source="base")
  (worded["more"] / "tokenizer.json").write_text("{")
  with pytest.raises(UserError, match=r"more: its tokenizer cannot be read \(.*[^: ]\)"):
    merged(tmp_path, made)
  (worded["more"] / "tokenizer.json").unlink()
  with pytest.raises(UserError, match=r"more: has no tokenizer; expected tokenizer\.json"):
    merged(tmp_path, made)
