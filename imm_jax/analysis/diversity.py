"""How diverse sampled answers are: what collapses first when a model trains on its own.

Axes: B rows, T positions.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imm_jax.analysis import sums
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params
from imm_jax.tasks import answers
from imm_jax.training.loss import head_entropy
from imm_jax.training.packing import PackedBatches

NGRAM = 4


class Diversity(NamedTuple):
  """Of the answers that were sampled to some questions.

  Attributes:
    questions: how many.
    samples: of all questions.
    distinct_answers: different final answers to a question, on average; samples without one do not count.
    distinct_4grams: of a question's 4-grams of words the share of different ones, on average over the questions that
      have any; None where none has.
  """

  questions: int
  samples: int
  distinct_answers: float
  distinct_4grams: float | None


def diversity(rows: Sequence[Mapping[str, Any]]) -> Diversity:
  """Counts what differs between the samples of a question.

  Args:
    rows: of samples.jsonl: `id` of the question, `text`, `span` (the final answer) and `kind`.

  Final answers are different unless `answers.canonical` makes the same of them; words are what white space separates.

  >>> row = lambda text, span: {"id": "a", "text": text, "span": span, "kind": "number"}
  >>> diversity([row("2 + 3 is 5", "5"), row("2 + 3 is 5.0", "5.0"), row("I do not know", "")])
  Diversity(questions=1, samples=3, distinct_answers=1.0, distinct_4grams=0.8)
  """
  groups: dict[str, list[Mapping[str, Any]]] = {}
  for row in rows:
    groups.setdefault(row["id"], []).append(row)
  canonical = functools.lru_cache(maxsize=1 << 16)(answers.canonical)
  found = [{canonical(r["span"], r["kind"]) for r in group} - {None} for group in groups.values()]
  shares = []
  for group in groups.values():
    grams = [gram for r in group for gram in _ngrams(r["text"].split())]
    if grams:
      shares.append(len(set(grams)) / len(grams))
  return Diversity(len(groups), len(rows), float(np.mean([len(f) for f in found])) if found else 0.0,
                   float(np.mean(shares)) if shares else None)


def _ngrams(words: Sequence[str]) -> list[tuple[str, ...]]:
  return [tuple(words[i:i + NGRAM]) for i in range(len(words) - NGRAM + 1)]


def token_entropy(config: ModelConfig, params: Params, batches: PackedBatches, *, mesh: Mesh,
                  compute_dtype: jnp.dtype, attention: str = "xla", accumulation: int = 1, label: str = "entropy",
                  ) -> float:
  """Mean entropy, in nats, of the model's distribution of the next token, over the responses' tokens.

  The responses are given, not drawn (teacher forcing), and the distribution is that of temperature 1 over the whole
  vocabulary. Logits exist for `loss.chunk_of` positions of a row at once.

  Args:
    config: of the model.
    params: float32, stacked layers, placed by `sharding.RULES`.
    batches: prompts and responses, once: packed with `epochs=1`.
    mesh: devices.
    compute_dtype: dtype of activations.
    attention: what `attention.choose_backend` gave.
    accumulation: parts that a batch is run in.
    label: what the progress bar says.
  """
  total, count = sums.over(_entropies, config, (params,), batches, mesh=mesh, compute_dtype=compute_dtype,
                           attention=attention, accumulation=accumulation, label=label)
  return float(total / count)


def _entropies(inputs: Sequence[sums.Inputs], chunk: int) -> jax.Array:
  """The sum of the entropies, and the number of tokens."""
  (x, head, _, weights), = inputs
  return jnp.stack([head_entropy(x, head, weights, chunk), jnp.sum(weights)])
