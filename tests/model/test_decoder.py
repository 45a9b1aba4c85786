"""The decoder against transformers' torch models, in float32."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imm_jax.aot.costs import count_flops
from imm_jax.model import hf
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import REMAT, Params, abstract_params, bind
from imm_jax.model.products import dot, pairwise_sums
from imm_jax.training.step import token_losses

torch = pytest.importorskip("torch")

KINDS = ("qwen2-tied", "qwen2-untied", "llama", "llama3", "llama3.1", "llama-biased", "mistral", "granite", "qwen3",
         "qwen3-yarn")
# That of the qwen2-tied checkpoint, so that tests share compiled functions.
CONFIG = ModelConfig(vocab_size=61, hidden_size=48, intermediate_size=80, num_layers=2, num_heads=4, num_kv_heads=2,
                     head_dim=12, rope_theta=100.0, rms_norm_eps=1e-5, tie_embeddings=True, qkv_bias=True,
                     max_positions=64)


@functools.partial(jax.jit, static_argnames=("config", "remat"))
def _logits(config: ModelConfig, params: Params, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array,
            remat: str = "none") -> jax.Array:
  return bind(config, params)(tokens, positions=positions, segment_ids=segment_ids, compute_dtype=jnp.float32,
                              remat=remat)


@functools.partial(jax.jit, static_argnames=("config", "remat"))
def _gradients(config: ModelConfig, params: Params, batch: dict[str, jax.Array], remat: str = "none") -> Params:
  def loss(params: Params) -> jax.Array:
    total, numbers = token_losses(config, params, batch, compute_dtype=jnp.float32, remat=remat)
    return total / numbers["tokens"]

  return jax.grad(loss)(params)


def _plain_rows(tokens: np.ndarray) -> dict[str, np.ndarray]:
  """One segment a row, every token but the first learned."""
  return {"tokens": tokens, "positions": np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape),
          "segment_ids": np.ones_like(tokens), "weights": np.ones(tokens.shape, np.float32)}


def _tokens(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 61, shape, np.int32)


def _by_name(tree: Params) -> dict[str, np.ndarray]:
  """The tree's tensors under their checkpoint names."""
  result = {}
  names = jax.tree.leaves(hf.tensor_names(tree), is_leaf=lambda x: isinstance(x, tuple))
  for leaf, name in zip(jax.tree.leaves(tree), names, strict=True):
    result.update({name: np.asarray(leaf)} if isinstance(name, str) else dict(zip(name, np.asarray(leaf), strict=True)))
  return result


def _scale_error(got: np.ndarray, want: np.ndarray) -> float:
  assert got.shape == want.shape
  return float(np.abs(got - want).max() / np.abs(want).max())


def _random_params(config: ModelConfig) -> Params:
  """All tensors random, so that none (biases, norms) is neutral."""
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(np.float32), abstract_params(config))


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_old_configs_give_transformers_logits(checkpoint, kind: str) -> None:
  """The config has the form of older versions of transformers."""
  model, folder = checkpoint(kind, old_rope_key=True)
  assert "rope_theta" in json.loads((folder / "config.json").read_text())
  tokens = _tokens(3, 17)
  with torch.no_grad():
    want = model(torch.from_numpy(tokens).long()).logits.numpy()
  rows = _plain_rows(tokens)
  got = _logits(*hf.load(folder), rows["tokens"], rows["positions"], rows["segment_ids"])
  assert got.dtype == jnp.float32
  assert _scale_error(np.asarray(got), want) < 2e-5


@pytest.mark.full
@pytest.mark.parametrize("kind", ["qwen2.5-math", "llama3", "llama3.1", "llama-biased", "qwen3-yarn"])
def test_late_logits_equal_transformers(checkpoint, kind: str) -> None:
  """A last bit that is wrong in a rotary frequency grows with the position."""
  model, folder = checkpoint(kind, num_attention_heads=1, num_key_value_heads=1, head_dim=64)
  tokens = _tokens(1, 4096)
  with torch.no_grad():
    want = model(torch.from_numpy(tokens).long()).logits.numpy()
  rows = _plain_rows(tokens)
  got = _logits(*hf.load(folder), rows["tokens"], rows["positions"], rows["segment_ids"])
  assert _scale_error(np.asarray(got), want) < 2e-5


@pytest.mark.full
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind in ("llama3.1", "granite") else pytest.mark.full)
                                  for kind in KINDS])
def test_long_packed_rows_equal_transformers(checkpoint, kind: str) -> None:
  """Two segments and padding in a row, logits and gradients; the first goes on where the original context ends."""
  model, folder = checkpoint(kind)
  lengths = (100, 41)
  assert lengths[0] > model.config.max_position_embeddings
  tokens, row = _tokens(sum(lengths)), np.zeros((1, 160), np.int32)
  batch = {"tokens": row, "positions": row.copy(), "segment_ids": row.copy(), "weights": np.zeros((1, 160), np.float32)}
  total, wanted, begin = 0.0, [], 0
  for i, length in enumerate(lengths):
    part = slice(begin, begin + length)
    batch["tokens"][0, part], batch["positions"][0, part] = tokens[part], np.arange(length)
    batch["segment_ids"][0, part] = i + 1
    batch["weights"][0, begin + 1:begin + length] = 1
    ids = torch.from_numpy(tokens[part]).long()[None]
    logits = model(ids).logits
    total += torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
    wanted.append(logits.detach().numpy()[0])
    begin += length
  (total / (sum(lengths) - len(lengths))).backward()
  config, params = hf.load(folder)
  got = np.asarray(_logits(config, params, batch["tokens"], batch["positions"], batch["segment_ids"]))
  assert _scale_error(got[0, :begin], np.concatenate(wanted)) < 2e-5
  gradients = _by_name(_gradients(config, params, batch))
  assert gradients.keys() == {name for name, _ in model.named_parameters()}
  errors = {name: _scale_error(gradients[name], p.grad.numpy()) for name, p in model.named_parameters()}
  assert max(errors.values()) < 1e-4, errors


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_errs_no_more_than_torch(checkpoint, kind: str) -> None:
  model, folder = checkpoint(kind)
  tokens = _tokens(3, 17)
  config, params = hf.load(folder)
  rows = _plain_rows(tokens)
  with torch.no_grad():
    want = model(torch.from_numpy(tokens).long()).logits.numpy()
    torch_error = _scale_error(model.bfloat16()(torch.from_numpy(tokens).long()).logits.float().numpy(), want)
  got = jax.jit(lambda p: bind(config, p)(rows["tokens"], positions=rows["positions"], segment_ids=rows["segment_ids"],
                                          compute_dtype=jnp.bfloat16))(params)
  assert _scale_error(np.asarray(got), want) < 1.5 * torch_error + 1e-3


@pytest.mark.full
def test_bfloat16_gradients_match_autocast(checkpoint) -> None:
  """They err no more than those of torch's autocast."""
  model, folder = checkpoint("llama", num_hidden_layers=8)
  tokens = torch.from_numpy(_tokens(4, 40)).long()

  def flat(by_name: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([by_name[name].ravel() for name, _ in model.named_parameters()]).astype(np.float64)

  def gradients(autocast: bool) -> np.ndarray:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
      logits = model(tokens).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return flat({name: p.grad.numpy() for name, p in model.named_parameters()})

  exact = gradients(False)
  away = lambda g: 1 - g @ exact / np.sqrt((g @ g) * (exact @ exact))
  config, params = hf.load(folder)
  batch = _plain_rows(tokens.numpy().astype(np.int32))
  loss = lambda p: token_losses(config, p, batch, compute_dtype=jnp.bfloat16)[0]
  assert 0 < away(flat(_by_name(jax.jit(jax.grad(loss))(params)))) < 1.5 * away(gradients(True))


def test_packed_examples_equal_lone_ones() -> None:
  """Packed examples get the logits that they get alone."""
  params = _random_params(CONFIG)
  ends, alone = (5, 12, 15), _plain_rows(np.zeros((3, 17), np.int32))
  packed = {k: v.copy() for k, v in _plain_rows(_tokens(3, 17)).items()}
  packed["segment_ids"][0] = 0  # what stays so is padding
  for i, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
    packed["segment_ids"][0, begin:end] = i + 1
    packed["positions"][0, begin:end] = np.arange(end - begin)
    alone["tokens"][i, :end - begin] = packed["tokens"][0, begin:end]
    alone["segment_ids"][i, end - begin:] = 0
  run = lambda rows: np.asarray(_logits(CONFIG, params, rows["tokens"], rows["positions"], rows["segment_ids"]))
  got, want = run(packed), run(alone)
  for i, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
    assert _scale_error(got[0, begin:end], want[i, :end - begin]) < 1e-5


def test_a_token_sees_no_later_token() -> None:
  params = _random_params(CONFIG)
  rows = _plain_rows(_tokens(3, 17))
  changed = rows["tokens"].copy()
  changed[:, 5] = (changed[:, 5] + 1) % 61
  before = np.asarray(_logits(CONFIG, params, rows["tokens"], rows["positions"], rows["segment_ids"]))
  after = np.asarray(_logits(CONFIG, params, changed, rows["positions"], rows["segment_ids"]))
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  assert (np.abs(before - after)[:, 5:].max(axis=-1) > 1e-3).all()


@pytest.mark.full
def test_remat_keeps_the_gradients() -> None:
  """It recomputes."""
  params = _random_params(CONFIG)
  batch = _plain_rows(_tokens(3, 17))
  plain = _gradients(CONFIG, params, batch)
  for policy in ("dots", "attention", "full"):
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(_gradients(CONFIG, params, batch, policy)), strict=True):
      assert _scale_error(np.asarray(b), np.asarray(a)) < 1e-5
  cost = {policy: count_flops(jax.make_jaxpr(lambda p, r=policy: _gradients(CONFIG, p, batch, r))(params))
          for policy in REMAT}
  assert cost["none"] < cost["dots"] < cost["full"]
  assert cost["none"] < cost["attention"] < cost["full"]


@pytest.mark.full
def test_gradients_stay_float32() -> None:
  """Gradients of float32 weights are not rounded to the compute dtype."""
  params, batch = _random_params(CONFIG), _plain_rows(_tokens(3, 17))
  loss = lambda p: token_losses(CONFIG, p, batch, compute_dtype=jnp.bfloat16)[0]
  for path, grad in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params)):
    assert grad.dtype == jnp.float32
    if grad.ndim == 3:
      assert (np.asarray(grad) != np.asarray(grad.astype(jnp.bfloat16), np.float32)).mean() > 0.9, path


def test_short_sums_err_no_more_than_torch_does() -> None:
  rng = np.random.default_rng(0)
  x, weight = rng.normal(size=(4, 32, 3000)).astype(np.float32), rng.normal(size=(40, 3000)).astype(np.float32)
  exact = x.astype(np.float64) @ weight.T.astype(np.float64)
  error = lambda got: np.sqrt(np.mean((np.asarray(got) - exact)**2))
  with pairwise_sums():
    got = jax.jit(lambda x, weight: dot(x, weight))(x, weight)
  torch_error = error(torch.nn.functional.linear(torch.from_numpy(x), torch.from_numpy(weight)).numpy())
  assert error(got) < 1.5 * torch_error
  assert error(jax.jit(dot)(x, weight)) < 1e-5 * np.abs(exact).max()
