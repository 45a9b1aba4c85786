"""Evaluation by likelihood, without sampling: accuracy on multiple choice, and bits per byte of texts."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_collections
import numpy as np

from imm_jax.files import Row
from imm_jax.model import checkpoint_folder
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.runtime import distributed, hardware
from imm_jax.scoring import Scorer, encode_continuations, encode_text, resumable
from imm_jax.stages.devices import make_mesh
from imm_jax.stages.result_cache import ResultCache
from imm_jax.stages.task_entries import RunTask, get_tasks
from imm_jax.statistics import accuracy
from imm_jax.tasks.base import Choice
from imm_jax.tasks.multiple import LETTERS

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

# Maximum length of a window of text, in tokens.
_WINDOW = 2048
# Questions or passages per part: the most that a killed run loses.
_QUESTIONS, _PASSAGES = 256, 64


def measure(config: ml_collections.ConfigDict, model: Path, scratch: Path, cache: ResultCache, label: str,
            ) -> dict[str, Any]:
  """Scores the multiple-choice tasks and the texts of a config.

  Writes <task>.jsonl, one row per question or passage, unless `cache` has it. `scratch` is a folder for partial
  results, from which a killed evaluation resumes.

  Returns:
    `scores`: `acc` and `acc_norm` of each task; `texts`: the result of `summarize_texts` for each text; `protocol`: the
    result of `describe_protocol` for each task.
  """
  tasks = get_tasks(config)
  choices_by_task, texts = tasks.load_test_choices(), tasks.load_passages()
  if not choices_by_task and not texts:
    return {"scores": {}, "texts": {}, "protocol": {}}
  dtype = hardware.compute_dtype(config.sample.compute_dtype)
  settings = {"model": f"{checkpoint_folder.digest(model)} in {dtype}" if distributed.is_main() else ""}

  @functools.cache
  def load() -> tuple[Scorer, "PreTrainedTokenizerBase"]:
    scorer = Scorer.load(model, mesh=make_mesh(config), compute_dtype=dtype)
    return scorer, load_tokenizer(model, rows=scorer.config.vocab_size)

  def score_parts(name: str, items: Sequence[Any], make: Callable[..., list[Row]], size: int) -> list[Row]:
    compute = lambda: resumable.compute_rows(
        items, lambda part, label: make(*load(), part, label=label), size=size,
        journal=scratch / f"{name}_scores.jsonl", settings=settings, label=f"{label}: {name}")
    return cache.obtain(name, settings | {"items": items, "window": _WINDOW}, lambda: (compute(), {}), label=label)[0]

  scores, summaries, protocol = {}, {}, {}
  for name, choices in choices_by_task.items():
    rows = score_parts(name, choices, score_choices, _QUESTIONS)
    scores[name] = {metric: accuracy.compute_accuracy(sum(row[key] for row in rows), len(rows))._asdict()
                    for metric, key in (("acc", "correct"), ("acc_norm", "correct_norm"))}
    protocol[name] = describe_protocol(rows)
  for name, passages in texts.items():
    summaries[name] = summarize_texts(score_parts(name, [*enumerate(passages)], score_texts, _PASSAGES))
  return {"scores": scores, "texts": summaries, "protocol": protocol}


def describe_protocol(rows: Sequence[Row]) -> dict[str, Any]:
  """Describes scoring by likelihood in the form of `evaluate.describe_protocol`; no answer has a length or is cut."""
  return {"name": "likelihood", "shots": 0, "n": len(rows), "mean_tokens": 0.0, "cut": 0.0}


def score_train(config: ml_collections.ConfigDict, model: Path, entries: Sequence[RunTask], count: int, label: str,
                ) -> dict[str, list[Row]]:
  """Scores the first `count` train questions of each task, by name; every process gets all rows."""
  scorer = Scorer.load(model, mesh=make_mesh(config), compute_dtype=hardware.compute_dtype(config.sample.compute_dtype))
  tokenizer = load_tokenizer(model, rows=scorer.config.vocab_size)
  return {entry.name: score_choices(scorer, tokenizer, entry.load_choices(split="train", count=count),
                                    label=f"{label}, {entry.name}") for entry in entries}


def score_choices(scorer: Scorer, tokenizer: "PreTrainedTokenizerBase", choices: Sequence[Choice], *, label: str,
                  ) -> list[Row]:
  """Scores multiple-choice questions; returns a row per question, in order, in every process.

  `correct` tells whether the right option is the most likely, `correct_norm` whether it is so per character, like acc
  and acc_norm of lm-evaluation-harness (ties go to the first option).

  Args:
    scorer: the model's scorer.
    tokenizer: the model's tokenizer.
    choices: the questions.
    label: text of the progress bar.
  """
  pairs = [(choice.contexts[i % len(choice.contexts)], option)
           for choice in choices for i, option in enumerate(choice.options)]
  requests = encode_continuations(tokenizer, pairs, rows=scorer.config.vocab_size,
                                  positions=scorer.config.max_positions)
  results = iter(scorer.score(requests, label=label))
  rows = []
  for choice in choices:
    scores = [next(results) for _ in choice.options]
    nats = np.array([score.logprob for score in scores])
    best, norm = int(np.argmax(nats)), int(np.argmax(nats / [len(option) - 1 for option in choice.options]))
    rows.append({"id": choice.id, "question": choice.question, "gold": LETTERS[choice.gold], "kind": "choice",
                 "text": choice.options[best].strip(), "tokens": scores[best].tokens, "finish": "stop",
                 "correct": best == choice.gold, "span": LETTERS[best], "correct_norm": norm == choice.gold,
                 "span_norm": LETTERS[norm], "logprobs": [round(float(p), 6) for p in nats]})
  return rows


def score_texts(scorer: Scorer, tokenizer: "PreTrainedTokenizerBase", passages: Sequence[tuple[int, str]], *,
                label: str) -> list[Row]:
  """Scores numbered passages; returns a row with `nats`, `tokens` and `bytes` per passage, in every process."""
  positions = min(_WINDOW, scorer.config.max_positions or _WINDOW)
  windows = [encode_text(tokenizer, text, rows=scorer.config.vocab_size, positions=positions) for _, text in passages]
  results = iter(scorer.score([request for requests in windows for request in requests], label=label))
  rows = []
  for (number, text), requests in zip(passages, windows, strict=True):
    scores = [next(results) for _ in requests]
    rows.append({"id": str(number), "question": text, "gold": "", "nats": -math.fsum(s.logprob for s in scores),
                 "tokens": sum(s.tokens for s in scores), "bytes": len(text.encode())})
  return rows


def summarize_texts(rows: Sequence[Row]) -> dict[str, Any]:
  """Computes `nats_per_token` and `bits_per_byte` with 95 % intervals over the passages, and total sizes.

  The interval is that of a ratio estimator, from the residuals of the passages (Cochran, Sampling Techniques, 1977,
  eq. 6.13); a single passage has an empty one.

  >>> rows = [{"nats": 2.0, "tokens": 1, "bytes": 4}, {"nats": 4.0, "tokens": 2, "bytes": 8}]
  >>> summary = summarize_texts(rows)
  >>> summary["nats_per_token"], round(summary["bits_per_byte"]["value"], 3), summary["tokens"]
  ({'value': 2.0, 'low': 2.0, 'high': 2.0}, 0.721, 3)
  """
  nats = np.array([row["nats"] for row in rows])

  def ratio(unit: float, size: str) -> dict[str, float]:
    sizes = np.array([row[size] for row in rows], float)
    value = nats.sum() / unit / sizes.sum()
    residuals = nats / unit - value * sizes
    half = 1.96 * math.sqrt(len(rows) / max(1, len(rows) - 1) * float(residuals @ residuals)) / sizes.sum()
    return {"value": float(value), "low": float(value - half), "high": float(value + half)}

  return {"nats_per_token": ratio(1.0, "tokens"), "bits_per_byte": ratio(math.log(2), "bytes"), "n": len(rows),
          "tokens": sum(row["tokens"] for row in rows), "bytes": sum(row["bytes"] for row in rows)}
