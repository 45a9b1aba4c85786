"""Accuracy with Wilson's interval, pass@k, majority vote."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, strategies as st

from imm_jax.statistics.accuracy import compute_accuracy, compute_mean, majority, pass_at_k

Z = 1.959963984540054


# Published: Newcombe, Statistics in Medicine 17 (1998), table I, method 3; and Brown, Cai, DasGupta (2001) for 0 and n.
@pytest.mark.parametrize(("correct", "n", "low", "high"), [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_the_interval_is_the_published_one(correct, n, low, high):
  result = compute_accuracy(correct, n)
  assert result.low == pytest.approx(low, abs=5e-5)
  assert result.high == pytest.approx(high, abs=5e-5)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_ends_solve_the_score_test(pair):
  """The ends of an interval are where it just accepts."""
  correct, n = pair
  result = compute_accuracy(correct, n)
  assert result[:2] == (correct / n, n)
  assert 0 <= result.low <= result.value + 1e-15
  assert result.value - 1e-15 <= result.high <= 1
  assert result.low < result.high
  # Wilson's ends solve |p - q| = z sqrt(q (1 - q) / n) for q.
  for end in (result.low, result.high):
    if 1e-12 < end < 1 - 1e-12:
      assert abs(result.value - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / n), rel=1e-6, abs=1e-9)


@given(st.integers(1, 10**4).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_right_and_wrong_answers_are_treated_alike(pair):
  correct, n = pair
  result, mirrored = compute_accuracy(correct, n), compute_accuracy(n - correct, n)
  assert result.low == pytest.approx(1 - mirrored.high, abs=1e-12)
  assert result.high == pytest.approx(1 - mirrored.low, abs=1e-12)


@pytest.mark.parametrize(("correct", "n"), [(0, 200), (0, 1000), (10, 10), (1319, 1319)])
def test_the_interval_never_leaves_out_the_value(correct, n):
  result = compute_accuracy(correct, n)
  assert result.low <= result.value <= result.high


def test_more_questions_narrow_the_interval():
  widths = [compute_accuracy(n // 2, n) for n in (10, 100, 1000, 10_000)]
  assert [w.high - w.low for w in widths] == sorted((w.high - w.low for w in widths), reverse=True)


def test_none_or_all_right_keeps_an_interval():
  assert compute_accuracy(0, 5).low == 0 < compute_accuracy(0, 5).high
  assert compute_accuracy(5, 5).low < 1 == compute_accuracy(5, 5).high


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (1, 0), (-1, 5), (6, 5), (0, -1), (-1, -1)])
def test_counts_that_cannot_be_are_an_error(correct, n):
  with pytest.raises(ValueError, match=f"{correct} correct of {n}"):
    compute_accuracy(correct, n)


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_at_k_counts_subsets(num_samples):
  """It is the share of subsets with a right sample."""
  for correct, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
    subsets = list(itertools.combinations([i < correct for i in range(num_samples)], k))
    assert pass_at_k(num_samples, correct, k) == sum(map(any, subsets)) / len(subsets)


@pytest.mark.parametrize(("correct", "k"), [(0, 100), (1, 1), (1, 5000), (3, 7), (17, 100), (5000, 1), (9_999, 1)])
def test_pass_at_k_of_ten_thousand_samples_is_exact(correct, k):
  """Against the product 1 - prod (M - c - i) / (M - i), in fractions and rounded once."""
  miss = Fraction(1)
  for i in range(k):
    miss *= Fraction(max(0, 10_000 - correct - i), 10_000 - i)
  assert pass_at_k(10_000, correct, k) == float(1 - miss)


@pytest.mark.parametrize(("num_samples", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5), (0, 0, 1)])
def test_pass_at_k_of_what_cannot_be_is_an_error(num_samples, correct, k):
  with pytest.raises(ValueError, match=f"pass@{k} with {correct} right of {num_samples} samples"):
    pass_at_k(num_samples, correct, k)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=50))
def test_the_mean_of_right_and_wrong_is_the_accuracy(scores):
  assert compute_mean(scores) == compute_accuracy(sum(scores), len(scores))


def test_the_interval_of_a_mean_covers():
  """Scores of questions that are answered with probabilities of their own, as pass@k's are."""
  rng = np.random.default_rng(0)
  inside = 0
  for _ in range(300):
    scores = rng.beta(0.5, 0.8, size=60)
    found = compute_mean(scores.tolist())
    inside += found.low <= 0.5 / 1.3 <= found.high
  assert inside >= 0.95 * 300


@pytest.mark.parametrize("scores", [[], [1.5], [0.5, -0.1], [math.nan]])
def test_scores_outside_are_an_error(scores):
  with pytest.raises(ValueError, match="scores from 0 to 1"):
    compute_mean(scores)


@pytest.mark.parametrize(("answers", "winner"), [
    (["a"], 0), (["a", "b", "b"], 1), (["a", "b"], 0), (["b", "a", "a", "b"], 0), ([None, None, "c"], 2),
    ([None], None), ([], None)])
def test_majority_takes_the_first_of_ties(answers, winner):
  """It is the first of the most common answers."""
  assert majority(answers) == winner
