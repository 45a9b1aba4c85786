"""Reads the adapter_config.json of a LoRA adapter, as far as it affects the merged weights."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from imm_jax import files
from imm_jax.errors import UserError
from imm_jax.model.checkpoint_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from imm_jax.model.json_numbers import parse_positive, parse_positive_integer

# Keys that are read here, or that do not affect merged weights.
_KNOWN_KEYS = frozenset((
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path",
    "auto_mapping", "task_type", "peft_version", "revision", "inference_mode", "lora_dropout", "fan_in_fan_out",
    "bias", "lora_bias", "modules_to_save", "ensure_weight_tying", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "runtime_config", "megatron_core", "qalora_group_size"))
# Initializations that leave the base unchanged; others (pissa, olora, corda, loftq) subtract them from it.
_NEUTRAL_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


class AdapterConfig(NamedTuple):
  """Holds the settings of an adapter_config.json that affect the merged weights.

  Attributes:
    source: name of the file, for messages.
    rank: rank of modules that no pattern in `ranks` matches.
    alpha: alpha of modules that no pattern in `alphas` matches.
    ranks: regex -> rank; a pattern matches the end of a module's name, after a dot or from its beginning.
    alphas: regex -> alpha.
    rslora: whether updates are divided by sqrt(r).
    targets: regex of the names of all modules with an update; None if the file alone does not determine them.
    layers: layers with updates; None for all.
    saved: suffixes of the names of modules that are stored whole.
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
    """Returns rank and scale of a module such as `model.layers.0.self_attn.q_proj`."""
    rank, alpha = _match_pattern(self.ranks, module, self.rank), _match_pattern(self.alphas, module, self.alpha)
    return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def read_adapter_config(folder: Path, *, source: str | None = None) -> AdapterConfig:
  """Reads adapter_config.json of a folder.

  Args:
    folder: folder of an adapter.
    source: name of the adapter in messages; by default the folder.

  Raises:
    UserError: for methods other than LoRA, for DoRA and other variants, and for any unsupported key that may change the
      result.
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
    if key not in _KNOWN_KEYS and value:
      raise UserError(f"{source}: {key}={value!r:.200} is not supported: it may change the merged weights")
  if (init := config.get("init_lora_weights", True)) not in _NEUTRAL_INITS:
    raise UserError(f"{source}: init_lora_weights={init!r} is not supported: the adapter belongs to a base that this "
                    "has changed; save it with peft's path_initial_model_for_weight_conversion")
  patterns = {}
  for key, parse in (("rank_pattern", parse_positive_integer), ("alpha_pattern", parse_positive)):
    value = config.get(key) or {}
    if not isinstance(value, dict):
      _fail(source, key, value, "an object")
    patterns[key] = {_check_regex(source, key, name): parse(source, f"{key}.{name}", v) for name, v in value.items()}
  rslora = config.get("use_rslora") or False
  if not isinstance(rslora, bool):
    _fail(source, "use_rslora", rslora, "true or false")
  if (bias := config.get("bias", "none")) not in ("none", "all", "lora_only"):
    _fail(source, "bias", bias, "'none', 'all' or 'lora_only'")
  layers, saved = config.get("layers_to_transform"), config.get("modules_to_save") or []
  layers = [layers] if isinstance(layers, int) else layers or None
  if layers is not None and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
    _fail(source, "layers_to_transform", layers, "an integer or a list of them")
  if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
    _fail(source, "modules_to_save", saved, "a list of names")
  return AdapterConfig(
      source, parse_positive_integer(source, "r", config.get("r", 8)),
      parse_positive(source, "lora_alpha", config.get("lora_alpha", 8)),
      patterns["rank_pattern"], patterns["alpha_pattern"], rslora, _compile_targets(source, config),
      None if layers is None else frozenset(layers), tuple(saved), bias == "all",
      bool(config.get("lora_bias")))


def _compile_targets(source: str, config: Mapping[str, Any]) -> re.Pattern[str] | None:
  """Compiles target_modules. As in peft, a string is a regex of whole names, a list holds suffixes of names."""
  value = config.get("target_modules")
  if not value or value == "all-linear" or config.get("exclude_modules"):
    return None
  if isinstance(value, str):
    _check_regex(source, "target_modules", value)
    return re.compile(value)
  if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
    _fail(source, "target_modules", value, "a list of names or a regex")
  return re.compile(rf"(.*\.)?({'|'.join(map(re.escape, value))})")


def _match_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
  """Returns the value of the first pattern that matches, as peft's get_pattern_key does."""
  return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _check_regex(source: str, key: str, pattern: str) -> str:
  try:
    re.compile(rf"(.*\.)?({pattern})$")
  except re.error as e:
    raise UserError(f"{source}: {key}: {pattern!r} is no regex ({e})") from e
  return pattern


def _fail(source: str, key: str, value: Any, expected: str) -> NoReturn:
  raise UserError(f"{source}: {key}={value!r:.200}; expected {expected}")
