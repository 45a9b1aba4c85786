"""What a run will cost, in tokens and device hours, before it is begun or when a part of it is done."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from imm_jax.methods import keeps_average, merge_method, method_of, samples_answers
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import count_params
from imm_jax.runtime import hardware
from imm_jax.stages import questions
from imm_jax.tasks import protocols

# Where nothing was measured yet: the share of a device's peak that training and sampling reach, the length of an answer
# as a share of what is allowed, the share of right ones, and the tokens of a question and of a passage.
ASSUMED = {"training": 0.4, "sampling": 0.1, "length": 0.4, "right": 0.5, "question": 128, "passage": 500}
# Of what this machine does in bare products, where its peak is not known: the share that the programs of SmolLM2-135M
# reached on 2 cores, in SFT (a forward pass that is run again counted) and in decoding, compiling included.
_REACHED = {"training": 0.75, "sampling": 0.5}
_WIDE = 1024  # rows of such a product in training
_ROUND = re.compile(r"^round_[0-9]+/")


class TokenCounts(NamedTuple):
  """Tokens of a whole run.

  Attributes:
    sampled: for training.
    trained: over all epochs, and those that layer importance is measured on.
    evaluated: sampled in evaluation.
    read: of the prompts of what is sampled for training, without worked examples: all questions share one reading.
    asked: of the prompts in evaluation, likewise, and of the texts on which models are compared with the base.
  """

  sampled: float
  trained: float
  evaluated: float
  read: float
  asked: float


def count_tokens(config: ml_collections.ConfigDict, record: Mapping[str, Any], *, question: float = 0.0,
                 answer: float = 0.0) -> TokenCounts:
  """The tokens of all rounds; what the first rounds in `record` (run.json) measured stands for the others.

  Args:
    config: of the run.
    record: run.json.
    question: mean tokens of a question's prompt without worked examples; 0 where nobody has counted them.
    answer: of a worked answer, likewise.
  """
  question = question or ASSUMED["question"]
  facts = [entry["facts"] for name, entry in record["stages"].items() if name.endswith("/samples.jsonl")]
  samples, tokens = sum(f["samples"] for f in facts), sum(f["tokens"] for f in facts)
  length = tokens / samples if samples else min(
      answer or ASSUMED["length"] * config.sample.max_new_tokens, config.sample.max_new_tokens)
  right = sum(f["correct"] for f in facts) / samples if samples else ASSUMED["right"]
  asked, tests = questions.counts(config)
  drawn, method = samples_answers(config), method_of(config)
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
  models = 1 + config.rounds * (1 + keeps_average(config) + (1 + len(config.merge.sweep)) * bool(method.merge))
  tried = 0
  if config.merge.base_weight == "auto" and method.merge:
    auto = config.merge.auto
    answered = 1 + sum(questions.measure_of(config, entry) == "answer" for entry in auto.general)
    tried = config.rounds * (len(auto.weights) + 2 * auto.groups) * auto.questions * answered
  evaluated = (models * tests * (1 + config.eval.num_samples) + tried) * min(length, protocols.max_new_tokens(config))
  # The base's forward pass is a third of a step; so is what measures the loss of the held-out share.
  epochs = config.sft.epochs * (1 + (method.anchor == "kl") / 3) * (1 - config.sft.stop_share * 2 / 3)
  passes = epochs + (merge_method(config) == "iimm") + (config.sft.intervention == "weight_masking")
  measured = config.rounds * min(config.analysis.examples, seen / config.rounds)

  def asks(entry: str) -> float:
    """What is read of a question in evaluation: it, or it with its options."""
    return question * (1 + (questions.measure_of(config, entry) == "choices"))

  counted = zip(questions.count_tests(config), questions.own(config), strict=True)
  asked_tests = sum(n * asks(entry) for n, entry in counted)
  asked_tests += len(config.eval.texts) * questions.count_passages(config) * ASSUMED["passage"]
  # The base and a model of the round read the same texts.
  compared = config.rounds * 2 * (1 + bool(method.merge) + keeps_average(config))
  compared *= sum(min(n or most, most) for n in questions.count_tests(config)) if (
      most := questions.drift_questions(config)) else 0
  return TokenCounts(sampled, (passes * seen + measured) * (length + question), evaluated,
                     config.rounds * asked * question if drawn else 0.0,
                     models * asked_tests + tried * asks(config.task.name) + compared * (length + question))


def describe(config: ml_collections.ConfigDict, model: ModelConfig | None, record: Mapping[str, Any],
             sampler: ModelConfig | None = None, stages: Sequence[str] = (), *, question: float = 0.0,
             answer: float = 0.0) -> str:
  """One line: tokens, and device hours.

  They follow from what the stages took, once one of each kind is done; before that from the measured throughput of
  sampling and training; before that from a share of the device's peak, and where that is not known, as on a CPU, of
  what it does in a second of products now.

  Args:
    config: of the run.
    model: its shape; without it tokens alone are told.
    record: run.json.
    sampler: the shape of the model that samples for training, where it is another.
    stages: the names of all stages of the run.
    question: see `count_tokens`.
    answer: see `count_tokens`.
  """
  w = count_tokens(config, record, question=question, answer=answer)
  text = (f"{_count(w.sampled)} tokens sampled, {_count(w.trained)} trained on, {_count(w.evaluated)} sampled in "
          "evaluation")
  devices = len(record.get("devices", ())) or 1
  if taken := _by_stages(record, stages):
    whole, left = taken
    return (f"{text}; about {whole * devices / 3600:.2g} device hours by what stages took so far on {devices} "
            f"device(s), {left * devices / 3600:.2g} of them to come")
  speeds = {kind: _measured(record, kind) for kind in ("sampling", "training")}
  if all(speeds.values()):
    hours = ((w.sampled + w.evaluated) / speeds["sampling"] + w.trained / speeds["training"]) * devices / 3600
    return (f"{text}; about {hours:.2g} device hours at the measured {_count(speeds['sampling'])} sampled and "
            f"{_count(speeds['training'])} trained tokens/s on {devices} device(s)")
  if model is None:
    return text
  params, sampler_params = count_params(model), count_params(sampler or model)
  sampled = 2 * (sampler_params * w.sampled + params * w.evaluated)
  again = 2 * params * w.trained * (config.sft.remat == "full")  # the forward pass, a second time
  # Prompts are read many tokens at once, as in training.
  read = 6 * params * w.trained + 2 * (sampler_params * w.read + params * w.asked)
  kind = jax.devices()[0].device_kind
  peak = hardware.peak_flops(kind)
  if peak:
    hours = (sampled / ASSUMED["sampling"] + read / ASSUMED["training"]) / peak / 3600
    return (f"{text}; about {hours:.2g} hours of one {kind}, if training reaches {ASSUMED['training']:.0%} and "
            f"sampling {ASSUMED['sampling']:.0%} of its peak (once a round is done: by what it took)")
  thin = hardware.measure_flops(config.sample.batch_size, hardware.compute_dtype(config.sample.compute_dtype))
  wide = hardware.measure_flops(_WIDE, hardware.compute_dtype(config.sft.compute_dtype))
  hours = (sampled / thin / _REACHED["sampling"] + (read + again) / wide / _REACHED["training"]) / 3600
  return (f"{text}; about {hours:.2g} hours on this machine as it is now, by a second of products: {wide / 1e9:.3g} "
          f"GFLOP/s of many rows, {thin / 1e9:.3g} of {config.sample.batch_size} (once a round is done: by what it "
          "took)")


def _by_stages(record: Mapping[str, Any], stages: Sequence[str]) -> tuple[float, float] | None:
  """Seconds of all stages and of those to come, each as long as those of its kind took that are done; None as long as
  there is a kind of which none is done."""
  done = {name: entry["seconds"] for name, entry in record["stages"].items() if "seconds" in entry}
  kinds: dict[str, list[float]] = {}
  for name, seconds in done.items():
    kinds.setdefault(_ROUND.sub("", name), []).append(seconds)
  to_come = [kinds.get(_ROUND.sub("", name)) for name in stages if name not in done]
  if not stages or not all(to_come):
    return None
  left = sum(sum(of) / len(of) for of in to_come if of)
  return left + sum(done.get(name, 0.0) for name in stages), left


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
