"""What `--verify` finds, and what it lets pass."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from imm_jax.errors import UserError
from imm_jax.model import hf, hub, rope, safetensors, verification

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", ["qwen2-tied", "qwen3", "llama3.1", "granite"])
def test_every_kind_passes(checkpoint, kind: str) -> None:
  stored = {"qwen2-tied": torch.bfloat16, "qwen3": torch.float16}.get(kind)  # read exactly
  _, source = checkpoint(kind, dtype=stored, max_position_embeddings=2048)
  found = verification.compare_logits(source)
  assert [c.kind for c in found] == ["random tokens from position 0", "random tokens over a context of 2048"]
  for c in found:
    assert c.passes, c
    assert 1e-8 < c.torch_error < 1e-5  # float32's rounding
    assert c.kl < 1e-9
    assert c.agreement == 1


def test_the_reference_is_float64_in_every_operation(checkpoint) -> None:
  """Norms as well, which transformers computes in float32 whatever the model is."""
  model, source = checkpoint("llama3", num_hidden_layers=1, hidden_size=8, num_attention_heads=2,
                             num_key_value_heads=1, intermediate_size=12)
  config = hf.read_config(source)
  rows = verification._make_rows(source, config)[0]
  w = {name: p.detach().numpy().astype(np.float64) for name, p in model.named_parameters()}
  layer = lambda name: w[f"model.layers.0.{name}.weight"]
  norm = lambda x, weight: weight * x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5)
  heads = lambda x: x.reshape(*x.shape[:2], -1, 4).swapaxes(1, 2)
  x = w["model.embed_tokens.weight"][rows.tokens]
  y = norm(x, layer("input_layernorm"))
  q, k, v = (heads(y @ layer(f"self_attn.{n}_proj").T) for n in "qkv")
  # Angles, cosines and sines are float32 in transformers.
  angles = torch.from_numpy(rows.positions[:, None, :, None].astype(np.float32) * np.tile(
      rope.frequencies(config.rope_theta, config.rope_scaling, config.head_dim), 2))
  cos, sin = angles.cos().numpy(), angles.sin().numpy()
  q, k = (z * cos + np.concatenate([-z[..., 2:], z[..., :2]], -1) * sin for z in (q, k))
  scores = np.where(np.tri(64, dtype=bool), q @ k.swapaxes(2, 3) / 2, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  x += (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(y.shape) @ layer("self_attn.o_proj").T
  y = norm(x, layer("post_attention_layernorm"))
  gate = y @ layer("mlp.gate_proj").T
  x += (gate / (1 + np.exp(-gate)) * (y @ layer("mlp.up_proj").T)) @ layer("mlp.down_proj").T
  expected = norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T
  found = verification._load_torch(source)(rows, None)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * np.abs(expected).max())


def _swap_norms(params):
  layers = params["layers"]
  names = ["input_layernorm", "post_attention_layernorm"]
  return {**params, "layers": layers | dict(zip(names, (layers[n] for n in reversed(names)), strict=True))}


def _perturb(params):
  """One entry of one matrix, by a hundredth."""
  up = params["layers"]["mlp"]["up_proj"]["weight"]
  mlp = params["layers"]["mlp"] | {"up_proj": {"weight": up.at[0, 0, 0].mul(1.01)}}
  return {**params, "layers": params["layers"] | {"mlp": mlp}}


@pytest.mark.parametrize(("config", "params"), [
    ({"rope_theta": 1e4}, None),  # what ports get wrong most
    ({"rms_norm_eps": 1e-6}, None),
    ({}, _swap_norms),
    ({}, _perturb),
], ids=["theta", "eps", "norms", "weight"])
def test_arithmetic_that_differs_is_found(checkpoint, monkeypatch: pytest.MonkeyPatch, config, params) -> None:
  _, source = checkpoint("llama3")
  load = hf.load

  def wrong(*args, **kwargs):
    right, tree = load(*args, **kwargs)
    return dataclasses.replace(right, **config), params(tree) if params else tree

  monkeypatch.setattr(hf, "load", wrong)
  with pytest.raises(UserError, match=r"logits differ from transformers' by .* expected at most 4 times"):
    verification.verify(source)


def test_logits_that_are_no_numbers_do_not_pass(checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
  _, source = checkpoint("llama3")
  load = hf.load
  monkeypatch.setattr(hf, "load", lambda *a, **k: (lambda c, p: (c, jax.tree.map(lambda x: x * np.nan, p)))(
      *load(*a, **k)))
  with pytest.raises(UserError, match="logits differ from transformers' by nan"):
    verification.verify(source)


def test_late_errors_are_found(checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
  """Frequencies of which every other one is off by a unit in the last place."""
  _, source = checkpoint("llama3", head_dim=64, max_position_embeddings=131_072)
  assert all(c.passes for c in verification.compare_logits(source))
  exact = rope.frequencies
  monkeypatch.setattr(rope, "frequencies", lambda *given: np.where(
      np.arange(32) % 2, np.nextafter(exact(*given), np.float32(2)), exact(*given)))
  early, late = verification.compare_logits(source)
  assert early.passes
  assert not late.passes
  assert late.error > 10 * early.error


def test_a_model_with_a_tokenizer_is_given_text(capsys: pytest.CaptureFixture[str]) -> None:
  verification.verify(hub.resolve("tiny"))
  out = capsys.readouterr().out
  for line in (f"for {len(verification.TEXTS)} texts", "  text from position 0: ", "  text over a context of ",
               "  random tokens from position 0: ", "(transformers in float32: ",
               "sampling and training do not"):
    assert line in out


def test_derived_tensors_are_left_out(checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
  """Tensors that follow from the others are named as left out."""
  _, source = checkpoint("qwen2-tied")
  tensors = {name: np.array(x) for name, x in safetensors.read(source / "model.safetensors").items()}
  tensors["model.rotary_emb.inv_freq"] = np.ones(6, np.float32)
  safetensors.write(source / "model.safetensors", [(n, x.dtype, x.shape, lambda x=x: [x]) for n, x in tensors.items()])
  verification.verify(source)
  out = capsys.readouterr().out
  assert "not written, since they follow from the rest: model.rotary_emb.inv_freq" in out
  assert "no tokenizer next to the weights" in out


def test_too_large_tokenizer_is_found(checkpoint, tmp_path: Path) -> None:
  """It has more ids than the embedding has rows."""
  _, source = checkpoint("llama2")
  folder = shutil.copytree(source, tmp_path / "copy")
  rows = hf.read_config(folder).vocab_size
  vocab = {"<end>": 0, **{f"w{i}": i for i in range(1, rows + 1)}}
  (folder / "tokenizer.json").write_text(json.dumps({
      "version": "1.0", "added_tokens": [{"id": 0, "content": "<end>", "special": True, "single_word": False,
                                          "lstrip": False, "rstrip": False, "normalized": False}],
      "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w1"}}))
  (folder / "tokenizer_config.json").write_text(
      json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}))
  with pytest.raises(UserError, match=f"ids up to {rows}, the embedding only {rows} rows"):
    verification.verify(folder)
