"""Reads the parameters of a mergekit recipe: values, lists over the layers, and filters by parts of tensor names.

A parameter may stand on several levels, from a model's own to the file's; the first level that has one for a tensor
decides.
"""

import re
from collections.abc import Sequence
from typing import Any

from imm_jax.merging.options import REQUIRED, Option
from imm_jax.merging.recipes.recipe_file import RecipeFile
from imm_jax.merging.registry import MergeMethod

# Parameters that mergekit or its older versions accept and that have no effect here.
IGNORED = {"int8_mask", "embed_slerp", "normalize", "rescale"}
# A place in the file and what stands there.
Level = tuple[str, Any]


def check_keys(file: RecipeFile, method: MergeMethod, level: Level, known: set[str], *, of_model: bool = False) -> None:
  """Refuses parameters that no method takes; what has no effect is noted: another method's, a common one of a model.

  Args:
    file: the recipe file.
    method: the method of the recipe.
    level: the parameters.
    known: the parameters of all methods.
    of_model: whether they are one model's own.
  """
  where, raw = level
  if raw is None:
    return
  file.read_mapping(where, raw, "a mapping")
  options = {option.key: option for option in method.options}
  if raw.get("rescale") and "rescale" not in options and "density" in options:
    file.fail(f"{where}.rescale: {method.name} does not rescale; mergekit restores the L1 norm of what it trims")
  file.check_known(f"{where}.", raw, set(options), known | IGNORED)
  for key in sorted(raw.keys() - (set() if of_model else options.keys())):
    if key in options and not options[key].per_model:
      file.note(f"{where}.{key} has no effect: it is one for all models, and belongs under the file's parameters")
    elif key not in options and key not in IGNORED:
      file.note(f"{where}.{key} has no effect on {method.name}")


def inherit_setting(file: RecipeFile, method: MergeMethod, option: Option, where: str, levels: Sequence[Level]) -> Any:
  """Returns an option's setting from the first level that has it; unmatched filters fall through to the next.

  Args:
    file: the recipe file.
    method: the method of the recipe.
    option: the option to read.
    where: the place where it is expected, for messages, such as `models[0].parameters`.
    levels: the levels, innermost first.

  Raises:
    UserError: if it is missing or no setting of the option's kind.
  """
  given = [(f"{place}.{option.key}", level[option.key]) for place, level in levels
           if isinstance(level, dict) and level.get(option.key) is not None]
  # In recipes densities default to 1, and weights must be given.
  default = {"density": 1.0, "weight": REQUIRED}.get(option.key, option.suggested)
  if not given and default is REQUIRED:
    file.fail(f"{where}.{option.key} is missing; {method.name} needs it")
  if not given:
    return default
  if option.kind == "flag":
    return _inherit_flag(file, given, default)
  if option.kind != "number":
    return _read_constant(file, option, *given[0])
  patterns: dict[str, Any] = {}
  for setting in (*(_read_numbers(file, *item) for item in given), *([] if default is REQUIRED else [default])):
    for pattern, value in (setting.items() if isinstance(setting, dict) else [("", setting)]):
      patterns.setdefault(pattern, value)
  first = next(iter(patterns))
  return patterns[first] if first == "" else patterns


def _inherit_flag(file: RecipeFile, given: Sequence[Level], default: bool) -> bool:
  """Returns a flag, which must be the same for all tensors."""
  values = []
  for where, raw in given:
    conditions = _as_conditions(file, where, raw) or {"": raw}
    for value in conditions.values():
      values += [file.read_flag(where, v) for v in (value if isinstance(value, list) and value else [value])]
    if "" in conditions:
      break
  else:
    values.append(default)
  if len(set(values)) > 1:
    file.fail(f"{given[0][0]}={given[0][1]!r}: expected true or false, the same for all tensors")
  return values[0]


def _read_constant(file: RecipeFile, option: Option, where: str, value: Any) -> Any:
  """Reads a setting that holds for the whole merge."""
  conditions = _as_conditions(file, where, value)
  if conditions is not None and set(conditions) == {""}:
    value = conditions[""]
  if option.kind == "integer":
    return file.read_integer(where, value, option.range)
  return _read_numbers(file, where, value) if option.kind in ("constant", "vector") else value


def _read_numbers(file: RecipeFile, where: str, value: Any) -> Any:
  """Reads a number, a list over the layers, or filters, which become a mapping from regexes."""
  conditions = _as_conditions(file, where, value)
  if conditions is not None:
    return {pattern: _read_numbers(file, where, part) for pattern, part in conditions.items()}
  values = value if isinstance(value, list) and value else [value]
  try:
    if any(isinstance(v, bool) for v in values):  # float would take it for 0 or 1
      raise TypeError
    numbers = [float(v) for v in values]  # YAML parses 1e-3 as a string
    return numbers if values is value else numbers[0]
  except (TypeError, ValueError):
    file.fail(f"{where}={value!r}: expected a number, a list of numbers, or a list of filters")


def _as_conditions(file: RecipeFile, where: str, value: Any) -> dict[str, Any] | None:
  """Returns the values of a list of `{filter, value}` by the regexes of their filters; None if it is no such list."""
  if isinstance(value, dict):
    value = [value]
  if not isinstance(value, list) or not value or not all(isinstance(v, dict) for v in value):
    return None
  patterns: dict[str, Any] = {}
  for condition in value:
    file.check_known(f"{where}.", condition, {"filter", "value"})
    if "value" not in condition:
      file.fail(f"{where}: an entry has no value")
    part = condition.get("filter")
    patterns.setdefault("" if part in (None, "*") else re.escape(str(part)), condition["value"])
  return patterns
