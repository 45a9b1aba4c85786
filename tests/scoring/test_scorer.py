"""Log-likelihoods of packed texts, compared with transformers without packing and with lm-evaluation-harness's own
model; on one and on eight devices, where this file runs as a program."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from imm_jax.errors import UserError
from imm_jax.model import hub, sharding
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.scoring import Request, Scorer, encode_continuations, encode_text
from imm_jax.scoring.packing import pack
from imm_jax.stages import likelihood
from imm_jax.tasks.base import Choice

MESHES = {"data8": (8, 1, 1), "fsdp4-tensor2": (1, 4, 2), "data2-fsdp2-tensor2": (2, 2, 2)}
PAIRS = [("Tom has 3 apples.", " He"), ("Tom has 3 apples.", " She"), ("Tom has 3 apples. ", "He buys 2"),
         ("What is 12 + 30?", " 42"), ("What is 12 + 30?", " 7"), ("What is 12 + 30?\n\n", "The answer is 42"),
         ("", "Tom has 3"), ("", "What"), ("What is 12", " + 30?"), ("x", " the" * 40),
         ("Tom", " has"), ("Tom", " has 3"), ("Tom", " has"), ("\u00e9 \U0001f600", " \u2603")]


def _requests(seed: int = 0, count: int = 40, vocab: int = 61, longest: int = 30) -> list[Request]:
  """Returns requests with many common prefixes; some are duplicates or prefixes of others."""
  rng = np.random.default_rng(seed)
  result: list[tuple[int, ...]] = []
  for _ in range(count):
    kept = result[rng.integers(len(result))][:rng.integers(1, longest)] if result and rng.random() < 0.7 else ()
    result.append((*kept, *rng.integers(0, vocab, rng.integers(2, 12)).tolist()))
  return [Request(tokens, int(rng.integers(1, len(tokens)))) for tokens in [*result, result[0], result[1][:-1]]]


def _main(folder: Path, asked: Path, out: Path) -> None:
  """Scores on eight devices."""
  scores, requests = {}, [Request(tuple(tokens), start) for tokens, start in json.loads(asked.read_text())]
  for name, (data, fsdp, tensor) in MESHES.items():
    mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    scorer = Scorer.load(folder, mesh=mesh, compute_dtype="float32", tokens=64)
    scores[name] = [list(score) for score in scorer.score(requests)]
  out.write_text(json.dumps(scores))


def _scorer(folder: str | Path, **options: int) -> Scorer:
  return Scorer.load(folder, mesh=sharding.make_mesh(data=1, fsdp=1, devices=jax.devices()[:1]),
                     compute_dtype="float32", **options)


@pytest.mark.parametrize("length", [40, 64, 500])
def test_every_scored_token_attends_to_its_own_text(length: int) -> None:
  requests = _requests()
  rows = pack(requests, length=length)
  seen: dict[int, list[int]] = {i: [] for i in range(len(requests))}
  for row, owners in enumerate(rows.owners):
    for index, target, owner in zip(rows.indices[row], rows.targets[row], owners, strict=False):
      place = rows.places[row, index]
      visible = [t for t in range(place + 1) if rows.until[row, t] >= place]
      assert rows.positions[row, visible].tolist() == list(range(len(visible)))
      t = requests[owner].start + len(seen[owner])
      assert tuple(rows.tokens[row, visible]) == requests[owner].tokens[:t]
      assert target == requests[owner].tokens[t]
      seen[owner].append(t)
  assert all(ts == list(range(r.start, len(r.tokens))) for r, ts in zip(requests, seen.values(), strict=True))
  assert (rows.until >= np.arange(length)).all()
  # In a single row every prefix is stored once.
  if length == 500:
    assert rows.filled == len({r.tokens[:t] for r in requests for t in range(1, len(r.tokens))})


@pytest.mark.full
@pytest.mark.parametrize("kind", ["llama3.1", "granite"])
def test_scores_equal_those_of_transformers(
    checkpoint: Callable, kind: str, run_on_devices: Callable[..., str], tmp_path: Path) -> None:
  torch = pytest.importorskip("torch")
  model, folder = checkpoint(kind)
  requests, expected, double = _requests(), [], model.double()

  @torch.no_grad()
  def logprobs_of(tokens: tuple[int, ...]) -> np.ndarray:
    return double(torch.tensor([tokens])).logits[0].log_softmax(-1).numpy()

  requests += [Request((*r.tokens, int(logprobs_of(r.tokens)[-1].argmax())), len(r.tokens)) for r in requests[:5]]
  for r in requests:
    logprobs = logprobs_of(r.tokens)
    at = [(t - 1, r.tokens[t]) for t in range(r.start, len(r.tokens))]
    expected.append((sum(logprobs[t, token] for t, token in at), all(logprobs[t].argmax() == k for t, k in at)))
  for tokens in (64, 4096):
    result = _scorer(folder, tokens=tokens).score(requests, quiet=True)
    np.testing.assert_allclose([s.logprob for s in result], [p for p, _ in expected], rtol=2e-5)
    assert [s.greedy for s in result] == [best for _, best in expected]
    assert [s.tokens for s in result] == [len(r.tokens) - r.start for r in requests]
  assert sum(best for _, best in expected) >= 5
  if kind == "llama3.1":
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    run_on_devices(__file__, folder, tmp_path / "requests.json", tmp_path / "scores.json")
    for mesh, scores in json.loads((tmp_path / "scores.json").read_text()).items():
      np.testing.assert_allclose([s[0] for s in scores], [p for p, _ in expected], rtol=2e-5, err_msg=mesh)
      assert [s[1] for s in scores] == [best for _, best in expected]


def test_unscorable_requests_are_refused(checkpoint: Callable) -> None:
  scorer = _scorer(checkpoint("qwen2-tied")[1])  # of 64 positions
  with pytest.raises(UserError, match="a text of 66 tokens is longer than the 64 positions"):
    scorer.score([Request(tuple(range(61)) + (1, 2, 3, 4, 5), 1)])
  assert scorer.score([]) == []
  tokenizer = load_tokenizer(hub.resolve("tiny"))
  options = {"rows": 1000, "positions": 20}
  for pair, message in ((("a", ""), "the continuation '' has no token"),
                        (("a", " the" * 30), "has 30 tokens, more than the 20 positions")):
    with pytest.raises(UserError, match=message):
      encode_continuations(tokenizer, [pair], **options)
  # Contexts are truncated at the front.
  (request,) = encode_continuations(tokenizer, [(" the" * 30, " answer is")], **options)
  assert (len(request.tokens), request.start) == (21, 19)


def test_windows_score_every_token_once() -> None:
  tokenizer = load_tokenizer(hub.resolve("tiny"))
  text = "Tom has 3 apples and buys 12 more. What is 12 + 30? The answer is 42"
  ids = tokenizer(text)["input_ids"]
  for positions in (1, 2, 5, len(ids) - 1, len(ids), 100):
    requests = encode_text(tokenizer, text, rows=1000, positions=positions)
    assert [t for r in requests for t in r.tokens[r.start:]] == ids
    assert requests[0].tokens[0] == tokenizer.eos_token_id
    assert all(len(r.tokens) == positions + 1 for r in requests[1:])


def test_options_are_chosen_by_likelihood() -> None:
  """They are also chosen by likelihood per character."""
  class Fixed:  # a scorer with fixed scores
    config = type("Config", (), {"vocab_size": 1000, "max_positions": None})

    def score(self, requests: list[Request], **_: object) -> list:
      nats = iter((-4.0, -5.0, -9.0, -7.0, -7.0))
      return [type("Score", (), {"logprob": next(nats), "greedy": False, "tokens": 1}) for _ in requests]

  choices = [Choice("a", ("What is 12",), (" 3", " 30 apples", " 4"), 1, "q"),
             Choice("b", ("x", "y"), (" 3", " 3"), 0, "q")]
  rows = likelihood.score_choices(Fixed(), load_tokenizer(hub.resolve("tiny")), choices, label="")
  assert [(r["span"], r["correct"], r["span_norm"], r["correct_norm"]) for r in rows] == [
      ("A", False, "B", True), ("A", True, "A", True)]
  assert rows[0]["logprobs"] == [-4.0, -5.0, -9.0]


def test_text_intervals_have_their_coverage() -> None:
  """They hold the truth as often as they say."""
  rng = np.random.default_rng(0)
  held = 0
  for _ in range(400):
    sizes = rng.integers(50, 400, 60)
    nats = sizes * rng.gamma(40, 3.0 / 40, 60)
    result = likelihood.summarize_texts([{"nats": n, "tokens": int(s), "bytes": 4 * int(s)}
                                         for n, s in zip(nats, sizes, strict=True)])
    held += result["nats_per_token"]["low"] <= 3.0 <= result["nats_per_token"]["high"]
    assert result["bits_per_byte"]["value"] == pytest.approx(nats.sum() / np.log(2) / (4 * sizes.sum()))
  assert 0.91 <= held / 400 <= 0.98


@pytest.fixture(scope="module")
def models() -> tuple:
  """Returns this package's model for lm_eval and lm_eval's own model of the embedded checkpoint."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lm_eval", minversion="0.4.9")
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    from imm_jax.scoring.harness import HarnessLM
    folder = str(hub.resolve("tiny"))
    return HarnessLM(folder, dtype="float32", batch_size=4), HFLM(folder, dtype="float32", device="cpu", batch_size=2)


def _instances(kind: str, arguments: list[tuple]) -> list:
  from lm_eval.api.instance import Instance

  return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_an_empty_context_is_the_prefix_token(models: tuple) -> None:
  ours, tokenizer = models[0], load_tokenizer(hub.resolve("tiny"))
  for context in ("", " ", "\n"):
    (result,) = ours.loglikelihood(_instances("loglikelihood", [(context, "Tom has")]), disable_tqdm=True)
    (request,) = encode_continuations(tokenizer, [(context, "Tom has")], rows=1000, positions=None)
    assert request.tokens == (tokenizer.eos_token_id, *tokenizer(context + "Tom has")["input_ids"])
    assert result[0] == pytest.approx(_scorer(hub.resolve("tiny")).score([request], quiet=True)[0].logprob, rel=1e-5)
  with pytest.raises(ValueError, match="and not the first"):
    _scorer(hub.resolve("tiny")).score([Request((1, 2), 0)])


def test_unsupported_settings_are_refused(models: tuple) -> None:
  ours = models[0]
  for settings, message in (({"top_k": 5}, "top_k=5"), ({"repetition_penalty": 1.2}, "repetition_penalty=1.2")):
    with pytest.raises(UserError, match=message):
      ours.generate_until(_instances("generate_until", [("Tom", {"until": [], **settings})]), disable_tqdm=True)
  drawn = {"until": [], "do_sample": True, "temperature": 5.0, "max_gen_toks": 8, "top_k": 0}
  twice = _instances("generate_until", [("Tom has", drawn)] * 2)
  a, b = ours.generate_until(twice, disable_tqdm=True)
  assert a != b  # repeats of a task
  ours._seed = 1
  assert ours.generate_until(twice, disable_tqdm=True) != [a, b]
  ours._seed = 0


@pytest.mark.filterwarnings("ignore")
def test_sentencepiece_equals_lm_eval(tmp_path: Path) -> None:
  """Such tokenizers strip a leading space, also of answers, and add BOS."""
  pytest.importorskip("lm_eval")
  torch = pytest.importorskip("torch")
  import transformers
  from lm_eval.models.huggingface import HFLM
  from tokenizers import Tokenizer, decoders, models as kinds, normalizers, processors

  from imm_jax.scoring.harness import HarnessLM

  words = ["<unk>", "<s>", "</s>", *(f"\u2581{w}" for w in ("Tom", "has", "the", "sum", "of", "it")), "\u2581",
           *"Tomhasteufi"]
  vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
  backend = Tokenizer(kinds.Unigram([(w, -1.0 * len(w)) if i > 2 else (w, 0.0) for w, i in vocabulary.items()], 0))
  backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
  backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
  backend.add_special_tokens(["<unk>", "<s>", "</s>"])
  backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
  transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>",
                                       unk_token="<unk>").save_pretrained(tmp_path)
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
      vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
      num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, initializer_range=0.5))
  model.save_pretrained(tmp_path)
  pair = HarnessLM(str(tmp_path), dtype="float32"), HFLM(str(tmp_path), dtype="float32", device="cpu")
  asked = [(text, {"until": ["@"], "max_gen_toks": 9}) for text in ("Tom has", "the sum of", "it", "Tom")]
  texts = [m.generate_until(_instances("generate_until", asked), disable_tqdm=True) for m in pair]
  assert texts[0] == texts[1]
  scores = [m.loglikelihood(_instances("loglikelihood", [("Tom", " has"), ("the sum", " of it"), ("", "Tom")]),
                            disable_tqdm=True) for m in pair]
  np.testing.assert_allclose([p for p, _ in scores[0]], [p for p, _ in scores[1]], rtol=1e-4)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_scores_both_models_equally(models: tuple) -> None:
  ours, theirs = models
  result, expected = (model.loglikelihood(_instances("loglikelihood", PAIRS), disable_tqdm=True) for model in models)
  np.testing.assert_allclose([p for p, _ in result], [p for p, _ in expected], rtol=1e-4)
  assert [best for _, best in result] == [best for _, best in expected]
  texts = [("Tom has 3 apples and buys 12 more.",), ("What is 12 + 30? " * 60,), ("x",)]
  for model in models:
    model._max_length = 64
  rolling = [model.loglikelihood_rolling(_instances("loglikelihood_rolling", texts), disable_tqdm=True)
             for model in models]
  np.testing.assert_allclose(*rolling, rtol=1e-4)
  asked = [("What is 3 + 4?\n\n### Response: Let's think step by step.\n", {"until": ["\n"], "max_gen_toks": 12}),
           ("Tom has 3 apples and buys 4 more.", {"until": [" is", "."], "max_gen_toks": 20, "do_sample": False}),
           ("What is 12 + 30? " * 30, {"until": [], "max_gen_toks": 5})]  # longer than the context
  texts = [model.generate_until(_instances("generate_until", asked), disable_tqdm=True) for model in models]
  assert texts[0] == texts[1]
  for model in models:
    model.tokenizer.chat_template = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
                                     "{% if add_generation_prompt %}<assistant>{% endif %}")
  assert ours.apply_chat_template([{"role": "user", "content": "Q"}]) == theirs.apply_chat_template(
      [{"role": "user", "content": "Q"}])


if __name__ == "__main__":
  _main(*map(Path, sys.argv[1:]))
