"""Whether a difference between two models that answered the same questions is real: the paired statistics.

Two models find the same questions hard, so the noise of which questions were asked is common to both, and a comparison
question by question sees differences that two separate intervals hide.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.05  # p below it is called real, once it is corrected
RESAMPLES = 10_000
_SEED = 0
_CHUNK = 4_000_000  # draws that are held at a time


class Paired(NamedTuple):
  """Two models on the same questions.

  Attributes:
    first: mean score of the first.
    second: of the second.
    value: first - second.
    n: number of questions.
    low: lower end of the difference's 95 % interval.
    high: upper end.
    wins: questions that the first alone has right; None for scores that are not 0 or 1.
    losses: questions that the second alone has right; likewise.
    p: of the hypothesis that neither is better, two-sided.
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
  Bootstrap", 1993, chapter 13) from 10,000 resamples of the questions; the same scores give the same interval. Where
  all questions have one and the same difference every resample has it, too. The interval of 0/1 scores then allows for
  other outcomes: none in n says that their probability is 1 - 0.05^(1/n) at most (J. Hanley and A. Lippman-Hand, "If
  nothing goes wrong, is everything all right?", JAMA 249, 1983).

  p is McNemar's for 0/1 scores (`mcnemar`). For others it is that of the randomisation test that swaps the models on
  any of the questions (E. Noreen, "Computer-Intensive Methods for Testing Hypotheses", 1989), from 10,000 draws and the
  one seen (B. Phipson and G. Smyth, "Permutation P-values Should Never Be Zero", 2010), so 0.0001 at least.

  Args:
    first: [n] scores of the first model, such as 0 and 1, or nats a token.
    second: [n] scores of the second, of the same questions in the same order.
    weights: [n] weights of the questions in both means, such as tokens, where scores are rates; all 1 without.

  Raises:
    ValueError: for no question, lists of different lengths, numbers that are not finite, weights that are not positive.

  >>> found = compare_paired([1, 1, 1, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0])
  >>> found.value, found.wins, found.losses, found.p
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
  return Paired(*means, value, n, *_bootstrap_interval(change, w), None, None, _randomisation_p(change * w))


@functools.lru_cache(maxsize=4096)  # a report of a run that goes on asks again after each stage
def _multinomial_interval(wins: int, losses: int, n: int) -> tuple[float, float]:
  """The interval of 0/1 scores: a resample's wins, losses and ties are a draw of the multinomial."""
  ties = n - wins - losses
  if n in (wins, losses, ties):
    value, other = (wins - losses) / n, 1 - LEVEL**(1 / n)
    return value - other * (value + 1), value + other * (1 - value)
  drawn = np.random.default_rng(_SEED).multinomial(n, np.array([wins, losses, ties]) / n, size=RESAMPLES)
  return _percentile_interval((drawn[:, 0] - drawn[:, 1]) / n)


def _bootstrap_interval(change: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
  rng, weighted, means = np.random.default_rng(_SEED), change * weights, []
  for count in _chunk_sizes(change.size):
    index = rng.integers(change.size, size=(count, change.size))
    means.append(weighted[index].sum(1) / weights[index].sum(1))
  return _percentile_interval(np.concatenate(means))


def _percentile_interval(values: np.ndarray) -> tuple[float, float]:
  low, high = np.quantile(values, (LEVEL / 2, 1 - LEVEL / 2))
  return float(low), float(high)


def _randomisation_p(change: np.ndarray) -> float:
  """The share of ways to swap the models' scores on some questions, drawn, that give a sum as far from 0."""
  rng, total, extreme = np.random.default_rng(_SEED), change.sum(), 1
  seen = abs(total) - 1e-12 * np.abs(change).sum()  # what rounding makes of equal sums
  for count in _chunk_sizes(change.size):
    kept = rng.integers(2, size=(count, change.size), dtype=np.int8).astype(np.float64)
    extreme += int((np.abs(2 * (kept @ change) - total) >= seen).sum())
  return extreme / (RESAMPLES + 1)


def _chunk_sizes(n: int) -> list[int]:
  """How many of the resamples of n questions are drawn at a time."""
  most = max(1, _CHUNK // n)
  return [min(most, RESAMPLES - start) for start in range(0, RESAMPLES, most)]


@functools.lru_cache(maxsize=4096)
def mcnemar(wins: int, losses: int) -> float:
  """McNemar's test, mid-p, two-sided: whether two models that differ in so many verdicts are equally good.

  Where they are, each question that one alone has right is either's with probability 1/2, so the fewer of the two
  counts follows the binomial distribution (Q. McNemar, Psychometrika 12, 1947). Of what is as likely as the count
  itself half counts: M. Fagerland, S. Lydersen and P. Laake, "The McNemar test for binary matched-pairs data: mid-p and
  asymptotic are better than exact conditional", BMC Medical Research Methodology 13:91 (2013), recommend that for any
  size: the exact conditional test is conservative, and this one kept its level in all 9595 cases that they counted out.
  In whole numbers, rounded once.

  Args:
    wins: questions that the first model alone has right.
    losses: questions that the second alone has right.

  Raises:
    ValueError: for a negative count.

  >>> round(mcnemar(1, 7), 3)  # the example of their table 1
  0.039
  """
  if min(wins, losses) < 0:
    raise ValueError(f"{wins} and {losses} questions: expected counts")
  n, fewer = wins + losses, min(wins, losses)
  term, below = 1, 0  # C(n, k), and the sum of those before it
  for k in range(fewer):
    below += term
    term = term * (n - k) // (k + 1)
  return (2 * below + term) / 2**n


def holm(ps: Sequence[float]) -> list[float]:
  """Corrects the p of several tests, so that with all below 0.05 called real the chance that any is not is 5 % at most.

  S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979). It
  holds however the tests depend on each other.

  Args:
    ps: of each test.

  Returns:
    The corrected p of each, in the same order.

  >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
  [0.03, 0.06, 0.06]
  """
  found, highest = [0.0] * len(ps), 0.0
  for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
    highest = found[i] = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
  return found


def is_real(p: float) -> bool:
  """Whether a difference with this p, corrected, is called real."""
  return p < LEVEL

