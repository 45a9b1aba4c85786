"""What a merge is made of, and mergekit's YAML as one way to say it.

mergekit's file names models, a method and parameters; each parameter is a value, a list over the layers, or a list of
`{filter: part of a tensor name, value: ...}` of which the first that fits counts. The methods here are its methods,
with these differences: arithmetic is float32 whatever `dtype` says (which, without `out_dtype`, is what is written);
`ties` trims over the whole model; `rescale` divides by the share that stays, where mergekit restores the L1 norm.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import yaml

from imm_jax.errors import UserError, nearest
from imm_jax.merging import registry
from imm_jax.merging.options import REQUIRED, Option
from imm_jax.model import hub

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
# Accepted and without effect: mergekit saves memory with it.
_IDLE = {"int8_mask"}
# What mergekit accepts where it changes nothing.
_WITHOUT_EFFECT = (("rescale", False), ("filter_wise", False))
# By method: its options by the keys that recipes have for them (imm and iimm are not mergekit's).
_OPTIONS = {name: {option.key: option for option in method.options}
            for name, method in registry.on_disk().items() if name not in ("imm", "iimm")}
_KEYS = {"merge_method", "base_model", "models", "parameters", "dtype", "out_dtype"}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A merge: a method, the models by label in the order the method takes them, its options, the dtype to write."""

  method: str
  models: Mapping[str, Path]
  options: Mapping[str, Any]
  dtype: str | None = None


def read(path: Path) -> Recipe:
  """Reads mergekit's YAML.

  Raises:
    UserError: for a file that is no such recipe, and for a key or method that is not supported; it is named.
  """
  try:
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
  except OSError as e:
    raise UserError(f"{path}: cannot be read ({e.strerror})") from e
  except (yaml.YAMLError, UnicodeDecodeError) as e:
    raise UserError(f"{path}: is not YAML ({' '.join(str(e).split())})") from e
  if not isinstance(raw, dict):
    raise UserError(f"{path}: expected a mapping with merge_method and models")
  _refuse_unknown(path, "", raw, _KEYS)
  method = raw.get("merge_method")
  if method not in _OPTIONS:
    raise UserError(f"{path}: merge_method={method!r}: {nearest(str(method), sorted(_OPTIONS))}")
  models = raw.get("models")
  if not isinstance(models, list) or not models or not all(isinstance(m, dict) and "model" in m for m in models):
    raise UserError(f"{path}: models: expected a list of entries with the key model")
  for i, entry in enumerate(models):
    _refuse_unknown(path, f"models[{i}].", entry, {"model", "parameters"})
  known = _OPTIONS[method]
  each = {key: option for key, option in known.items() if option.per_model}
  shared = _parameters(path, "parameters", raw.get("parameters"), known)
  base = raw.get("base_model")
  if base is None and method != "linear":
    raise UserError(f"{path}: base_model is missing; {method} needs one")
  others = [m for m in models if method == "linear" or m["model"] != base]
  own = [_parameters(path, f"models[{i}].parameters", m.get("parameters"), each) for i, m in enumerate(others)]
  options: dict[str, Any] = {known[key].name: value for key, value in shared.items() if key not in each}
  if method == "slerp" and (len(others) != 1 or "t" not in options):
    raise UserError(f"{path}: slerp takes base_model, one other model, and parameters.t")
  for key, option in each.items():
    options[option.name] = [_inherit(path, option, i, mine.get(key), shared.get(key)) for i, mine in enumerate(own)]
  labels = {} if method == "linear" else {"base": _folder(path, base)}
  labels |= {f"models[{i}]": _folder(path, m["model"]) for i, m in enumerate(others)}
  dtype = raw.get("out_dtype") or raw.get("dtype")
  if dtype is not None and dtype not in DTYPES:
    raise UserError(f"{path}: dtype={dtype!r}: {nearest(str(dtype), list(DTYPES))}")
  return Recipe(method, labels, options, dtype)


def build(source: Any, recipe: Recipe) -> Any:
  """The plan of a recipe's method; what its options have wrong is a UserError."""
  try:
    return registry.METHODS[recipe.method](source, **recipe.options)
  except (TypeError, ValueError) as e:
    raise UserError(f"{recipe.method}: {e}") from e


def _parameters(path: Path, where: str, raw: Any, known: Mapping[str, Option]) -> dict[str, Any]:
  """Parameters as settings of ours: filters become regexes."""
  if raw is None:
    return {}
  if not isinstance(raw, dict):
    raise UserError(f"{path}: {where}: expected a mapping")
  _refuse_unknown(path, f"{where}.", {k: v for k, v in raw.items() if k in known or (k, v) not in _WITHOUT_EFFECT},
                  known.keys() | _IDLE)
  return {key: (_flag if known[key].kind == "flag" else _setting)(path, f"{where}.{key}", value)
          for key, value in raw.items() if key in known}


def _flag(path: Path, where: str, value: Any) -> bool:
  if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and set(value[0]) == {"value"}:
    value = value[0]["value"]
  if not isinstance(value, bool | int) or value not in (0, 1):
    raise UserError(f"{path}: {where}={value!r}: expected true or false, the same for all tensors")
  return bool(value)


def _setting(path: Path, where: str, value: Any) -> Any:
  if isinstance(value, dict):
    value = [value]
  if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
    patterns: dict[str, Any] = {}
    for condition in value:
      _refuse_unknown(path, f"{where}.", condition, {"filter", "value"})
      if "value" not in condition:
        raise UserError(f"{path}: {where}: an entry has no value")
      part = condition.get("filter")
      patterns.setdefault("" if part in (None, "*") else re.escape(str(part)),
                          _setting(path, where, condition["value"]))
    return patterns
  if isinstance(value, bool):
    return value
  try:
    # YAML reads 1e-3 as a text.
    return [float(v) for v in value] if isinstance(value, list) and value else float(value)
  except (TypeError, ValueError) as e:
    raise UserError(f"{path}: {where}={value!r}: expected a number, a list of numbers, or a list of filters") from e


def _inherit(path: Path, option: Option, index: int, own: Any, shared: Any) -> Any:
  """A model's own setting; where its filters do not fit, the recipe's; then the default."""
  # Recipes leave nothing out but densities, which are 1 then.
  default = {"density": 1.0, "weight": None}.get(option.key, option.default)
  default = None if default is REQUIRED else default
  if own is None and shared is None and default is None:
    raise UserError(f"{path}: models[{index}].parameters.{option.key} is missing")
  patterns: dict[str, Any] = {}
  for setting in (own, shared, default):
    if setting is not None:
      for pattern, value in (setting.items() if isinstance(setting, dict) else [("", setting)]):
        patterns.setdefault(pattern, value)
  first = next(iter(patterns))
  return patterns[first] if first == "" else patterns


def _refuse_unknown(path: Path, where: str, raw: Mapping[str, Any], known: set[str]) -> None:
  for key in raw:
    if key not in known:
      hint = nearest(str(key), sorted(known)) if known else "expected none here"
      raise UserError(f"{path}: {where}{key} is not supported; {hint}")


def _folder(path: Path, model: Any) -> Path:
  if not isinstance(model, str):
    raise UserError(f"{path}: model {model!r}: expected a folder or a hub id")
  return hub.resolve(model)
