"""Checks a config before anything is spent."""

import math
from collections.abc import Callable
from typing import Any

import ml_collections

from imm_jax import tasks
from imm_jax.errors import UserError, nearest
from imm_jax.merging import quantise_drop_rate
from imm_jax.model import attention
from imm_jax.model.decoder import REMAT
from imm_jax.training import throughput

METHODS = ("imm", "star", "real")
DTYPES = ("bfloat16", "float32")
# Keys that say how a run is computed, not what: they may change between two starts of it.
HOW = ("mesh", "profile", "sft.accumulation", "sft.attention", "sft.log_every", "sft.max_to_keep", "sft.remat",
       "sft.save_interval", "sft.state_dir")


def validate(config: ml_collections.ConfigDict) -> None:
  """Raises UserError for the first value that cannot work: its key, the value, what would be right.

  What depends on the machine (mesh, batch over devices) is checked when the devices are known, in `stages`.
  """
  one_of = [("method", METHODS), ("task.name", tasks.NAMES), ("sft.schedule", ("cosine", "linear", "constant")),
            ("merge.delta_ref", ("start", "base")), ("sft.compute_dtype", DTYPES), ("sample.compute_dtype", DTYPES),
            ("sft.remat", tuple(REMAT)), ("sft.attention", attention.BACKENDS)]
  for key, allowed in one_of:
    value = _get(config, key)
    if value not in allowed:
      raise UserError(f"config.{key}={value!r}: {nearest(str(value), list(allowed))}")
  for name in config.task.ood:
    if name not in tasks.NAMES:
      raise UserError(f"config.task.ood has {name!r}: {nearest(str(name), list(tasks.NAMES))}")
    if name == config.task.name:
      raise UserError(f"config.task.ood has {name!r}, which is the in-domain task")
  if len(set(config.task.ood)) < len(config.task.ood):
    raise UserError(f"config.task.ood={config.task.ood} names a task twice")
  for key in ("rounds", "task.questions_per_round", "task.eval_questions", "sample.num_samples",
              "sample.max_new_tokens", "sample.batch_size", "sft.epochs", "sft.global_batch", "sft.accumulation",
              "sft.row_length", "sft.log_every", "sft.save_interval", "sft.max_to_keep", "eval.max_new_tokens",
              "eval.batch_size"):
    require(config, key, lambda v: 1 <= v < 2**31, "expected 1 or more, less than 2**31")
  for key in ("seed", "prompt.few_shot"):
    require(config, key, lambda v: v >= 0, "expected 0 or more")
  for key in ("sft.weight_decay", "sft.grad_clip"):
    require(config, key, lambda v: math.isfinite(v) and v >= 0, "expected a number >= 0")
  require(config, "sft.learning_rate", lambda v: math.isfinite(v) and v > 0, "expected a number > 0")
  require(config, "sft.warmup_ratio", lambda v: 0 <= v < 1, "expected 0 <= warmup_ratio < 1")
  require(config, "sample.top_p", lambda v: 0 < v <= 1, "expected 0 < top_p <= 1")
  require(config, "merge.base_weight", lambda v: 0 <= v <= 1, "expected 0 <= base_weight <= 1")
  require(config, "seed", lambda v: v < 2**32, "expected less than 2**32")
  if not all(isinstance(s, str) and s for s in config.sample.stop):
    raise UserError(f"config.sample.stop={config.sample.stop}: expected strings that are not empty")
  if not config.sample.temperatures or not all(
      isinstance(t, int | float) and math.isfinite(t) and t >= 0 for t in config.sample.temperatures):
    raise UserError(f"config.sample.temperatures={config.sample.temperatures}: expected one or more numbers >= 0")
  try:
    throughput.window(config.profile)
  except ValueError as e:
    raise UserError(f"config.profile={e}") from e
  try:
    quantise_drop_rate(config.merge.drop_rate)
  except ValueError as e:
    raise UserError(f"config.merge.{e}") from e
  try:
    tasks.load(config.task.name, split="train", seed=config.seed,
               count=config.prompt.few_shot + config.rounds * config.task.questions_per_round)
  except ValueError as e:
    raise UserError(f"config.task.questions_per_round={config.task.questions_per_round} in {config.rounds} rounds: {e}"
                    ) from e
  for name in (config.task.name, *config.task.ood):
    try:
      tasks.load(name, split="test", count=config.task.eval_questions, seed=0)
    except ValueError as e:
      raise UserError(f"config.task.eval_questions={config.task.eval_questions}: {e}") from e


def _get(config: ml_collections.ConfigDict, key: str) -> Any:
  for part in key.split("."):
    if part not in config:
      raise UserError(f"the config has no key {key}; is --config the right file?")
    config = config[part]
  return config


def require(config: ml_collections.ConfigDict, key: str, check: Callable[[Any], bool], expected: str) -> None:
  """Raises UserError unless the value at `key` (`sft.epochs`) passes."""
  value = _get(config, key)
  if not check(value):
    raise UserError(f"config.{key}={value}: {expected}")
