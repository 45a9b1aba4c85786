"""Computes accuracy with confidence intervals, pass@k and the majority vote."""

import collections
import functools
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Accuracy(NamedTuple):
  """Holds the share of right answers with its confidence interval.

  Attributes:
    value: the share, from 0 to 1.
    n: number of questions.
    low: lower end of the 95 % interval.
    high: upper end of the interval.
  """

  value: float
  n: int
  low: float
  high: float


def compute_accuracy(correct: int, n: int) -> Accuracy:
  """Returns the accuracy of `correct` right answers to `n` questions, with Wilson's 95 % interval.

  The interval is that of E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22
  (1927).

  Raises:
    ValueError: unless 0 <= correct <= n and n > 0.

  >>> [round(x, 3) for x in compute_accuracy(8, 10)]
  [0.8, 10, 0.49, 0.943]
  """
  if n <= 0 or not 0 <= correct <= n:
    raise ValueError(f"{correct} correct of {n}")
  return _wilson(correct / n, n)


def compute_mean(scores: Sequence[float]) -> Accuracy:
  """Returns the mean of scores in [0, 1], one per question, with Wilson's 95 % interval.

  Among all scores in [0, 1] with the same mean, 0/1 scores have the largest variance, so that the interval is valid for
  any such scores.

  Raises:
    ValueError: when there is no score, or one is outside [0, 1].

  >>> [round(x, 3) for x in compute_mean([0.5, 1.0, 0.9])]
  [0.8, 3, 0.288, 0.975]
  """
  if not scores or not all(0 <= score <= 1 for score in scores):
    raise ValueError("expected one or more scores from 0 to 1")
  return _wilson(min(1.0, math.fsum(scores) / len(scores)), len(scores))


def _wilson(p: float, n: int) -> Accuracy:
  z = 1.959963984540054
  z2n = z * z / n
  center = (p + z2n / 2) / (1 + z2n)
  half = z * math.sqrt(p * (1 - p) / n + z2n / (4 * n)) / (1 + z2n)
  # With 0 or n correct answers an end equals the value, and rounding must not push it past the value.
  return Accuracy(p, n, min(p, max(0.0, center - half)), max(p, min(1.0, center + half)))


def pass_at_k(num_samples: int, correct: int, k: int) -> float:
  """Estimates pass@k = 1 - C(M - c, k) / C(M, k), the probability that at least one of k samples is right.

  This is the unbiased estimator of M. Chen et al., "Evaluating Large Language Models Trained on Code" (2021), computed
  in integers and rounded once.

  Args:
    num_samples: M, the number of samples of a question.
    correct: c, the number of right ones.
    k: the number of samples that are drawn of the M.

  Raises:
    ValueError: unless 0 <= c <= M and 1 <= k <= M.

  >>> pass_at_k(4, 1, 2)
  0.5
  """
  if not 0 <= correct <= num_samples or not 1 <= k <= num_samples:
    raise ValueError(f"pass@{k} with {correct} right of {num_samples} samples: expected 0 <= right <= samples and "
                     "1 <= k <= samples")
  return _pass_at_k(num_samples, correct, k)


@functools.lru_cache(maxsize=65536)  # many questions have the same counts
def _pass_at_k(num_samples: int, correct: int, k: int) -> float:
  total = math.comb(num_samples, k)
  return (total - math.comb(num_samples - correct, k)) / total


def majority(answers: Sequence[Hashable | None]) -> int | None:
  """Returns the index of the first sample with the most common answer (X. Wang et al., "Self-consistency", 2023).

  A sample without an answer (None) does not vote. Among equally common answers the one that occurs first wins. Returns
  None if no sample votes.

  >>> majority(["7", None, "8", "8"]), majority(["7", "8"]), majority([None])
  (2, 0, None)
  """
  votes = collections.Counter(answer for answer in answers if answer is not None)
  return answers.index(votes.most_common(1)[0][0]) if votes else None
