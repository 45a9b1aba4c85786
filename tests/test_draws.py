"""Drawing a token from logits, against numpy."""

import jax
import numpy as np
import pytest

from imm_jax.sampling.native import decode

# Ids 6 and 7 stand for those past the tokenizer's; they are the likeliest.
LOGITS = np.array([1.3, -0.4, 2.1, 0.2, 1.1, -1.5, 4.0, 3.0], np.float32)
NUM_IDS, DRAWS = 6, 20_000


_sample = jax.jit(decode.sample, static_argnames=("top_p", "greedy"))


def _drawn(temperature: float, top_p: float, step: int = 0, *, greedy: bool = False) -> np.ndarray:
  """The ids that as many rows of equal logits draw."""
  keys = jax.random.key_data(jax.random.split(jax.random.key(0), DRAWS))
  return np.asarray(_sample(np.tile(LOGITS, (DRAWS, 1)), keys, np.full(DRAWS, step, np.int32),
                            np.full(DRAWS, temperature, np.float32), np.arange(len(LOGITS)) < NUM_IDS, top_p=top_p,
                            greedy=greedy))


def _probabilities(temperature: float, top_p: float) -> np.ndarray:
  """Softmax at a temperature, and of that the smallest set of ids with mass `top_p`."""
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
def test_a_draw_is_where_its_share_of_the_mass_ends_and_never_without_mass(size: int) -> None:
  rng = np.random.default_rng(size)
  weights = np.exp(rng.normal(scale=4, size=(64, size))).astype(np.float32)
  weights[rng.random(weights.shape) < 0.3] = 0
  weights[:, rng.integers(size)] = 1
  weights[:8, size // 2:] *= 0
  weights[:8, 0] = 1e-30
  # Both ends too: zero, and the greatest float below one.
  uniform = np.concatenate([np.tile(np.array([0, np.nextafter(np.float32(1), 0)], np.float32), 16), rng.random(32)])
  drawn = np.asarray(jax.jit(decode._draw)(weights, uniform.astype(np.float32)))
  rows = np.arange(64)
  assert (weights[rows, drawn] > 0).all()
  ends = np.cumsum(weights.astype(np.float64), axis=1)
  target, slack = uniform * ends[:, -1], 1e-5 * ends[:, -1]
  assert (target <= ends[rows, drawn] + slack).all()
  assert (target >= ends[rows, drawn] - weights[rows, drawn] - slack).all()
  both = np.stack([uniform, uniform[::-1]], axis=1).astype(np.float32)
  assert (weights[rows, np.asarray(jax.jit(decode._inverse)(weights, both))] > 0).all()


def test_each_token_of_a_sample_is_drawn_afresh() -> None:
  same = np.mean(_drawn(1.0, 1.0) == _drawn(1.0, 1.0, step=1))
  assert same == pytest.approx((_probabilities(1.0, 1.0)**2).sum(), abs=0.02)


@pytest.mark.parametrize("greedy", [True, False])
def test_temperature_0_takes_the_likeliest_id_of_the_tokenizer(greedy: bool) -> None:
  assert set(_drawn(0.0, 0.6, greedy=greedy).tolist()) == {2}
