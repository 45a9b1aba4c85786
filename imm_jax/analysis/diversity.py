"""Measures the diversity of sampled answers, which collapses first when a model trains on its own output.

Axes: B rows, T positions.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax.analysis import sums
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params
from imm_jax.tasks import answers
from imm_jax.training.computation import Computation
from imm_jax.training.loss import head_entropy
from imm_jax.training.packing import PackedBatches

NGRAM = 4


class Diversity(NamedTuple):
  """Holds the diversity of the sampled answers to some questions.

  Attributes:
    questions: number of questions.
    samples: number of samples of all questions.
    distinct_answers: mean number of distinct final answers to a question; samples without one do not count.
    distinct_4grams: mean share of distinct ones among the 4-grams of words of a question's samples, over questions that
      have any; None if none has.
  """

  questions: int
  samples: int
  distinct_answers: float
  distinct_4grams: float | None


def measure_diversity(rows: Sequence[Mapping[str, Any]]) -> Diversity:
  """Measures the diversity among the samples of each question.

  Args:
    rows: rows of samples.jsonl: `id` of the question, `text`, `span` (the final answer) and `kind`.

  Final answers are compared by `answers.canonical`; words are separated by white space.

  >>> row = lambda text, span: {"id": "a", "text": text, "span": span, "kind": "number"}
  >>> measure_diversity([row("2 + 3 is 5", "5"), row("2 + 3 is 5.0", "5.0"), row("I do not know", "")])
  Diversity(questions=1, samples=3, distinct_answers=1.0, distinct_4grams=0.8)
  """
  groups: dict[str, list[Mapping[str, Any]]] = {}
  for row in rows:
    groups.setdefault(row["id"], []).append(row)
  canonical = functools.lru_cache(maxsize=1 << 16)(answers.canonical)
  distinct = [{canonical(r["span"], r["kind"]) for r in group} - {None} for group in groups.values()]
  shares = []
  for group in groups.values():
    grams = [gram for r in group for gram in _ngrams(r["text"].split())]
    if grams:
      shares.append(len(set(grams)) / len(grams))
  return Diversity(len(groups), len(rows), float(np.mean([len(f) for f in distinct])) if distinct else 0.0,
                   float(np.mean(shares)) if shares else None)


def _ngrams(words: Sequence[str]) -> list[tuple[str, ...]]:
  return [tuple(words[i:i + NGRAM]) for i in range(len(words) - NGRAM + 1)]


def token_entropy(config: ModelConfig, params: Params, batches: PackedBatches, computation: Computation, *,
                  label: str = "entropy") -> float:
  """Computes the mean entropy in nats of the model's next-token distribution over the tokens of given responses.

  The distribution has temperature 1 and is over the whole vocabulary. Logits are held for `loss.choose_chunk` positions
  of a row at a time.

  Args:
    config: the model's config.
    params: float32 parameters with stacked layers, sharded by `sharding.RULES`.
    batches: prompts and responses, packed with `epochs=1`.
    computation: how the passes are computed.
    label: label of the progress bar.
  """
  total, count = sums.sum_over_batches(_sum_entropies, config, (params,), batches, computation, label=label)
  return float(total / count)


def _sum_entropies(inputs: Sequence[sums.Inputs], chunk: int) -> jax.Array:
  """Returns the sum of the entropies and the number of tokens."""
  (x, head, _, loss_mask), = inputs
  return jnp.stack([head_entropy(x, head, loss_mask, chunk), jnp.sum(loss_mask)])
