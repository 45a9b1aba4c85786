"""Tests whether the difference between two models that answered the same questions is significant: paired statistics.

Models find the same questions hard, so the noise from the choice of questions is common to both. A comparison question
by question therefore detects differences that two separate confidence intervals hide.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.05  # a difference is called real if its corrected p-value is below
RESAMPLES = 10_000
_SEED = 0
_CHUNK = 4_000_000  # random draws that are in memory at a time


class Paired(NamedTuple):
  """Holds the scores of two models on the same questions, and their difference.

  Attributes:
    first: mean score of the first model.
    second: mean score of the second model.
    value: the difference, first - second.
    n: number of questions.
    low: lower end of the difference's 95 % interval.
    high: upper end of that interval.
    wins: number of questions that only the first model has right; None for scores that are not 0 or 1.
    losses: number of questions that only the second model has right; None likewise.
    p: two-sided p-value of the hypothesis that neither model is better.
  """

  first: float
  second: float
  value: float
  n: int
  low: float
  high: float
  wins: int | None
  losses: int | None
  p: float


def compare_paired(first: ArrayLike, second: ArrayLike, weights: ArrayLike | None = None) -> Paired:
  """Compares the scores of two models, question by question.

  The interval is the percentile interval of the paired bootstrap (B. Efron and R. Tibshirani, "An Introduction to the
  Bootstrap", 1993, chapter 13) from 10,000 resamples of the questions, drawn with a fixed seed. If the difference is
  the same on all questions, so it is in every resample. The interval of 0/1 scores then allows for outcomes that were
  not observed: none in n questions means that their probability is at most 1 - 0.05^(1/n) (J. Hanley and A.
  Lippman-Hand, "If nothing goes wrong, is everything all right?", JAMA 249, 1983).

  The p-value of 0/1 scores is McNemar's (`mcnemar`). For other scores it is that of the randomization test, which swaps
  the models on a subset of the questions (E. Noreen, "Computer-Intensive Methods for Testing Hypotheses", 1989): on
  each subset of up to 13 questions; of more questions on 10,000 random subsets and the observed one (B. Phipson and
  G. Smyth, "Permutation P-values Should Never Be Zero", 2010), hence it is at least 0.0001.

  Args:
    first: [n] scores of the first model, such as 0 and 1, or nats per token.
    second: [n] scores of the second model on the same questions in the same order.
    weights: [n] weights of the questions in both means, such as numbers of tokens if scores are rates; by default 1.

  Raises:
    ValueError: when there is no question, lengths differ, a number is not finite, or a weight is not positive.

  >>> result = compare_paired([1, 1, 1, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0])
  >>> result.value, result.wins, result.losses, result.p
  (0.625, 5, 0, 0.03125)
  """
  a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
  w = np.ones(a.shape) if weights is None else np.asarray(weights, np.float64)
  if not (a.ndim == 1 and a.size and a.shape == b.shape == w.shape):
    raise ValueError(f"expected as many scores of both, one or more, and as many weights: {a.shape}, {b.shape}, "
                     f"{w.shape}")
  if not (np.isfinite([a, b, w]).all() and (w > 0).all()):
    raise ValueError("expected finite scores and positive weights")
  n, means = a.size, (float(np.average(a, weights=w)), float(np.average(b, weights=w)))
  if weights is None and np.isin([a, b], (0, 1)).all():
    wins, losses = int((a > b).sum()), int((a < b).sum())
    return Paired(*means, (wins - losses) / n, n, *_multinomial_interval(wins, losses, n), wins, losses,
                  mcnemar(wins, losses))
  change = a - b
  value = float(np.average(change, weights=w))
  return Paired(*means, value, n, *_bootstrap_interval(change, w), None, None, _randomization_p(change * w))


@functools.lru_cache(maxsize=4096)  # the report of a run in progress computes the same ones after each stage
def _multinomial_interval(wins: int, losses: int, n: int) -> tuple[float, float]:
  """Returns the bootstrap interval of 0/1 scores, where the counts of a resample are a draw of the multinomial."""
  ties = n - wins - losses
  if n in (wins, losses, ties):
    value, unseen = (wins - losses) / n, 1 - LEVEL**(1 / n)
    return value - unseen * (value + 1), value + unseen * (1 - value)
  counts = np.random.default_rng(_SEED).multinomial(n, np.array([wins, losses, ties]) / n, size=RESAMPLES)
  return _percentile_interval((counts[:, 0] - counts[:, 1]) / n)


def _bootstrap_interval(change: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
  rng, weighted, means = np.random.default_rng(_SEED), change * weights, []
  for count in _chunk_sizes(change.size):
    index = rng.integers(change.size, size=(count, change.size))
    means.append(weighted[index].sum(1) / weights[index].sum(1))
  return _percentile_interval(np.concatenate(means))


def _percentile_interval(values: np.ndarray) -> tuple[float, float]:
  low, high = np.quantile(values, (LEVEL / 2, 1 - LEVEL / 2))
  return float(low), float(high)


def _randomization_p(change: np.ndarray) -> float:
  """Returns the share of swaps of the models' scores, all or random ones, whose sum of differences is as far from 0."""
  rng, total, extreme = np.random.default_rng(_SEED), change.sum(), 1
  threshold = abs(total) - 1e-12 * np.abs(change).sum()  # equal sums may differ by rounding
  if 2**change.size <= RESAMPLES:
    unswapped = np.indices((2,) * change.size).reshape(change.size, -1)
    return float((np.abs(2 * (change @ unswapped) - total) >= threshold).mean())
  for count in _chunk_sizes(change.size):
    unswapped = rng.integers(2, size=(count, change.size), dtype=np.int8).astype(np.float64)
    extreme += int((np.abs(2 * (unswapped @ change) - total) >= threshold).sum())
  return extreme / (RESAMPLES + 1)


def _chunk_sizes(n: int) -> list[int]:
  """Returns how many resamples of n questions each chunk draws."""
  size = max(1, _CHUNK // n)
  return [min(size, RESAMPLES - start) for start in range(0, RESAMPLES, size)]


@functools.lru_cache(maxsize=4096)
def mcnemar(wins: int, losses: int) -> float:
  """Returns the p-value of McNemar's test, two-sided, mid-p: whether two models are equally good.

  If they are, a question that only one model has right is either model's with probability 1/2, so that the smaller of
  the two counts follows the binomial distribution (Q. McNemar, Psychometrika 12, 1947). The mid-p value counts the
  probability of the observed count half. M. Fagerland, S. Lydersen and P. Laake, "The McNemar test for binary
  matched-pairs data: mid-p and asymptotic are better than exact conditional", BMC Medical Research Methodology 13:91
  (2013), recommend it for any number of questions: the exact conditional test is conservative, and this one kept its
  level in all 9595 cases that they computed. It is computed in integers and rounded once.

  Args:
    wins: number of questions that only the first model has right.
    losses: number of questions that only the second model has right.

  Raises:
    ValueError: when a count is negative.

  >>> round(mcnemar(1, 7), 3)  # the example of their table 1
  0.039
  """
  if min(wins, losses) < 0:
    raise ValueError(f"{wins} and {losses} questions: expected counts")
  n, smaller = wins + losses, min(wins, losses)
  term, below = 1, 0  # C(n, k), and the sum of the previous ones
  for k in range(smaller):
    below += term
    term = term * (n - k) // (k + 1)
  return (2 * below + term) / 2**n


def holm(ps: Sequence[float]) -> list[float]:
  """Corrects the p-values of several tests by Holm's method.

  If the differences with a corrected p-value below 0.05 are called real, the probability that any of them is not is at
  most 5 %, however the tests depend on each other (S. Holm, "A simple sequentially rejective multiple test procedure",
  Scandinavian Journal of Statistics 6, 1979).

  Args:
    ps: the p-values.

  Returns:
    The corrected p-values, in the same order.

  >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
  [0.03, 0.06, 0.06]
  """
  corrected, highest = [0.0] * len(ps), 0.0
  for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
    highest = corrected[i] = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
  return corrected


def is_significant(p: float) -> bool:
  """Returns whether a difference with this corrected p-value is called real."""
  return p < LEVEL

