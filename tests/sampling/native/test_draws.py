"""Drawing a token from logits, against numpy."""

import jax
import numpy as np
import pytest

from imm_jax.sampling.native import draws

# Ids 6 and 7 are unknown to the tokenizer, and the most likely.
LOGITS = np.array([1.3, -0.4, 2.1, 0.2, 1.1, -1.5, 4.0, 3.0], np.float32)
NUM_IDS, DRAWS = 6, 20_000


_sample = jax.jit(draws.sample, static_argnames=("top_p", "greedy"))


def _drawn(temperature: float, top_p: float, step: int = 0, *, greedy: bool = False) -> np.ndarray:
  """Draws an id for each of DRAWS rows with equal logits."""
  keys = jax.random.key_data(jax.random.split(jax.random.key(0), DRAWS))
  return np.asarray(_sample(np.tile(LOGITS, (DRAWS, 1)), keys, np.full(DRAWS, step, np.int32),
                            np.full(DRAWS, temperature, np.float32), np.arange(len(LOGITS)) < NUM_IDS, top_p=top_p,
                            greedy=greedy))


def _probabilities(temperature: float, top_p: float) -> np.ndarray:
  """Returns the softmax at a temperature, restricted to the nucleus of mass `top_p`."""
  p = np.exp(LOGITS[:NUM_IDS].astype(np.float64) / temperature)
  p /= p.sum()
  order = np.argsort(-p)
  size = np.searchsorted(np.cumsum(p[order]), top_p) + 1
  nucleus = np.zeros(len(LOGITS))
  nucleus[order[:size]] = p[order[:size]]
  return nucleus / nucleus.sum()


@pytest.mark.parametrize(("temperature", "top_p", "size"), [
    (1.0, 1.0, 6), (0.5, 1.0, 6), (2.0, 1.0, 6), (1.0, 0.9, 4), (1.0, 0.6, 2), (2.0, 0.6, 3), (0.5, 0.6, 1)])
def test_drawn_tokens_follow_softmax_and_nucleus(temperature: float, top_p: float, size: int) -> None:
  expected = DRAWS * _probabilities(temperature, top_p)
  counts = np.bincount(_drawn(temperature, top_p), minlength=len(LOGITS))
  allowed = expected > 0
  assert allowed.sum() == size
  assert counts[~allowed].sum() == 0
  chi_square = ((counts - expected)[allowed]**2 / expected[allowed]).sum()
  freedom = size - 1
  assert chi_square <= freedom + 5 * np.sqrt(2 * freedom)  # five standard deviations


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000, 5000])
def test_draws_invert_the_cdf(size: int) -> None:
  """They never have zero mass."""
  rng = np.random.default_rng(size)
  weights = np.exp(rng.normal(scale=4, size=(64, size))).astype(np.float32)
  weights[rng.random(weights.shape) < 0.3] = 0
  weights[:, rng.integers(size)] = 1
  weights[:8, size // 2:] *= 0
  weights[:8, 0] = 1e-30
  # Includes both ends: zero, and the largest float below one.
  uniform = np.concatenate([np.tile(np.array([0, np.nextafter(np.float32(1), 0)], np.float32), 16), rng.random(32)])
  drawn = np.asarray(jax.jit(draws.draw)(weights, uniform.astype(np.float32)))
  rows = np.arange(64)
  assert (weights[rows, drawn] > 0).all()
  ends = np.cumsum(weights.astype(np.float64), axis=1)
  target, slack = uniform * ends[:, -1], 1e-5 * ends[:, -1]
  assert (target <= ends[rows, drawn] + slack).all()
  assert (target >= ends[rows, drawn] - weights[rows, drawn] - slack).all()


@pytest.mark.parametrize("size", [1, 13, 1000, 1009])
def test_greedy_takes_the_first_maximum(size: int) -> None:
  """It is the first of the most likely allowed ids."""
  rng = np.random.default_rng(size)
  logits = rng.integers(0, 9, (64, size)).astype(np.float32)  # many are equal
  allowed = rng.random(size) < 0.5
  allowed[rng.integers(size)] = True
  keys = jax.random.key_data(jax.random.split(jax.random.key(1), 64))
  best = np.argmax(np.where(allowed, logits, -np.inf), axis=1)
  drawn = lambda temperature, **options: np.asarray(_sample(
      logits, keys, np.zeros(64, np.int32), np.full(64, temperature, np.float32), allowed, **options))
  np.testing.assert_array_equal(drawn(0.0, top_p=1.0, greedy=True), best)
  np.testing.assert_array_equal(drawn(0.0, top_p=1.0, greedy=False), best)
  for top_p in (1.0, 0.5):
    assert allowed[drawn(1.0, top_p=top_p, greedy=False)].all()


def test_large_nucleus_is_found() -> None:
  """It is larger than the first search."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(6, 4 * draws._LIKELIEST)).astype(np.float32) * np.array([[9], [5], [4], [1], [0.1], [9]])
  p = np.exp(logits.astype(np.float64))
  p = -np.sort(-p / p.sum(axis=1, keepdims=True), axis=1)
  least = [np.log(row[np.searchsorted(np.cumsum(row), 0.9)] / row[0]) for row in p]
  sizes = [np.searchsorted(np.cumsum(row), 0.9) for row in p]
  assert min(sizes) < 10
  assert max(sizes) > draws._LIKELIEST
  threshold = lambda rows: np.asarray(jax.jit(draws.nucleus, static_argnums=1)(rows, 0.9)) - rows.max(axis=1)
  np.testing.assert_allclose(threshold(logits), least, rtol=1e-3, atol=1e-4)
  # Rows do not depend on each other.
  np.testing.assert_allclose([threshold(logits[i:i + 1])[0] for i in range(6)], threshold(logits), rtol=1e-6)


def test_each_step_draws_anew() -> None:
  same = np.mean(_drawn(1.0, 1.0) == _drawn(1.0, 1.0, step=1))
  assert same == pytest.approx((_probabilities(1.0, 1.0)**2).sum(), abs=0.02)


@pytest.mark.parametrize("greedy", [True, False])
def test_zero_temperature_is_the_likeliest_id(greedy: bool) -> None:
  """Ids past the tokenizer's are left out."""
  assert set(_drawn(0.0, 0.6, greedy=greedy).tolist()) == {2}


@pytest.mark.parametrize(("vocab", "chips"), [(151936, 4), (152064, 8), (128256, 8), (49152, 8), (32000, 8)])
def test_vocabulary_blocks_divide_over_chips(vocab: int, chips: int) -> None:
  """Otherwise the logits of Qwen2.5 (small, large), Llama 3, SmolLM2 or Llama 2 would be gathered in each step."""
  blocks = jax.eval_shape(draws._blocks, jax.ShapeDtypeStruct((vocab, 2), np.float32))
  assert blocks.shape[0] * blocks.shape[1] == vocab
  assert blocks.shape[0] % chips == 0
  assert max(blocks.shape[:2]) < 20 * vocab**0.5
