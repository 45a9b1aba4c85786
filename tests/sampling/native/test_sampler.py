"""The sampler on the embedded model in float32, compared with transformers' `generate`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from imm_jax.errors import UserError
from imm_jax.model import hf
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.sampling import Completion, Prompt, completions
from imm_jax.sampling.native import decode, queue, sampler as native
from imm_jax.tasks import arithmetic, prompts
from tests import TINY

torch = pytest.importorskip("torch")

# Almost all tests use this length, so that compiled programs are reused.
NEW_TOKENS = 40
EXAMPLES = [arithmetic.generate(family, split="test", count=1, seed=3)[0] for family in arithmetic.FAMILIES]
SHORT = [Prompt(e.id, prompts.build_prompt(e.question)) for e in EXAMPLES]
# A worked example makes this prompt need the next padded length.
LONG = Prompt("long", prompts.build_prompt(EXAMPLES[0].question, examples=EXAMPLES[1:3]))
# Unlike the training data, so that samples differ.
STRANGE = Prompt("strange", "Tom")
ALL = [*SHORT, LONG, STRANGE]


@pytest.fixture(scope="module")
def greedy(sampler: native.NativeSampler) -> list[Completion]:
  return [c for c, in sampler.generate(ALL, max_new_tokens=NEW_TOKENS)]


@pytest.fixture(scope="module")
def reference() -> list[list[int]]:
  """Returns the new tokens of transformers' greedy search, including the end-of-text token."""
  tokenizer = load_tokenizer(TINY)
  tokenizer.padding_side = "left"
  model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
  inputs = tokenizer([p.text for p in ALL], padding=True, return_tensors="pt")
  rows = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[:, inputs["input_ids"].shape[1]:].tolist()
  end = tokenizer.eos_token_id
  return [row[:row.index(end) + 1] if end in row else row for row in rows]


def test_greedy_tokens_equal_transformers(
    sampler: native.NativeSampler, greedy: list[Completion], reference: list[list[int]],
    monkeypatch: pytest.MonkeyPatch) -> None:
  lengths = {len(sampler.tokenizer(p.text)["input_ids"]) for p in ALL}
  assert len(lengths) > 4
  assert max(lengths) > 64 > min(lengths)
  seen = []
  plain = sampler.tokenizer.decode
  monkeypatch.setattr(sampler.tokenizer, "decode", lambda ids, **kw: seen.append(list(ids)) or plain(ids, **kw))
  assert [c for c, in sampler.generate(ALL, max_new_tokens=NEW_TOKENS)] == greedy
  assert sorted(seen) == sorted(reference)
  for completion, tokens in zip(greedy, reference, strict=True):
    assert completion.text == plain(tokens, skip_special_tokens=True)
    assert completion.num_tokens == len(tokens)
    assert completion.finish == ("stop" if tokens[-1] == sampler.tokenizer.eos_token_id else "length")


def test_max_new_tokens_gives_finish_length(
    sampler: native.NativeSampler, reference: list[list[int]]) -> None:
  for tokens, (short,) in zip(reference, sampler.generate(SHORT, max_new_tokens=1), strict=False):
    assert short == Completion(sampler.tokenizer.decode(tokens[:1]), 1, "length")


@pytest.fixture(scope="module")
def sampled(sampler: native.NativeSampler) -> dict[str, list[Completion]]:
  """Returns completions at temperatures 0, 1 and 2 by prompt id."""
  return _generate(sampler, [*SHORT, STRANGE])


def _generate(sampler: native.NativeSampler, asked: list[Prompt]) -> dict[str, list[Completion]]:
  rows = sampler.generate(asked, max_new_tokens=NEW_TOKENS, num_samples=3, temperatures=(0.0, 1.0, 2.0))
  return {prompt.id: row for prompt, row in zip(asked, rows, strict=True)}


def test_zero_temperature_beside_others(greedy: list[Completion], sampled: dict[str, list[Completion]]) -> None:
  """Temperature 0 is greedy next to other temperatures."""
  assert all(sampled[p.id][0] == c for p, c in zip(ALL, greedy, strict=True) if p is not LONG)
  assert all(row[2] != row[0] for row in sampled.values())


def test_prompt_order_does_not_matter(
    sampler: native.NativeSampler, sampled: dict[str, list[Completion]], greedy: list[Completion]) -> None:
  """A sample does not depend on it."""
  assert _generate(sampler, [STRANGE, *SHORT[::-1]]) == sampled
  assert [c for c, in sampler.generate(ALL[::-1], max_new_tokens=NEW_TOKENS)] == greedy[::-1]


@pytest.mark.parametrize("asked", [[SHORT[1]], [STRANGE, SHORT[0], SHORT[3]]], ids=["one", "three"])
def test_a_sample_does_not_depend_on_other_prompts(
    sampler: native.NativeSampler, sampled: dict[str, list[Completion]], asked: list[Prompt]) -> None:
  assert _generate(sampler, asked) == {p.id: sampled[p.id] for p in asked}


@pytest.mark.full
@pytest.mark.parametrize("rows", [5, 16])
def test_a_sample_does_not_depend_on_the_batch_size(sampled: dict[str, list[Completion]], rows: int,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
  """Nor on rows that shrink, which those above 8 do, or on caches that grow."""
  sizes = []
  monkeypatch.setattr(queue, "FIRST_SLOTS", 64)
  shrink = decode.shrink
  monkeypatch.setattr(decode, "shrink", lambda state, rows, *args, **static: sizes.append(len(rows)) or shrink(
      state, rows, *args, **static))
  other = native.NativeSampler(TINY, compute_dtype="float32", batch_size=rows)
  compiled = len(native._COMPILED)
  assert _generate(other, [*SHORT, STRANGE]) == sampled
  assert sizes == ([] if rows == 5 else [8])
  assert {int(size.split()[4]) for size in other._sizes if size.startswith("decode")} == {64, 128}
  # A few programs for each size of packs, and of rows and slots; the others are run once a call.
  packs = sum(size.startswith("prefill") for size in other._sizes)
  assert len(native._COMPILED) - compiled <= 6 + 2 * packs + 3 * (len(other._sizes) - packs)


@pytest.mark.full
def test_groups_with_own_examples_agree(sampler: native.NativeSampler, monkeypatch: pytest.MonkeyPatch) -> None:
  """Groups with examples of their own give the same samples."""
  asked = [Prompt(f"{i}/{e.id}", prompts.build_prompt(e.question, examples=examples)) for e in EXAMPLES[:3]
           for i, examples in enumerate((EXAMPLES[3:], EXAMPLES[2:0:-1]))]
  groups = queue.group_by_prefix
  monkeypatch.setattr(queue, "group_by_prefix", lambda ids, *, least: groups(ids, least=3))
  apart = sampler.generate(asked, max_new_tokens=NEW_TOKENS, num_samples=2, temperatures=(0.0, 1.0))
  assert groups(completions.encode(sampler.tokenizer, asked, 568), least=3) == [[0, 2, 4], [1, 3, 5]]
  monkeypatch.setattr(queue, "group_by_prefix", lambda ids, *, least: [[*range(len(ids))]])
  assert sampler.generate(asked, max_new_tokens=NEW_TOKENS, num_samples=2, temperatures=(0.0, 1.0)) == apart


def test_a_sample_does_not_depend_on_num_samples(
    sampler: native.NativeSampler, sampled: dict[str, list[Completion]]) -> None:
  rows = sampler.generate(SHORT, max_new_tokens=NEW_TOKENS, num_samples=2, temperatures=(0.0, 1.0))
  assert rows == [sampled[p.id][:2] for p in SHORT]


def test_seed_id_and_sample_number_change_samples(sampler: native.NativeSampler) -> None:
  def draw(seed: int) -> list[list[str]]:
    rows = sampler.generate([STRANGE, STRANGE._replace(id="other")], max_new_tokens=NEW_TOKENS, num_samples=4,
                            temperatures=(1.0,), seed=seed)
    return [[c.text for c in row] for row in rows]

  one, other_id = draw(0)
  assert len(set(one)) > 1
  assert other_id != one
  assert draw(1)[0] != one
  assert draw(0) == [one, other_id]


def test_random_keys_are_distinct() -> None:
  samples = [queue.Sample(0, number, id_, 0.0) for number in range(3) for id_ in ("a", "b", "ab")]
  keys = [native._row_keys(seed, samples, 9) for seed in range(3)]
  assert len(np.unique(np.concatenate(keys), axis=0)) == 27


def test_a_tiny_top_p_is_greedy(sampler: native.NativeSampler, greedy: list[Completion]) -> None:
  rows = sampler.generate([*SHORT, STRANGE], max_new_tokens=NEW_TOKENS, num_samples=2, temperatures=(1.0, 2.0),
                          top_p=1e-6)
  for prompt, (one, two) in zip([*SHORT, STRANGE], rows, strict=True):
    assert one == two == greedy[ALL.index(prompt)]


@pytest.mark.parametrize("choose", [
    lambda texts: (texts[0][3],),
    lambda texts: (texts[0][-7:-3],),
    lambda texts: (texts[3][-4:-1], texts[3][2:6], texts[1][4:6]),
    lambda texts: (texts[-1][-6:],),
    lambda texts: ("no such text",),
], ids=["one-letter", "late", "the-first-of-three", "at-the-end", "none"])
def test_stop_strings_only_cut_the_text(
    sampler: native.NativeSampler, greedy: list[Completion], reference: list[list[int]],
    choose: Callable[[list[str]], tuple[str, ...]]) -> None:
  stop = choose([c.text for c in greedy])
  rows = sampler.generate(ALL, max_new_tokens=NEW_TOKENS, stop=stop)
  for full, tokens, (actual,) in zip(greedy, reference, rows, strict=True):
    places = [full.text.find(s) for s in stop if s in full.text]
    if places:
      count = next(n for n in range(len(tokens)) if any(s in sampler.tokenizer.decode(tokens[:n]) for s in stop))
      assert actual == Completion(full.text[:min(places)], count, "stop")
    else:
      assert actual == full


@pytest.mark.full
def test_stop_strings_cut_refilled_rows(sampler: native.NativeSampler) -> None:
  """They cut the same where rows are filled again."""
  asked = [p._replace(id=f"{p.id}/{i}") for i in range(3) for p in ALL]
  options = {"max_new_tokens": NEW_TOKENS, "num_samples": 2, "temperatures": (0.0, 1.0), "stop": ("=", "answer is 1")}
  few = native.NativeSampler(TINY, compute_dtype="float32", batch_size=3)
  rows = few.generate(asked, **options)
  assert rows == sampler.generate(asked, **options)
  assert sum(c.finish == "stop" for row in rows for c in row) > len(asked)
  assert not any("=" in c.text for row in rows for c in row)


def test_a_sample_may_end_with_its_first_token(
    sampler: native.NativeSampler, greedy: list[Completion], monkeypatch: pytest.MonkeyPatch) -> None:
  firsts = {sampler.tokenizer(c.text)["input_ids"][0] for c in greedy}
  monkeypatch.setattr(sampler, "_eos", tuple(sorted(firsts)))
  rows = sampler.generate([*ALL, *ALL], max_new_tokens=NEW_TOKENS)
  assert all((c.num_tokens, c.finish) == (1, "stop") for c, in rows)


def _resized(folder: Path, rows: Callable[[np.ndarray], np.ndarray]) -> Path:
  """Copies the embedded model with other embedding rows."""
  config, params = hf.load(TINY, dtype=jnp.float32)
  weight = rows(np.asarray(params["embed_tokens"]["weight"]))
  shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
  hf.save({**params, "embed_tokens": {"weight": weight}}, folder)
  changed = {**json.loads((TINY / "config.json").read_text()), "vocab_size": len(weight)}
  (folder / "config.json").write_text(json.dumps(changed))
  assert config.vocab_size != len(weight)
  return folder


def test_unknown_ids_are_never_sampled(tmp_path: Path, greedy: list[Completion]) -> None:
  # Every known id gets an unknown twin with twice its logit.
  folder = _resized(tmp_path / "padded", lambda weight: np.concatenate([weight, 2 * weight]))
  padded = native.NativeSampler(folder, compute_dtype="float32", batch_size=8)
  rows = padded.generate(SHORT, max_new_tokens=NEW_TOKENS, num_samples=2, temperatures=(0.0, 0.01))
  assert rows == [[c, c] for c in greedy[:len(SHORT)]]


def test_too_large_tokenizer_is_refused(tmp_path: Path) -> None:
  """A tokenizer with more ids than the embedding has rows."""
  folder = _resized(tmp_path / "cut", lambda weight: weight[:500])
  with pytest.raises(UserError, match=r"ids up to \d+.*500 rows"):
    native.NativeSampler(folder, compute_dtype="float32")


@pytest.mark.parametrize("named", [True, False], ids=["in-all_special_tokens", "only-marked"])
@pytest.mark.parametrize(("stop", "at", "shown"), [
    (("\u0120answer",), " answer", " answer"),
    ((" answer is",), " answer", " answer is"),
    ((" is", "no such text"), " is", " is"),
], ids=["alone", "with-text", "text-after-it"])
def test_special_tokens_match_stop_strings(stop: tuple[str, ...], at: str, shown: str, named: bool) -> None:
  """Makes a word of the answers a special token, with and without an entry in `all_special_tokens`."""
  sampler = native.NativeSampler(TINY, compute_dtype="float32", batch_size=8)
  plain = [row[0] for row in sampler.generate(SHORT, max_new_tokens=NEW_TOKENS)]
  encode = lambda text: sampler.tokenizer(text)["input_ids"]
  wanted = [len(encode(full.text[:full.text.index(shown) + len(shown)])) for full in plain]
  word, = encode(" answer")
  if named:
    sampler.tokenizer.add_special_tokens({"additional_special_tokens": ["\u0120answer"]})
  else:
    sampler.tokenizer.add_tokens([transformers.AddedToken("\u0120answer", special=True, normalized=False)])
  assert sampler.tokenizer.convert_tokens_to_ids("\u0120answer") == word
  assert ("\u0120answer" in sampler.tokenizer.all_special_tokens) == named
  rows = sampler.generate(SHORT, max_new_tokens=NEW_TOKENS, stop=stop)
  assert any(full.text.index(at) for full in plain)
  for full, count, (actual,) in zip(plain, wanted, rows, strict=True):
    assert actual == Completion(full.text[:full.text.index(at)].replace(" answer", ""), count, "stop")


def test_parameters_in_memory_sample_like_a_folder(greedy: list[Completion]) -> None:
  _, params = hf.load(TINY, dtype=jnp.float32)
  held = native.NativeSampler(TINY, compute_dtype="float32", batch_size=8, params=params)
  assert [c for c, in held.generate(ALL, max_new_tokens=NEW_TOKENS)] == greedy


def test_no_prompts_give_no_completions(sampler: native.NativeSampler) -> None:
  assert sampler.generate([], max_new_tokens=4) == []


def test_other_prompts_reuse_compiled_programs(sampler: native.NativeSampler) -> None:
  """Different numbers and lengths of prompts share few compiled shapes."""
  sampler.generate(ALL, max_new_tokens=NEW_TOKENS, stop=("zebra",), num_samples=3)
  compiled = len(native._COMPILED)
  for seed in range(2):
    drawn = [arithmetic.generate(family, split="train", count=1, seed=seed)[0] for family in arithmetic.FAMILIES]
    others = [Prompt(str(i), prompts.build_prompt(example.question)) for i, example in enumerate(drawn)]
    sampler.generate([*others, LONG], max_new_tokens=NEW_TOKENS, stop=("zebra",), num_samples=3)
  assert len(native._COMPILED) == compiled


def test_gaps_in_the_vocabulary_are_never_sampled(greedy: list[Completion]) -> None:
  sampler = native.NativeSampler(TINY, compute_dtype="float32", batch_size=8)
  hole = sampler.tokenizer(greedy[0].text)["input_ids"][0]
  sampler._allowed = sampler._allowed.at[hole].set(False)
  assert all(hole not in sampler.tokenizer(c.text)["input_ids"]
             for c, in sampler.generate(SHORT, max_new_tokens=NEW_TOKENS))


@pytest.mark.parametrize("kind", ["qwen2-tied", *(pytest.param(kind, marks=pytest.mark.full) for kind in (
    "llama", "qwen2-untied", "qwen2.5-math", "llama2", "llama3", "llama3.1", "qwen3"))])
def test_families_match_transformers_greedily(checkpoint: Callable, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
  """Compares 128 tokens of prompts of several lengths, in a batch and singly; some embedding rows have no token."""
  model, folder = checkpoint(kind, vocab_size=600)
  for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copyfile(TINY / name, folder / name)
  sampler = native.NativeSampler(folder, compute_dtype="float32", batch_size=4)
  ids = len(sampler.tokenizer)
  assert ids < 600
  asked = [SHORT[0], SHORT[1], LONG, STRANGE]
  seen: dict[str, list[list[int]]] = {"batch": [], "alone": []}
  plain = sampler.tokenizer.decode
  single = asked[:1] if kind == "qwen2-tied" else []  # compiles all once more
  for how, groups in (("batch", [asked]), ("alone", [[p] for p in single])):
    monkeypatch.setattr(
        sampler.tokenizer, "decode", lambda t, how=how, **kw: seen[how].append(list(t)) or plain(t, **kw))
    for group in groups:
      sampler.generate(group, max_new_tokens=128)
  wanted = []
  for prompt in asked:
    tokens = torch.tensor([sampler.tokenizer(prompt.text)["input_ids"]])
    for _ in range(128):  # plain search over tokens that exist
      with torch.no_grad():
        best = model(tokens).logits[0, -1, :ids].argmax()
      tokens = torch.cat([tokens, best[None, None]], 1)
      if int(best) in sampler._eos:
        break
    wanted.append(tokens[0, len(sampler.tokenizer(prompt.text)["input_ids"]):].tolist())
  assert sorted(seen["batch"]) == sorted(wanted)
  assert seen["alone"] == wanted[:len(single)]
