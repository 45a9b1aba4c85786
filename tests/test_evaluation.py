"""Accuracy and Wilson's interval."""

import math

import pytest
from hypothesis import given, strategies as st

from imm_jax.evaluation import accuracy

Z = 1.959963984540054


# Published: Newcombe, Statistics in Medicine 17 (1998), table I, method 3; and Brown, Cai, DasGupta (2001) for 0 and n.
@pytest.mark.parametrize(("correct", "n", "low", "high"), [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_the_interval_is_the_published_one(correct, n, low, high):
  result = accuracy(correct, n)
  assert result.low == pytest.approx(low, abs=5e-5)
  assert result.high == pytest.approx(high, abs=5e-5)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_are_where_the_score_test_just_accepts(pair):
  correct, n = pair
  result = accuracy(correct, n)
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
  result, mirrored = accuracy(correct, n), accuracy(n - correct, n)
  assert result.low == pytest.approx(1 - mirrored.high, abs=1e-12)
  assert result.high == pytest.approx(1 - mirrored.low, abs=1e-12)


@pytest.mark.parametrize(("correct", "n"), [(0, 200), (0, 1000), (10, 10), (1319, 1319)])
def test_the_interval_never_leaves_out_the_value(correct, n):
  result = accuracy(correct, n)
  assert result.low <= result.value <= result.high


def test_more_questions_narrow_the_interval():
  widths = [accuracy(n // 2, n) for n in (10, 100, 1000, 10_000)]
  assert [w.high - w.low for w in widths] == sorted((w.high - w.low for w in widths), reverse=True)


def test_none_or_all_right_keeps_an_interval():
  assert accuracy(0, 5).low == 0 < accuracy(0, 5).high
  assert accuracy(5, 5).low < 1 == accuracy(5, 5).high


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (1, 0), (-1, 5), (6, 5), (0, -1), (-1, -1)])
def test_counts_that_cannot_be_are_an_error(correct, n):
  with pytest.raises(ValueError, match=f"{correct} correct of {n}"):
    accuracy(correct, n)
