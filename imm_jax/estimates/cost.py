"""Estimates the tokens and time of a run, before it begins or when a part of it is done."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from imm_jax.formatting import format_duration
from imm_jax.methods import ANCHORS, get_method, is_sampling, keeps_average
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import count_params
from imm_jax.runtime import hardware
from imm_jax.stages import merge_settings
from imm_jax.stages.task_entries import RunTask, get_tasks

# Assumptions as long as nothing is measured: the share of a device's peak FLOP/s that training and sampling reach, the
# length of an answer as a share of max_new_tokens, the share of right answers, and the tokens of a question and of a
# passage.
ASSUMED = {"training": 0.4, "sampling": 0.1, "length": 0.4, "right": 0.5, "question": 128, "passage": 500}
# The largest share of real answers that is counted on: a question has one real answer at most, so that there are too
# few for a large `data.real_fraction`.
_MAX_REAL = 0.5
# For machines whose peak is unknown, the share of the FLOP/s measured in plain matrix products that SmolLM2-135M
# reached on 2 cores in SFT (recomputed forward passes are counted) and in decoding, compilation included.
_REACHED = {"training": 0.75, "sampling": 0.5}
_TRAINING_ROWS = 1024  # rows of a measured product that stands for training
_ROUND = re.compile(r"^round_[0-9]+/")


class TokenCounts(NamedTuple):
  """Holds the numbers of tokens of a whole run.

  Attributes:
    sampled: tokens of answers that are sampled for training.
    trained: tokens of all epochs of training, and of the answers that layer importance is measured on.
    evaluated: tokens of answers that are sampled in evaluation.
    sample_prompts: tokens of prompts in sampling for training. Worked examples are left out, because all questions
      share one forward pass over them.
    eval_prompts: tokens of prompts in evaluation, likewise, and of texts on which models are compared with the base.
  """

  sampled: float
  trained: float
  evaluated: float
  sample_prompts: float
  eval_prompts: float


def count_tokens(config: ml_collections.ConfigDict, record: Mapping[str, Any], *, question: float = 0.0,
                 answer: float = 0.0) -> TokenCounts:
  """Estimates the tokens of all rounds; lengths and accuracy of the rounds in `record` stand for those to come.

  Args:
    config: settings of the run.
    record: content of run.json.
    question: mean tokens of a question's prompt without worked examples; 0 if unknown.
    answer: mean tokens of a worked answer; 0 if unknown.
  """
  question = question or ASSUMED["question"]
  facts = [entry["facts"] for name, entry in record["stages"].items() if name.endswith("/samples.jsonl")]
  samples, tokens = sum(f["samples"] for f in facts), sum(f["tokens"] for f in facts)
  length = tokens / samples if samples else min(
      answer or ASSUMED["length"] * config.sample.max_new_tokens, config.sample.max_new_tokens)
  right = sum(f["correct"] for f in facts) / samples if samples else ASSUMED["right"]
  tasks = get_tasks(config)
  num_questions, tests = tasks.count_questions()
  has_samples, method = is_sampling(config), get_method(config)
  sampled = config.rounds * num_questions * config.sample.num_samples * length if has_samples else 0.0
  answers = right * num_questions * config.sample.num_samples if has_samples else 0.0
  answers /= get_sampled_share(config)
  rounds = range(1, config.rounds + 1)
  if not has_samples:
    trained = config.rounds * num_questions
  elif method.data == "accumulation":
    # If every round asks all questions, the real answers are the same in each.
    real = config.data.with_real * num_questions * (sum(rounds) if config.task.questions_per_round else config.rounds)
    trained = sum(rounds) * answers + real
  elif method.data == "mixture":
    trained = sum(1 + config.data.mixture_share * (t - 1) for t in rounds) * answers
  else:
    trained = config.rounds * answers
  models = 1 + config.rounds * (1 + keeps_average(config) + (1 + len(config.merge.sweep)) * bool(method.merge))
  weight_search = 0
  if config.merge.base_weight == "auto" and method.merge:
    auto = config.merge.auto
    answered = 1 + sum(entry.measure == "answer" for entry in tasks.general)
    weight_search = config.rounds * (len(auto.weights) + 2 * auto.groups) * auto.questions * answered
  evaluated = models * tests * (1 + config.eval.num_samples) + weight_search
  evaluated *= min(length, tasks.protocol.token_limit)
  # A forward pass, of the base for the KL or of the held-out share for its loss, costs a third of a step.
  computes = bool(method.anchor) and ANCHORS[method.anchor].predicts
  epochs = config.sft.epochs * (1 + computes / 3) * (1 - config.sft.stop_share * 2 / 3)
  passes = epochs + merge_settings.get_settings(config).needs_importance + (config.sft.intervention == "weight_masking")
  measured = config.rounds * min(config.analysis.examples, trained / config.rounds)

  def prompt_tokens(entry: RunTask) -> float:
    """Returns the tokens of a test question, which has options if these are scored."""
    return question * (1 + (entry.measure == "choices"))

  counts = tasks.count_tests()
  test_prompts = sum(n * prompt_tokens(entry) for n, entry in zip(counts, tasks.own, strict=True))
  test_prompts += len(tasks.texts) * tasks.passages * ASSUMED["passage"]
  # The base and each model of a round read the same texts.
  drift_texts = config.rounds * 2 * (1 + bool(method.merge) + keeps_average(config))
  drift_texts *= sum(min(n or tasks.drift, tasks.drift) for n in counts)
  eval_prompts = models * test_prompts + weight_search * prompt_tokens(tasks.in_domain)
  return TokenCounts(sampled, (passes * trained + measured) * (length + question), evaluated,
                     config.rounds * num_questions * question if has_samples else 0.0,
                     eval_prompts + drift_texts * (length + question))


def get_sampled_share(config: ml_collections.ConfigDict) -> float:
  """Returns the share of sampled answers among those that a round trains on, if any are sampled."""
  return 1 - min(config.data.real_fraction, _MAX_REAL)


def describe(config: ml_collections.ConfigDict, model: ModelConfig | None, record: Mapping[str, Any],
             sampler: ModelConfig | None = None, stages: Sequence[str] = (), *, question: float = 0.0,
             answer: float = 0.0) -> str:
  """Describes the tokens and time of a run in one line.

  The time follows from the time of finished stages once one of each kind is done; before that from the throughput of
  finished sampling and training; before that from a share of the device's peak FLOP/s or, if that is unknown, as on a
  CPU, from a short measurement.

  Args:
    config: settings of the run.
    model: config of the model, or None if unknown, in which case only tokens are described.
    record: content of run.json.
    sampler: config of the model that samples for training, if it is another.
    stages: names of all stages of the run.
    question: see `count_tokens`.
    answer: see `count_tokens`.
  """
  counts = count_tokens(config, record, question=question, answer=answer)
  text = (f"{_format_count(counts.sampled)} tokens sampled, {_format_count(counts.trained)} trained on, "
          f"{_format_count(counts.evaluated)} sampled in evaluation")
  devices = len(record.get("devices", ())) or 1
  if seconds := _extrapolate(record, stages):
    whole, left = seconds
    return (f"{text}; about {format_duration(whole)} by what stages took so far on {devices} device(s), "
            f"{format_duration(left)} of it to come")
  speeds = {kind: _measure_throughput(record, kind) for kind in ("sampling", "training")}
  if all(speeds.values()):
    seconds = (counts.sampled + counts.evaluated) / speeds["sampling"] + counts.trained / speeds["training"]
    return (f"{text}; about {format_duration(seconds)} at the measured {_format_count(speeds['sampling'])} sampled and "
            f"{_format_count(speeds['training'])} trained tokens/s on {devices} device(s)")
  if model is None:
    return text
  params, sampler_params = count_params(model), count_params(sampler or model)
  decoding_flops = 2 * (sampler_params * counts.sampled + params * counts.evaluated)
  recomputed_flops = 2 * params * counts.trained * (config.sft.remat == "full")  # a second forward pass
  # Prompts are processed many tokens at once, as in training.
  training_flops = 6 * params * counts.trained + 2 * (
      sampler_params * counts.sample_prompts + params * counts.eval_prompts)
  kind = jax.devices()[0].device_kind
  peak = hardware.peak_flops(kind)
  if peak:
    seconds = (decoding_flops / ASSUMED["sampling"] + training_flops / ASSUMED["training"]) / peak
    return (f"{text}; about {format_duration(seconds)} of one {kind}, if training reaches {ASSUMED['training']:.0%} "
            f"and sampling {ASSUMED['sampling']:.0%} of its peak (after a round: by its times)")
  speed = hardware.measure_flops(config.sample.batch_size, hardware.compute_dtype(config.sample.compute_dtype))
  training_speed = hardware.measure_flops(_TRAINING_ROWS, hardware.compute_dtype(config.sft.compute_dtype))
  seconds = (decoding_flops / speed / _REACHED["sampling"]
             + (training_flops + recomputed_flops) / training_speed / _REACHED["training"])
  return (f"{text}; about {format_duration(seconds)} on this machine as it is now, by a second of products: "
          f"{training_speed / 1e9:.3g} GFLOP/s of many rows, {speed / 1e9:.3g} of {config.sample.batch_size}; and a "
          "minute or two to compile programs at the first start (once a round is done: by what it took)")


def _extrapolate(record: Mapping[str, Any], stages: Sequence[str]) -> tuple[float, float] | None:
  """Returns the seconds of all stages and of those to come, each taken as the mean of finished stages of its kind.

  Returns None if there is a kind of which no stage is done.
  """
  done = {name: entry["seconds"] for name, entry in record["stages"].items() if "seconds" in entry}
  kinds: dict[str, list[float]] = {}
  for name, seconds in done.items():
    kinds.setdefault(_ROUND.sub("", name), []).append(seconds)
  to_come = [kinds.get(_ROUND.sub("", name)) for name in stages if name not in done]
  if not stages or not all(to_come):
    return None
  left = sum(sum(times) / len(times) for times in to_come if times)
  return left + sum(done.get(name, 0.0) for name in stages), left


def _measure_throughput(record: Mapping[str, Any], kind: str) -> float | None:
  """Returns the tokens per second, over all devices, of the finished stages of a kind; None if there are none."""
  ending = {"sampling": "/samples.jsonl", "training": "/sft"}[kind]
  done = [entry for name, entry in record["stages"].items() if name.endswith(ending) and not name.endswith("eval/sft")]
  seconds = sum(entry.get("seconds", 0.0) for entry in done)
  tokens = sum(entry["facts"].get("tokens", 0) for entry in done)
  return tokens / seconds if seconds and tokens else None


def _format_count(number: float) -> str:
  """Formats a number with three digits.

  >>> _format_count(1234567), _format_count(950)
  ('1.23 M', '950')
  """
  for unit, size in ((" G", 1e9), (" M", 1e6), (" k", 1e3)):
    if number >= size:
      return f"{number / size:.3g}{unit}"
  return f"{number:.3g}"
