"""What the adapter_config.json of a LoRA adapter says of the merged weights."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from imm_jax import files
from imm_jax.errors import UserError
from imm_jax.model.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from imm_jax.model.numbers import positive, positive_integer

# Of adapter_config.json: what is read here, and what changes no merged weight.
_KNOWN = frozenset((
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path",
    "auto_mapping", "task_type", "peft_version", "revision", "inference_mode", "lora_dropout", "fan_in_fan_out",
    "bias", "lora_bias", "modules_to_save", "ensure_weight_tying", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "runtime_config", "megatron_core", "qalora_group_size"))
# Initial values that leave the base as it is; others (pissa, olora, corda, loftq) subtract them from it.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


class Settings(NamedTuple):
  """What an adapter_config.json says of the merged weights.

  Attributes:
    source: the name of the file, for messages.
    rank: of modules that no pattern of `ranks` matches; alpha likewise.
    ranks: regex -> rank; a pattern fits the end of a module's name, from a dot or the beginning on.
    rslora: whether updates are divided by sqrt(r).
    targets: regex of the names of all modules with an update; None where the file does not say it alone.
    layers: those with updates; None for all.
    saved: the ends of the names of modules that are stored whole.
    biases: whether every bias is stored.
    lora_bias: whether updates have biases.
  """

  source: str
  rank: int
  alpha: float
  ranks: Mapping[str, int]
  alphas: Mapping[str, float]
  rslora: bool
  targets: re.Pattern[str] | None
  layers: frozenset[int] | None
  saved: tuple[str, ...]
  biases: bool
  lora_bias: bool

  def rank_and_scale(self, module: str) -> tuple[int, float]:
    """Of a module such as `model.layers.0.self_attn.q_proj`."""
    rank, alpha = _matched(self.ranks, module, self.rank), _matched(self.alphas, module, self.alpha)
    return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def read_settings(folder: Path, *, source: str | None = None) -> Settings:
  """Reads adapter_config.json of a folder.

  Args:
    folder: an adapter's.
    source: what messages call it; by default the folder.

  Raises:
    UserError: for another method than LoRA, DoRA and other variants, and every key that may change the result and is
      not supported.
  """
  source = f"{source or folder}/{ADAPTER_CONFIG}"
  if not (folder / ADAPTER_CONFIG).is_file():
    raise UserError(f"{folder}: {f'has no {ADAPTER_CONFIG}' if folder.is_dir() else 'no such folder'}; expected a LoRA "
                    f"adapter with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")
  config = files.read_json(folder / ADAPTER_CONFIG)
  if config.get("peft_type") != "LORA":
    raise UserError(f"{source}: peft_type={config.get('peft_type')!r} is not supported; expected 'LORA'")
  if config.get("use_dora"):
    raise UserError(f"{source}: use_dora=true (DoRA) is not supported; merge it with peft's merge_and_unload, and give "
                    "the folder that its save_pretrained writes")
  for key, value in config.items():
    if key not in _KNOWN and value:
      raise UserError(f"{source}: {key}={value!r:.200} is not supported: it may change the merged weights")
  if (init := config.get("init_lora_weights", True)) not in _INITS:
    raise UserError(f"{source}: init_lora_weights={init!r} is not supported: the adapter belongs to a base that this "
                    "has changed; save it with peft's path_initial_model_for_weight_conversion")
  patterns = {}
  for key, number in (("rank_pattern", positive_integer), ("alpha_pattern", positive)):
    given = config.get(key) or {}
    if not isinstance(given, dict):
      _refuse(source, key, given, "an object")
    patterns[key] = {_checked(source, key, name): number(source, f"{key}.{name}", v) for name, v in given.items()}
  rslora = config.get("use_rslora") or False
  if not isinstance(rslora, bool):
    _refuse(source, "use_rslora", rslora, "true or false")
  if (bias := config.get("bias", "none")) not in ("none", "all", "lora_only"):
    _refuse(source, "bias", bias, "'none', 'all' or 'lora_only'")
  layers, saved = config.get("layers_to_transform"), config.get("modules_to_save") or []
  layers = [layers] if isinstance(layers, int) else layers or None
  if layers is not None and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
    _refuse(source, "layers_to_transform", layers, "an integer or a list of them")
  if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
    _refuse(source, "modules_to_save", saved, "a list of names")
  return Settings(
      source, positive_integer(source, "r", config.get("r", 8)),
      positive(source, "lora_alpha", config.get("lora_alpha", 8)),
      patterns["rank_pattern"], patterns["alpha_pattern"], rslora, _targets(source, config),
      None if layers is None else frozenset(layers), tuple(saved), bias == "all",
      bool(config.get("lora_bias")))


def _targets(source: str, config: Mapping[str, Any]) -> re.Pattern[str] | None:
  """peft matches a text as a regex of whole names, and the names of a list with the ends of names."""
  given = config.get("target_modules")
  if not given or given == "all-linear" or config.get("exclude_modules"):
    return None
  if isinstance(given, str):
    _checked(source, "target_modules", given)
    return re.compile(given)
  if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
    _refuse(source, "target_modules", given, "a list of names or a regex")
  return re.compile(rf"(.*\.)?({'|'.join(map(re.escape, given))})")


def _matched(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
  """Of the first pattern that fits; as peft's get_pattern_key."""
  return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _checked(source: str, key: str, pattern: str) -> str:
  try:
    re.compile(rf"(.*\.)?({pattern})$")
  except re.error as e:
    raise UserError(f"{source}: {key}: {pattern!r} is no regex ({e})") from e
  return pattern


def _refuse(source: str, key: str, value: Any, expected: str) -> Any:
  raise UserError(f"{source}: {key}={value!r:.200}; expected {expected}")
