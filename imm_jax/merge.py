"""Merges HF checkpoints on disk.

    imm merge --method=imm --base=BASE --start=START --tuned=TUNED --out=OUT --base_weight=0.5
    imm merge --method=imm --base=BASE --tuned=TUNED --out=OUT --sweep_base_weight=0.1,0.3,0.5
    imm merge --method=linear --models=A,B --weights='[0.3, 0.7]' --out=OUT
    imm merge --method=ties --base=BASE --models=A,B --weights=1 --densities=0.2 --out=OUT
    imm merge --recipe=mergekit.yml --out=OUT
    imm merge --import=mine.py --method=mine --base=BASE --models=A --out=OUT

A setting is YAML: a number, a list over the layers, or a mapping from regex to either. A setting per model is one of
these for all models, or a list with one for each. An error leaves no partial OUT; merge.json in it records how it was
made.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# The disk limits the speed of merging, so an accelerator would be started for nothing. jax reads this when it is
# imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import yaml
from absl import flags

from imm_jax import cli, files
from imm_jax.errors import UserError, suggest
from imm_jax.formatting import format_size
from imm_jax.merging import registry
from imm_jax.merging.options import REQUIRED, Option
from imm_jax.merging.recipes import command, mergekit
from imm_jax.merging.recipes.command import OutputOptions
from imm_jax.merging.recipes.documents import Documents
from imm_jax.merging.recipes.recipe import DTYPES, OptionError, Recipe, Slice
from imm_jax.merging.recipes.recipe_file import YamlLoader, describe_yaml_error
from imm_jax.merging.registry import MergeMethod
from imm_jax.model import hub

_IMPORT = flags.DEFINE_multi_string("import", [], "A Python file that registers merging methods of your own; their "
                                    "options become flags.")


def _import_files(arguments: list[str]) -> None:
  """Imports the files that --import names, before the flags of their methods' options are made."""
  for name, following in itertools.pairwise([*arguments, ""]):
    flag, is_set, value = name.partition("=")
    if flag in ("--import", "-import"):
      try:
        registry.load_file(Path(value if is_set else following))
      except UserError as e:
        sys.exit(f"error: {e}")


_import_files(sys.argv[1:])
_METHODS = registry.list_disk_methods()
_METHOD = flags.DEFINE_enum("method", "imm", list(_METHODS), "The merging method, without --recipe. " + " ".join(
    f"{name}: {method.summary}." for name, method in _METHODS.items()))
_BASE = flags.DEFINE_string("base", None, "The base model: an HF folder, a hub id or BASE+ADAPTER.")
_START = flags.DEFINE_string("start", None, "For imm and iimm: the model that SFT started from, in the form of --base; "
                              "by default the base.")
_TUNED = flags.DEFINE_string("tuned", None, "For imm and iimm: the model after SFT, in the form of --base.")
_MODELS = flags.DEFINE_list("models", [], "For other methods: the models, A,B,..., each in the form of --base; without "
                            "the base.")
_OUT = flags.DEFINE_string("out", None, "The folder to write; with --sweep_base_weight it gets a folder per weight.",
                           required=True)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an --out that exists.")
_RECIPE = flags.DEFINE_string("recipe", None, "A mergekit YAML file, used instead of the flags of models and settings.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of all random masks, such as DARE's.", lower_bound=0,
                             upper_bound=2**32 - 1)
_SWEEP = flags.DEFINE_list("sweep_base_weight", [], "For imm and iimm: base weights, 0.1,0.3,...; a checkpoint is "
                           "written for each, and the inputs are read once.")
_DTYPE = flags.DEFINE_enum("out_dtype", None, sorted(DTYPES), "Dtype of the weights that are written; by "
                           "default the first model's.")
_SHARD = flags.DEFINE_string("max_shard_size", "5GB", "Largest size of a weights file; larger weights are split.")
_ALLOW = flags.DEFINE_bool("allow_nonfinite", False, "Also merge tensors that contain NaN or infinity.")
_FISHERS = flags.DEFINE_list("fishers", [], "For fisher: a folder for each of --models with the diagonal of its Fisher "
                              "matrix.")
_FLAGS = {name: flags.DEFINE_string(name, None, text) for name, text in registry.format_option_help().items()}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def read_recipe() -> Recipe:
  """Returns the recipe that the flags describe.

  Raises:
    UserError: when a flag is missing, wrong, or not a setting of the method.
  """
  method = _METHODS[_METHOD.value]
  known = method.by_option
  for name, flag in _FLAGS.items():
    if flag.value is not None and name not in known:
      names = ", ".join(f"--{n}" for n in known) or "no setting"
      raise UserError(f"--{name}: {method.name} does not take it, but {names}")
    if flag.value is None and name in known and known[name].suggested is REQUIRED:
      raise UserError(f"--{name} is missing; {method.name} needs it")
  options = {name: option.suggested for name, option in known.items() if option.suggested is not option.default}
  options |= {name: _parse_option(option, _FLAGS[name].value) for name, option in known.items()
              if _FLAGS[name].value is not None}
  names = _read_models(method)
  models = {label: hub.resolve(name) for label, name in names.items()}
  parts = tuple(Path(part) for name in names.values() for part in hub.split_adapter(name) or () if Path(part).exists())
  return Recipe(method.name, (Slice(models, options),), _DTYPE.value, parts=parts)


def _read_models(method: MergeMethod) -> dict[str, str]:
  """Returns the models that the flags name, by label, in the method's order; raises UserError if they do not fit it."""
  single = {"base": _BASE, "start": _START, "tuned": _TUNED}
  list_input = next((name for name in ("models", "other") if name in method.inputs), None)
  inputs = [name for name in single if name in method.inputs or f"{name}?" in method.inputs]
  inputs += ["models"] * bool(list_input) + ["fishers"] * ("fishers" in method.inputs)
  for name, flag in (*single.items(), ("models", _MODELS), ("fishers", _FISHERS)):
    if flag.value and name not in inputs:
      raise UserError(f"--{name}: {method.name} takes {' and '.join(f'--{n}' for n in inputs)}")
    is_required = name in inputs and name not in ("start", "models", "fishers") and f"{name}?" not in method.inputs
    if is_required and not flag.value:
      raise UserError(f"--{name} is missing; {method.name} needs it")
  models = {name: single[name].value or _BASE.value for name in single if name in inputs and (
      single[name].value or name == "start")}
  if list_input:
    if not method.accepts(len(_MODELS.value)):
      raise UserError(f"--models has {len(_MODELS.value)}; {method.name} takes {method.count_in_words}")
    models |= {f"models[{i}]": model for i, model in enumerate(_MODELS.value)}
  if "fishers" in inputs:
    if len(_FISHERS.value) != len(_MODELS.value):
      raise UserError(f"--fishers has {len(_FISHERS.value)}; expected one for each of --models ({len(_MODELS.value)})")
    models |= {f"fishers[{i}]": model for i, model in enumerate(_FISHERS.value)}
  return models


def main() -> None:
  """Carries out the merge that the flags describe and prints what was written."""
  options = OutputOptions(_SEED.value, _parse_bytes(_SHARD.value), _ALLOW.value)
  root = Path(_OUT.value)
  if not _RECIPE.value:
    _write_one(root, read_recipe(), options)
    return
  unused = [f"--{name}" for name, flag in [*_FLAGS.items(), ("base", _BASE), ("start", _START), ("tuned", _TUNED), (
      "models", _MODELS), ("fishers", _FISHERS), ("method", _METHOD)] if flag.present and flag.value]
  if unused:
    raise UserError(f"{', '.join(unused)}: cannot be combined with --recipe")
  path = Path(_RECIPE.value)
  several = Documents(path, mergekit.read_names(path), _DTYPE.value)
  if len(several.names) == 1:
    _write_one(root, several.read(0, {}), options)
    return
  if _SWEEP.present:
    raise UserError(f"--sweep_base_weight: is for a recipe of one document; {path} has {len(several.names)}")
  _write(root, several.check(root), lambda out: several.merge(out, root, options))


def _write_one(root: Path, recipe: Recipe, options: OutputOptions) -> None:
  """Writes the output of a recipe, or of each weight of a sweep."""
  outputs = _plan_outputs(root, recipe)

  def write(out: Path) -> int:
    try:
      command.merge({out / folder.relative_to(root): swept for folder, swept in outputs.items()}, options)
    except OptionError as e:
      raise UserError(f"{_RECIPE.value}: {e}" if _RECIPE.value else str(e)) from e
    return len(outputs)

  _write(root, recipe.inputs, write)


def _write(root: Path, inputs: Mapping[str, Path], write: Callable[[Path], int]) -> None:
  """Writes --out atomically; `write` writes a folder in its place and returns the number of merges."""
  started = time.monotonic()
  files.check_out(root, inputs, overwrite=_OVERWRITE.value, explain_foreign=command.explain_foreign)
  with files.lock(root), files.write_atomically(root) as temporary:
    count = write(temporary)
    command.record_files(temporary)
  size = sum(weights.stat().st_size for weights in root.rglob("*.safetensors"))
  print(f"{root}: {count} merge{'s' * (count > 1)}, {format_size(size)} in {time.monotonic() - started:.1f} s")


def _plan_outputs(out: Path, recipe: Recipe) -> dict[Path, Recipe]:
  """Returns the recipe of each folder to write: one, or one for each weight of the sweep."""
  if not _SWEEP.value:
    if _SWEEP.present:
      raise UserError("--sweep_base_weight is empty; expected numbers from 0 to 1")
    return {out: recipe}
  if "base_weight" not in _METHODS[recipe.method].by_option:
    raise UserError(f"--sweep_base_weight: {recipe.method} has no base_weight; it is for imm and iimm")
  if _FLAGS["base_weight"].value is not None:
    raise UserError("--base_weight: --sweep_base_weight gives it; leave out one or the other")
  jobs: dict[Path, Recipe] = {}
  for text in _SWEEP.value:
    try:
      weight = float(text)  # no YAML, whose remarks would become part of the folder's name
    except ValueError:
      weight = math.nan
    if not 0 <= weight <= 1:
      raise UserError(f"--sweep_base_weight={text}: expected numbers from 0 to 1")
    if weight in [other.options["base_weight"] for other in jobs.values()]:
      raise UserError(f"--sweep_base_weight={','.join(_SWEEP.value)}: {text} is given twice")
    only_slice, = recipe.slices
    only_slice = dataclasses.replace(only_slice, options={**only_slice.options, "base_weight": weight})
    jobs[out / f"base_weight_{text.strip()}"] = dataclasses.replace(recipe, slices=(only_slice,))
  return jobs


def _parse_option(option: Option, text: str) -> Any:
  value = _parse_yaml(option.name, text)
  if option.kind in ("number", "vector"):
    return _to_numbers(option.name, text, value)
  try:
    option.check(value)
  except ValueError as e:
    raise UserError(f"--{e}") from e
  return value


def _parse_yaml(name: str, text: str) -> Any:
  try:
    return yaml.load(text, YamlLoader)
  except yaml.YAMLError as e:
    raise UserError(f"--{name}={text!r}: {describe_yaml_error(e)}") from e


def _to_numbers(name: str, text: str, value: Any) -> Any:
  """Converts the texts in a parsed value to numbers, since YAML reads 1e-3 as a text."""
  if isinstance(value, list):
    return [_to_numbers(name, text, v) for v in value]
  if isinstance(value, dict):
    return {str(pattern): _to_numbers(name, text, v) for pattern, v in value.items()}
  with contextlib.suppress(TypeError, ValueError):
    if not isinstance(value, bool) and math.isfinite(float(value)):
      return float(value)
  raise UserError(f"--{name}={text}: expected a number, a list, or a mapping from regex to either (YAML)")


def _parse_bytes(text: str) -> int:
  unit = text.strip()[-2:].upper()
  with contextlib.suppress(ValueError, OverflowError):
    size = int(float(text.strip()[:-2]) * _UNITS[unit]) if unit in _UNITS else int(text)
    if size > 0:
      return size
  raise UserError(f"--max_shard_size={text}: expected bytes, or a number with {suggest(unit, list(_UNITS))}")


if __name__ == "__main__":
  cli.run(main)
