"""Importance of second order, weight change, diversity and rank correlation, against torch, numpy and hand counts."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from imm_jax.analysis import diversity
from imm_jax.analysis.weight_change import spearman, weight_change
from imm_jax.errors import UserError
from imm_jax.model import hf, safetensors
from tests.analysis.test_importance import BLOCK, entropy, second_order
from tests.training import test_step as t


def test_second_order_equals_torch_per_example(checkpoint):
  model, folder = checkpoint("qwen2-tied")
  config, params = hf.load(folder, place=lambda *_: t.replicated())
  examples = t.make_examples(12)
  tokens = sum(len(e.response) for e in examples)
  weights = {name: [getattr(getattr(layer, block), name).weight for layer in model.model.layers]
             for name, block in BLOCK.items()}
  first = {name: [0.0] * config.num_layers for name in BLOCK}
  second = {name: [0.0] * config.num_layers for name in BLOCK}
  for example in examples:
    model.zero_grad()
    (t.torch_loss(model, [example]) * len(example.response)).backward()  # the sum of its tokens
    for name, of_layers in weights.items():
      for n, w in enumerate(of_layers):
        change = w.grad.double() * w.double()
        first[name][n] += change
        second[name][n] += change**2
  got = second_order(config, params, t.pack(examples, global_batch=5))
  for name in BLOCK:
    want = [(a - b / 2).abs().sum().item() / tokens for a, b in zip(first[name], second[name], strict=True)]
    np.testing.assert_allclose(got.modules[name], want, rtol=1e-4, err_msg=name)
  # Both terms count.
  ratio = sum(b.sum().item() / 2 for of in second.values() for b in of) / sum(
      a.abs().sum().item() for of in first.values() for a in of)
  assert 0.1 < ratio < 10


def test_one_by_one_steps_each_example():
  """With one example at a time, each takes a step of its own."""
  examples = t.make_examples(9)
  batches = t.pack(examples, global_batch=4, row_multiple=3).to_single_examples(2)
  assert (len(batches), batches.rows) == (9, 2)
  assert sorted(i for step in range(9) for i in batches.members(step)) == list(range(9))
  assert all(len(list(t.segments(batches[step]))) == 1 for step in range(9))


def test_entropy_equals_that_of_torch(checkpoint):
  torch = pytest.importorskip("torch")
  model, folder = checkpoint("llama")
  config, params = hf.load(folder, place=lambda *_: t.replicated())
  examples = t.make_examples(15)
  total = 0.0
  for e in examples:
    with torch.no_grad():
      logits = model(input_ids=torch.tensor([e.prompt + e.response])).logits[0, len(e.prompt) - 1:-1].double()
    total += torch.distributions.Categorical(logits=logits).entropy().sum().item()
  want = total / sum(len(e.response) for e in examples)
  assert 0.5 < want < np.log(61)
  for size in (4, 15):
    assert entropy(config, params, t.pack(examples, global_batch=size)) == pytest.approx(want, rel=1e-5)


def _write(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
  folder.mkdir()
  safetensors.write(folder / "model.safetensors", [
      (name, x.dtype, x.shape, lambda x=x: [x]) for name, x in tensors.items()])
  (folder / "config.json").write_text("{}")
  return folder


def _tensors(seed: int, layers: int = 3, vocab: int = 7, dtype: object = np.float32) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  shapes = {f"model.layers.{n}.{block}.{name}.weight": (5 + i, 11) for n in range(layers)
            for i, (name, block) in enumerate(BLOCK.items())}
  shapes |= {"model.embed_tokens.weight": (vocab, 11), "model.layers.0.self_attn.q_proj.bias": (5,),
             "model.layers.1.input_layernorm.weight": (11,)}
  return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def test_weight_change_equals_numpy(tmp_path: Path):
  """Also of another dtype and another vocabulary: embeddings, biases and norms do not count."""
  a, b = _tensors(0), _tensors(1, vocab=9, dtype=ml_dtypes.bfloat16)
  got = weight_change(_write(tmp_path / "a", a), _write(tmp_path / "b", b))
  for i, (name, block) in enumerate(BLOCK.items()):
    want = [np.linalg.norm(a[k].astype(np.float64) - b[k].astype(np.float64)) for k in (
        f"model.layers.{n}.{block}.{name}.weight" for n in range(3))]
    np.testing.assert_allclose(got.modules[name], want, rtol=1e-14)
    assert list(got.modules)[i] == name
  np.testing.assert_allclose(got.total, sum(got.modules.values()))
  np.testing.assert_allclose(got.share, got.total / got.total.sum())
  same = weight_change(tmp_path / "a", tmp_path / "a")
  assert not same.total.any()
  assert not same.share.any()


def test_tiny_changes_are_not_rounded_away(tmp_path: Path):
  """Changes of large weights that float32 differences would lose."""
  a = _tensors(0)
  b = {name: np.nextafter(x, np.float32(np.inf)) for name, x in a.items()}
  got = weight_change(_write(tmp_path / "a", a), _write(tmp_path / "b", b))
  want = sum(np.linalg.norm(b[name].astype(np.float64) - a[name]) for name in a if "layers.2." in name)
  assert got.total[2] == pytest.approx(want, rel=1e-14)


def test_incomparable_checkpoints_are_refused(tmp_path: Path):
  """The message is one line."""
  a = _write(tmp_path / "a", _tensors(0))
  other = _tensors(0)
  other["model.layers.1.mlp.up_proj.weight"] = other["model.layers.1.mlp.up_proj.weight"][:-1]
  nan = _tensors(0)
  nan["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
  fused = {name.replace("q_proj", "qkv_proj"): x for name, x in _tensors(0).items()}
  for name, tensors, expected in (
      ("deep", _tensors(0, layers=4), r"after has model\.layers\.3\S+q_proj"), ("nan", nan, "layer 1 has weights that"),
      ("wide", other, r"up_proj.weight has shape \(10, 11\) in before, \(9, 11\) in after")):
    with pytest.raises(UserError, match=expected) as caught:
      weight_change(a, _write(tmp_path / name, tensors))
    assert "\n" not in str(caught.value)
  _write(tmp_path / "fused", fused)
  with pytest.raises(UserError, match=r"layer 0 has no q_proj\.weight; expected a checkpoint of"):
    weight_change(tmp_path / "fused", tmp_path / "fused")
  with pytest.raises(UserError, match="no such checkpoint folder"):
    weight_change(a, tmp_path / "none")


def _row(question: str, text: str, span: str, kind: str = "number") -> dict[str, str]:
  return {"id": question, "text": text, "span": span, "kind": kind}


def test_diversity_by_hand():
  rows = [_row("a", "one two three four five", "7"), _row("a", "one two three four six", "7.0"),
          _row("a", "no answer", ""), _row("b", "x y z w", "A", "choice"), _row("b", "x y z w", "B", "choice"),
          _row("c", "short", "")]
  found = diversity.measure_diversity(rows)
  assert (found.questions, found.samples) == (3, 6)
  assert found.distinct_answers == pytest.approx((1 + 2 + 0) / 3)
  # a: (one two three four) twice, and two others; b: the same one twice; c has none.
  assert found.distinct_4grams == pytest.approx((3 / 4 + 1 / 2) / 2)
  assert diversity.measure_diversity([_row("a", "short", "1")]).distinct_4grams is None


def test_spearman_is_that_of_ranks_with_ties():
  rng = np.random.default_rng(0)
  a, b = rng.permutation(20), rng.permutation(20)
  assert spearman(a, b) == pytest.approx(1 - 6 * ((a - b)**2).sum() / (20 * (20**2 - 1)))
  assert spearman(np.exp(a), b) == spearman(a, b)
  # Ranks by hand: (1, 2.5, 2.5, 4) and (1, 2, 3, 4).
  assert spearman([0, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
  assert spearman([], []) is None
  assert spearman([1], [2]) is None

