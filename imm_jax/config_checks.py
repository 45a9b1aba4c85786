"""Checks the settings of a config before any computation."""

import math
import re
import shlex
from typing import Any

import ml_collections

from imm_jax import task_checks
from imm_jax.config_keys import check_keys, get_value, require
from imm_jax.errors import UserError, suggest
from imm_jax.merging import quantize_drop_rate, registry as merging
from imm_jax.methods import METHODS, get_method, list_merging_methods
from imm_jax.model import attention
from imm_jax.model.decode_kernels import KERNELS
from imm_jax.model.decoder import REMAT
from imm_jax.runs import metrics
from imm_jax.sampling.engines import ENGINES
from imm_jax.sampling.vllm.client import Server
from imm_jax.stages import merge_settings
from imm_jax.stages.task_entries import Tasks, get_tasks
from imm_jax.tasks import prompts, protocols
from imm_jax.training import interventions, throughput
from imm_jax.training.optimization import SCHEDULES

DTYPES = ("bfloat16", "float32")
COMPUTE_DTYPES = ("auto", *DTYPES)
_ONE_OF = {"method": tuple(METHODS), "tracking": metrics.TRACKING, "task.kind": ("number", "latex", "choice"),
           "prompt.style": prompts.STYLES, "eval.protocol": protocols.NAMES,
           "sft.schedule": tuple(SCHEDULES), "sft.intervention": ("none", *interventions.SETTINGS),
           "sft.compute_dtype": COMPUTE_DTYPES, "sft.export": ("model", "float32"),
           "sft.remat": tuple(REMAT), "sft.attention": attention.BACKENDS,
           "sample.compute_dtype": COMPUTE_DTYPES, "sampler.kind": tuple(ENGINES),
           "sampler.attention": ("auto", *KERNELS), "merge.delta_ref": ("start", "base")}
_AT_LEAST_ONE = ("rounds", "sample.num_samples", "sample.max_new_tokens", "sample.batch_size", "sft.epochs",
                 "sft.global_batch", "sft.accumulation", "sft.row_length", "sft.log_every", "sft.save_interval",
                 "sft.max_to_keep", "sft.lora_rank", "eval.batch_size", "merge.auto.questions",
                 "sampler.vllm.concurrency")
_AT_LEAST_ZERO = ("seed", "prompt.few_shot", "task.questions_per_round", "task.eval_questions", "eval.num_samples",
                  "eval.passages", "merge.auto.groups", "analysis.examples", "analysis.drift")
_FINITE = ("sft.weight_decay", "sft.grad_clip", "eval.temperature", "sampler.vllm.tolerance")
_SHARES = ("data.mixture_share", "data.real_fraction")
_POSITIVE = ("sft.learning_rate", "sft.max_norm", "sft.l2_sp_weight", "sft.kl_weight", "sft.lora_alpha",
             "sampler.vllm.timeout", "sampler.vllm.start_timeout")
_POSITIVE_SHARES = ("merge.auto.step", "sample.top_p", "eval.top_p", "sft.gradient_decay", "sft.top_share")


def validate(config: ml_collections.ConfigDict, *, trains: bool = True, downloads: bool = True) -> None:
  """Checks all settings, and the questions that they name.

  What depends on the machine, such as the mesh, is checked in `stages` once the devices are known.

  Args:
    config: settings of a run.
    trains: whether to check the questions to train on, too.
    downloads: whether to load questions that come over the network, too.

  Raises:
    UserError: for the first value that cannot work, with its key and what would be right.
  """
  check_keys(config)
  _check_values(config)
  _check_temperatures(config)
  _check_adapters(config)
  _check_evaluation(config)
  named = get_tasks(config)
  _check_shots(config, named)
  try:
    throughput.parse_window(config.profile)
  except ValueError as e:
    raise UserError(f"config.profile={e}") from e
  _check_sampler(config)
  _check_merge(config)
  _check_data(config)
  task_checks.check_tasks(config, named, trains)
  task_checks.check_questions(config, named, trains, downloads)


def _check_values(config: ml_collections.ConfigDict) -> None:
  """Checks the values that do not depend on others: texts, choices and ranges."""
  for text in (config.prompt.header, *config.sample.stop):
    if not isinstance(text, str) or (not text.isascii() and re.search("[\ud800-\udfff]", text)):
      raise UserError(f"config.prompt.header and sample.stop: {text!r} is no valid text")
  for key, allowed in _ONE_OF.items():
    value = get_value(config, key)
    if value not in allowed:
      hint = (f"is a merge; config.merge.method={value} puts it in a method that merges"
              if key == "method" and value in merging.list_round_methods() else suggest(str(value), list(allowed)))
      raise UserError(f"config.{key}={value!r}: {hint}")
  for keys, check, expected in (
      (_AT_LEAST_ONE, lambda v: 1 <= v < 2**31, "expected 1 or more, less than 2**31"),
      (_AT_LEAST_ZERO, lambda v: 0 <= v < 2**31, "expected 0 or more, less than 2**31"),
      (_FINITE, lambda v: math.isfinite(v) and v >= 0, "expected a number >= 0"),
      (_POSITIVE, lambda v: math.isfinite(v) and v > 0, "expected a number > 0"),
      (_SHARES, lambda v: 0 <= v <= 1, "expected a share, from 0 to 1"),
      (_POSITIVE_SHARES, lambda v: 0 < v <= 1, "expected more than 0 and at most 1"),
      (("sft.warmup_ratio", "sft.stop_share"), lambda v: 0 <= v < 1, "expected 0 or more and less than 1"),
      (("sft.ema_decay",), lambda v: 0 < v < 1, "expected more than 0 and less than 1")):
    for key in keys:
      require(config, key, check, expected)
  if not all(isinstance(s, str) and s for s in config.sample.stop):
    raise UserError(f"config.sample.stop={config.sample.stop}: expected strings that are not empty")


def _check_adapters(config: ml_collections.ConfigDict) -> None:
  if get_method(config).lora and config.sft.intervention == "weight_masking":
    raise UserError(f"config.sft.intervention=weight_masking: masks weights, and method={config.method} trains "
                    "adapters of them; expected none, gradient_decay or gradient_clipping")
  if get_method(config).lora and config.sft.export != "model":
    raise UserError(f"config.sft.export={config.sft.export}: method={config.method} merges its adapters in the model's "
                    "own dtype; expected model")


def _check_evaluation(config: ml_collections.ConfigDict) -> None:
  if not all(isinstance(k, int) and k >= 1 for k in config.eval.pass_at_k):
    raise UserError(f"config.eval.pass_at_k={config.eval.pass_at_k}: expected whole numbers, 1 or more")
  require(config, "eval.few_shot", lambda v: -1 <= v < 2**31, "expected 0 or more, or -1 for the protocol's own number")
  require(config, "eval.max_new_tokens", lambda v: v == -1 or 1 <= v < 2**31, "expected 1 or more, or -1 for what the "
          "protocol allows")
  if config.eval.num_samples and config.eval.pass_at_k and min(config.eval.pass_at_k) > config.eval.num_samples:
    raise UserError(f"config.eval.pass_at_k={config.eval.pass_at_k}: all are more than "
                    f"eval.num_samples={config.eval.num_samples}")


def _check_shots(config: ml_collections.ConfigDict, named: Tasks) -> None:
  given = ["shots_file"] * bool(named.shots_file) + ["few_shot"] * (config.eval.few_shot > 0)
  if given and all(entry.measure == "choices" for entry in (named.in_domain, *named.ood)):
    verb = "is" if len(named.names) == 1 else "are"
    raise UserError(f"config.eval.{given[0]}={config.eval[given[0]]}: {', '.join(named.names)} {verb} scored by the "
                    "likelihood of the options, without worked examples; leave it out, or " + (
                        "config.eval.by_likelihood, so that answers are written" if named.names == ("custom",) else
                        "take lm_eval's task (config.task.ood=('lm_eval:NAME',) with config.eval.lm_eval.few_shot)"))
  if named.shots_file and not named.get_protocol(named.in_domain).few_shot:
    raise UserError(f"config.eval.shots_file={config.eval.shots_file}: eval.protocol={config.eval.protocol} shows no "
                    "worked examples; give config.eval.few_shot=N, or another eval.protocol")


def _check_temperatures(config: ml_collections.ConfigDict) -> None:
  value = config.sample.temperatures
  rounds = value if isinstance(value, tuple | list) and any(isinstance(t, tuple | list) for t in value) else [value]
  is_valid = lambda t: isinstance(t, int | float) and not isinstance(t, bool) and math.isfinite(t) and t >= 0
  if not all(isinstance(temperatures, tuple | list) and temperatures and all(map(is_valid, temperatures))
             for temperatures in rounds):
    raise UserError(f"config.sample.temperatures={value}: expected one or more numbers >= 0, or such a tuple for each "
                    "round")
  if len(rounds) > config.rounds:
    raise UserError(f"config.sample.temperatures={value}: has {len(rounds)} tuples, config.rounds={config.rounds}")


def _check_sampler(config: ml_collections.ConfigDict) -> None:
  vllm = config.sampler.vllm
  given = [key for key in ("python", "urls", "args", "restart", "sleep") if vllm[key]]
  if config.sampler.kind == "native" and given:
    raise UserError(f"config.sampler.vllm.{given[0]}={vllm[given[0]]!r}: is for sampler.kind=vllm, and sampler.kind is "
                    "native")
  if vllm.urls and (vllm.python or vllm.args):
    raise UserError("config.sampler.vllm.urls: are servers that run elsewhere; python and args are for one that is "
                    "started here. Give one or the other")
  if vllm.urls and vllm.sleep:
    raise UserError("config.sampler.vllm.sleep: is for a server that is started here, and sampler.vllm.urls run "
                    "elsewhere")
  if vllm.restart and not vllm.urls:
    raise UserError(f"config.sampler.vllm.restart={vllm.restart!r}: is for sampler.vllm.urls; a server that is started "
                    "here starts again for each model")
  for key in ("urls", "args"):
    if not all(isinstance(value, str) for value in vllm[key]):
      raise UserError(f"config.sampler.vllm.{key}={vllm[key]}: expected strings")
  try:
    shlex.split(vllm.restart)
  except ValueError as e:
    raise UserError(f"config.sampler.vllm.restart={vllm.restart!r}: {e}") from e
  if len({url.rstrip("/") for url in vllm.urls}) < len(vllm.urls):
    raise UserError(f"config.sampler.vllm.urls={vllm.urls} names a server twice")
  for url in vllm.urls:
    try:
      Server(url)
    except UserError as e:
      raise UserError(f"config.sampler.vllm.urls: {e}") from e


def _check_merge(config: ml_collections.ConfigDict) -> None:
  merge = config.merge
  try:
    quantize_drop_rate(merge.drop_rate)
  except ValueError as e:
    raise UserError(f"config.merge.{e}") from e
  weights = merge.base_weight if isinstance(merge.base_weight, tuple | list) else [merge.base_weight]
  if merge.base_weight != "auto" and not (weights and all(map(_is_weight, weights))):
    raise UserError(f"config.merge.base_weight={merge.base_weight!r}: expected a number from 0 to 1, a list of them "
                    "over the layers, or auto")
  for key, values in (("sweep", merge.sweep), ("auto.weights", merge.auto.weights)):
    if not all(map(_is_weight, values)) or len({f"{value:g}" for value in values}) < len(values):
      raise UserError(f"config.merge.{key}={values}: expected different numbers from 0 to 1")
  if not get_method(config).merge and (merge.sweep or merge.base_weight == "auto"):
    raise UserError(f"config.method={config.method} merges nothing: merge.sweep and merge.base_weight=auto are for "
                    f"{' and '.join(list_merging_methods())}")
  merge_settings.check_merge_options(config)
  if merge.base_weight == "auto" and not (merge.auto.weights and merge.auto.general):
    raise UserError("config.merge.base_weight=auto needs one or more of merge.auto.weights and of merge.auto.general")


def _is_weight(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _check_data(config: ml_collections.ConfigDict) -> None:
  data = config.data
  if get_method(config).data == "worked" and (data.real_fraction or config.teacher):
    raise UserError(f"config.method={config.method} trains only on worked answers: data.real_fraction and teacher "
                    "have no effect with it")
  if data.with_real and get_method(config).data != "accumulation":
    raise UserError(f"config.data.with_real: is for method=data_accumulation; {config.method} has data.real_fraction")
  if data.with_real and data.real_fraction:
    raise UserError("config.data.with_real adds all real answers, so data.real_fraction has no effect with it")
  if config.teacher and data.real_fraction == 1:
    raise UserError("config.data.real_fraction=1 samples nothing, so teacher has no effect with it")
