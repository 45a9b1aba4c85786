"""The inputs of a merging method in a round: the models, and the options for a given base weight.

`merge.base_weight` has the same meaning for every method with a strength option, so that sweeps, lists over the layers
and `auto` work with all of them: a mean gives the base that weight, and a task vector is scaled by the complement.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from imm_jax import files
from imm_jax.errors import UserError, suggest
from imm_jax.merging import registry, users_kernels
from imm_jax.merging.trees import Setting
from imm_jax.methods import get_merge_method

# Options that are settings of their own in a run, or that it measures.
_NOT_GIVEN = ("base_weight", "drop_rate", "importance")


class MergeSettings(NamedTuple):
  """Holds what a config says about the merge of each round, except the base weight.

  Attributes:
    method: name of the merging method.
    options: the options that are given to it.
    drop_rate: DARE's, also of methods that take a density.
    delta_ref: `start` or `base`, the model that the delta is relative to.
  """

  method: str
  options: Mapping[str, Any]
  drop_rate: float
  delta_ref: str

  @property
  def weighs(self) -> bool:
    """Returns whether `merge.base_weight` has an effect: the method has a strength that no option overrides."""
    return has_strength(self.method) and not self.fixed_by

  @property
  def fixed_by(self) -> str:
    """Returns the given option that overrides `merge.base_weight`; empty if there is none."""
    method = registry.METHODS[self.method]
    if (strength := method.strength_option) in self.options:
      return strength
    # A single task vector has the normalized weight 1.
    return "normalize" if strength == "weights" and "base" in method.inputs and self.options.get("normalize") else ""

  @property
  def needs_importance(self) -> bool:
    """Returns whether the method takes the importance of layers, which the run then measures."""
    return bool(self.method) and "importance" in registry.METHODS[self.method].by_option

  def collect_models(self, *, base: Path, start: Path, tuned: Sequence[Path]) -> dict[str, Path] | None:
    """Returns the folders that the method merges, by label and in its order; None if there are too few models yet.

    Args:
      base: the base model.
      start: the model that the round started from.
      tuned: the tuned models of all rounds so far. A method that merges several models with a base gets all of them,
        other methods the last one.
    """
    method = registry.METHODS[self.method]
    by_name = {"base": base, "start": base if self.delta_ref == "base" else start, "tuned": tuned[-1],
               "other": tuned[-1]}
    models = [*tuned] if method.min_models > 1 else [tuned[-1]]
    models = models if "base" in method.inputs else [base, tuned[-1]]
    if "models" in method.inputs and len(models) < method.min_models:
      return None
    folders: dict[str, Path] = {}
    for name in method.inputs:
      if name == "models":
        folders |= {f"models[{i}]": model for i, model in enumerate(models)}
      elif name in by_name:
        folders[name] = by_name[name]
    return folders

  def collect_options(self, weight: Setting, importance: Path | None) -> dict[str, Any]:
    """Returns the options of the method for a base weight."""
    method = registry.METHODS[self.method]
    strength, result = method.strength_option, {}
    for option in method.options:
      if option.name in self.options:
        result[option.name] = self.options[option.name]
      elif option.name == strength:
        result[strength] = self.get_strength(weight)
      elif option.name == "normalize" and strength == "weights" and "base" in method.inputs:
        result["normalize"] = False  # with a single model it would cancel the weight
      elif option.name == "drop_rate":
        result["drop_rate"] = self.drop_rate
      elif option.name == "densities":
        result["densities"] = 1 - self.drop_rate
      elif option.name == "importance":
        result["importance"] = files.read_json(importance)["layers"]
      elif option.suggested is not registry.REQUIRED:
        result[option.name] = option.suggested
    return result

  def get_strength(self, weight: Setting) -> Any:
    """Returns what the method's strength option gets for a base weight."""
    method = registry.METHODS[self.method]
    if method.is_base_weight:
      return weight
    if not method.by_option[method.strength_option].per_model:
      return complement(weight)
    # One setting per model: a setting may itself be a list over the layers.
    return [*([] if "base" in method.inputs else [weight]), complement(weight)]

  def describe_strength(self, weight: Any) -> str:
    """Describes what the method gets for the config's base weight, where that is not the weight itself."""
    method = registry.METHODS[self.method]
    name = method.strength_option
    if name == "base_weight":
      return ""
    if weight == "auto":
      return f" ({name} {'base_weight' if method.is_base_weight else '1 - base_weight'})"
    given = self.get_strength(weight)
    return f" ({name} {_format(given[0] if method.by_option[name].per_model and len(given) == 1 else given)})"

  def to_json(self) -> dict[str, Any]:
    """Returns the settings as the stages of a merge record them, for a method of the user's own also its code."""
    code = users_kernels.digest_code(registry.METHODS[self.method].kernel)
    return {"method": self.method, "drop_rate": self.drop_rate, "delta_ref": self.delta_ref, "options": self.options,
            **({"code": code} if code else {})}


def get_settings(config: ml_collections.ConfigDict) -> MergeSettings:
  """Returns what a config says about merges; the method is empty if nothing is merged."""
  merge = config.merge
  options = {name: value for name, value in merge.options.to_dict().items() if value is not None}
  return MergeSettings(get_merge_method(config.method, merge.method), options, merge.drop_rate, merge.delta_ref)


def complement(weight: Setting) -> Setting:
  """Returns 1 - weight for each number of a setting.

  >>> complement(0.25), complement([0.0, 1.0]), complement({"mlp": 0.5, ".*": [1.0, 0.5]})
  (0.75, [1.0, 0.0], {'mlp': 0.5, '.*': [0.0, 0.5]})
  """
  if isinstance(weight, Mapping):
    return {pattern: complement(value) for pattern, value in weight.items()}
  return [1 - value for value in weight] if isinstance(weight, Sequence) else 1 - weight


def _format(setting: Any) -> str:
  """Formats a setting with the digits that people write: 1 - 0.9 as 0.1."""
  if isinstance(setting, Mapping):
    return f"{{{', '.join(f'{pattern!r}: {_format(value)}' for pattern, value in setting.items())}}}"
  return f"[{', '.join(map(_format, setting))}]" if isinstance(setting, Sequence) else f"{setting:g}"


def has_strength(method: str) -> bool:
  """Returns whether a merging method has a strength option, which the base weight sets."""
  return bool(registry.METHODS[method].strength_option)


def check_merge_options(config: ml_collections.ConfigDict) -> None:
  """Raises UserError for a merging method that rounds cannot use, or options that it does not have."""
  settings = get_settings(config)
  name, given = settings.method, settings.options
  if config.merge.method and not name:
    raise UserError(f"config.merge.method={config.merge.method}: method={config.method} merges nothing")
  if not name:
    if given:
      raise UserError(f"config.merge.options.{next(iter(given))}: method={config.method} merges nothing")
    return
  known = registry.list_round_methods()
  if name not in known:
    reason = f"is not for rounds; expected one of: {', '.join(known)}" if name in registry.METHODS else suggest(
        name, [*known])
    raise UserError(f"config.merge.method={name!r}: {reason}; a method of your own is registered in the config file")
  method = known[name]
  for option, value in given.items():
    if option not in method.by_option or option in _NOT_GIVEN:
      raise UserError(f"config.merge.options.{option}: is no option of {name}{_describe_options(method, option)}")
    known_option, several = method.by_option[option], isinstance(value, tuple | list)
    try:
      for number in value if several and known_option.kind == "number" else [value]:
        known_option.check(number)
    except ValueError as e:
      raise UserError(f"config.merge.options.{e}") from e
    count = 1 if "base" in method.inputs else 2  # models that a round merges with methods that have such options
    if several and (not value or (known_option.per_model and len(value) != count)):
      models = "the tuned one" if count == 1 else "the base and the tuned one"
      raise UserError(f"config.merge.options.{option}={value!r}: expected a number" + (
          f", or {count} of them, for {models}" if known_option.per_model else ", or a list of them over the layers"))
  for option in method.options:
    if option.suggested is registry.REQUIRED and option.name not in {
        *given, "densities", "drop_rate", "importance", method.strength_option}:
      raise UserError(f"config.merge.options.{option.name}: merge.method={name} needs it ({option.help}; "
                      f"{option.range})")
  if not settings.weighs and (config.merge.sweep or config.merge.base_weight == "auto"):
    reason = (f"options.{settings.fixed_by}: overrides base_weight" if has_strength(name) else
              f"method={name}: has no weight of the base")
    raise UserError(f"config.merge.{reason}, so merge.sweep and base_weight=auto have no effect with it")


def _describe_options(method: registry.MergeMethod, option: str) -> str:
  """Says where a method's options are set, for the message about one that it does not have."""
  options = [name for name in method.by_option if name not in _NOT_GIVEN]
  if options:
    return f"; {suggest(option, options)}"
  keys = ["merge.base_weight"] * has_strength(method.name) + ["merge.drop_rate"] * ("drop_rate" in method.by_option)
  return f", which takes none here; it has {' and '.join(f'config.{key}' for key in keys)}" if keys else (
      ", which has no options")
