"""What a run will cost, in tokens and device hours, before it is begun or when a part of it is done."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_collections

from imm_jax.hardware import peak_flops
from imm_jax.memory import count_params
from imm_jax.methods import averages, draws, merge_method, method_of
from imm_jax.model.config import ModelConfig
from imm_jax.stages import questions
from imm_jax.tasks import protocols

# Where nothing was measured yet: the share of a device's peak that training and sampling reach, the length of an answer
# as a share of what is allowed, the share of right ones, and the tokens of a question.
ASSUMED = {"training": 0.4, "sampling": 0.1, "length": 0.4, "right": 0.5, "question": 128}
_STAND_IN = "TPU v5e"  # for a device whose peak is not known


class Work(NamedTuple):
  """Tokens of a whole run.

  Attributes:
    sampled: for training.
    trained: over all epochs, and those that layer importance is measured on.
    evaluated: sampled in evaluation.
    read: of the prompts of what is sampled for training.
    asked: of the prompts in evaluation, and of the texts on which models are compared with the base.
  """

  sampled: float
  trained: float
  evaluated: float
  read: float
  asked: float


def work(config: ml_collections.ConfigDict, record: Mapping[str, Any]) -> Work:
  """The tokens of all rounds; what the first rounds in `record` (run.json) measured stands for the others."""
  facts = [entry["facts"] for name, entry in record["stages"].items() if name.endswith("/samples.jsonl")]
  samples, tokens = sum(f["samples"] for f in facts), sum(f["tokens"] for f in facts)
  length = tokens / samples if samples else ASSUMED["length"] * config.sample.max_new_tokens
  right = sum(f["correct"] for f in facts) / samples if samples else ASSUMED["right"]
  asked, tests = questions.counts(config)
  drawn, method = draws(config), method_of(config)
  sampled = config.rounds * asked * config.sample.num_samples * length if drawn else 0.0
  answers = right * asked * config.sample.num_samples if drawn else 0.0
  answers /= max(1 - config.data.real_fraction, 0.5)
  rounds = range(1, config.rounds + 1)
  if not drawn:
    seen = config.rounds * asked
  elif method.data == "accumulation":
    # With all questions in every round the real answers are the same ones.
    real = config.data.with_real * asked * (sum(rounds) if config.task.questions_per_round else config.rounds)
    seen = sum(rounds) * answers + real
  elif method.data == "mixture":
    seen = sum(1 + config.data.mixture_share * (t - 1) for t in rounds) * answers
  else:
    seen = config.rounds * answers
  models = 1 + config.rounds * (1 + averages(config) + (1 + len(config.merge.sweep)) * bool(method.merge))
  tried = 0
  if config.merge.base_weight == "auto" and method.merge:
    auto = config.merge.auto
    answered = 1 + sum(questions.measure_of(config, entry) == "answer" for entry in auto.general)
    tried = config.rounds * (len(auto.weights) + 2 * auto.groups) * auto.questions * answered
  evaluated = (models * tests * (1 + config.eval.num_samples) + tried) * min(length, protocols.max_new_tokens(config))
  # The base's forward pass is a third of a step; so is what measures the loss of the held-out share.
  epochs = config.sft.epochs * (1 + (method.anchor == "kl") / 3) * (1 - config.sft.stop_share * 2 / 3)
  passes = epochs + (merge_method(config) == "iimm") + (config.sft.intervention == "weight_masking")
  shots = config.prompt.few_shot * (ASSUMED["question"] + length)

  def asks(entry: str) -> float:
    """What is read of a question in evaluation: it, and what the protocol shows, or its options."""
    if questions.measure_of(config, entry) == "choices":
      return 2 * ASSUMED["question"]
    shown = protocols.of(config, questions.name_of(entry)).few_shot
    return ASSUMED["question"] + shown * (ASSUMED["question"] + length)

  counted = zip(questions.count_tests(config), questions.own(config), strict=True)
  asked_tests = sum(n * asks(entry) for n, entry in counted)
  # The base and a model of the round read the same texts.
  compared = config.rounds * 2 * (1 + bool(method.merge) + averages(config))
  compared *= sum(min(n or most, most) for n in questions.count_tests(config)) if (
      most := questions.drift_questions(config)) else 0
  return Work(sampled, passes * seen * (length + ASSUMED["question"]), evaluated,
              config.rounds * asked * (ASSUMED["question"] + shots) if drawn else 0.0,
              models * asked_tests + tried * asks(config.task.name) + compared * (ASSUMED["question"] + length))


def estimate(config: ml_collections.ConfigDict, model: ModelConfig | None, record: Mapping[str, Any],
             sampler: ModelConfig | None = None) -> str:
  """One line: tokens, and device hours by the measured throughput, or by an assumed share of the device's peak.

  Args:
    config: of the run.
    model: its shape; without it tokens alone are told.
    record: run.json.
    sampler: the shape of the model that samples for training, where it is another.
  """
  w = work(config, record)
  text = (f"{_count(w.sampled)} tokens sampled, {_count(w.trained)} trained on, {_count(w.evaluated)} sampled in "
          "evaluation")
  devices = len(record.get("devices", ())) or 1
  speeds = {kind: _measured(record, kind) for kind in ("sampling", "training")}
  if all(speeds.values()):
    hours = ((w.sampled + w.evaluated) / speeds["sampling"] + w.trained / speeds["training"]) * devices / 3600
    return (f"{text}; about {hours:.2g} device hours at the measured {_count(speeds['sampling'])} sampled and "
            f"{_count(speeds['training'])} trained tokens/s on {devices} device(s)")
  if model is None:
    return text
  kind = jax.devices()[0].device_kind
  kind = kind if peak_flops(kind) else _STAND_IN
  params, sampler_params = count_params(model), count_params(sampler or model)
  # Prompts are read many tokens at once, as in training.
  flops = (2 * (sampler_params * w.sampled + params * w.evaluated) / ASSUMED["sampling"]
           + (6 * params * w.trained + 2 * (sampler_params * w.read + params * w.asked)) / ASSUMED["training"])
  hours = flops / peak_flops(kind) / 3600
  return (f"{text}; about {hours:.2g} hours of one {kind}, if training reaches {ASSUMED['training']:.0%} and sampling "
          f"{ASSUMED['sampling']:.0%} of its peak (once a round is done: by what it took)")


def _measured(record: Mapping[str, Any], kind: str) -> float | None:
  """Tokens a second of the finished stages of a kind, over all devices; None where there are none."""
  ending = {"sampling": "/samples.jsonl", "training": "/sft"}[kind]
  done = [entry for name, entry in record["stages"].items() if name.endswith(ending) and not name.endswith("eval/sft")]
  seconds = sum(entry.get("seconds", 0.0) for entry in done)
  tokens = sum(entry["facts"].get("tokens", 0) for entry in done)
  return tokens / seconds if seconds and tokens else None


def _count(number: float) -> str:
  """A number to three digits.

  >>> _count(1234567), _count(950)
  ('1.23 M', '950')
  """
  for unit, size in ((" G", 1e9), (" M", 1e6), (" k", 1e3)):
    if number >= size:
      return f"{number / size:.3g}{unit}"
  return f"{number:.3g}"
