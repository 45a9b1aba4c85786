"""Merges HF checkpoints on disk.

    imm merge --method=imm --base=BASE --start=START --tuned=TUNED --out=OUT --base_weight=0.5
    imm merge --method=imm --base=BASE --tuned=TUNED --out=OUT --sweep_base_weight=0.1,0.3,0.5
    imm merge --method=linear --models=A,B --weights='[0.3, 0.7]' --out=OUT
    imm merge --method=ties --base=BASE --models=A,B --weights=1 --densities=0.2 --out=OUT
    imm merge --recipe=mergekit.yml --out=OUT

A setting is YAML: a number, a list over the layers, or a mapping from regex to either. A setting per model is one of
these for all models, or a list with one for each. An error leaves no partial OUT; merge.json in it records how it was
made.
"""

import contextlib
import dataclasses
import math
import os
import tempfile
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
from imm_jax.merging import command, mergekit, recipe, registry
from imm_jax.merging.command import OutputOptions
from imm_jax.merging.options import REQUIRED, Option
from imm_jax.merging.recipe import Recipe, Slice
from imm_jax.merging.registry import Method
from imm_jax.model import hub

_METHODS = registry.on_disk()
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
_DTYPE = flags.DEFINE_enum("out_dtype", None, sorted(recipe.DTYPES), "Dtype of the weights that are written; by "
                           "default the first model's.")
_SHARD = flags.DEFINE_string("max_shard_size", "5GB", "Largest size of a weights file; larger weights are split.")
_ALLOW = flags.DEFINE_bool("allow_nonfinite", False, "Also merge tensors that contain NaN or infinity.")
_FISHERS = flags.DEFINE_list("fishers", [], "For fisher: a folder for each of --models with the diagonal of its Fisher "
                              "matrix.")
_FLAGS = {name: flags.DEFINE_string(name, None, text) for name, text in registry.option_help().items()}
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
  models = {label: hub.resolve(path) for label, path in _read_models(method).items()}
  return Recipe(method.name, (Slice(models, options),), _DTYPE.value)


def _read_models(method: Method) -> dict[str, str]:
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
    least, most = (method.least, method.most) if list_input == "models" else (1, 1)
    if not least <= len(_MODELS.value) <= (most or len(_MODELS.value)):
      expected = f"{least}" if most == least else f"{least} or more" if most is None else f"{least} to {most}"
      raise UserError(f"--models has {len(_MODELS.value)}; {method.name} takes {expected}")
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
    merge = read_recipe()
    _write(root, merge.models, lambda out: {out: _plan_outputs(out, merge)}, options)
    return
  unused = [f"--{name}" for name, flag in [*_FLAGS.items(), ("base", _BASE), ("start", _START), ("tuned", _TUNED),
                                          ("models", _MODELS), ("method", _METHOD)] if flag.present and flag.value]
  if unused:
    raise UserError(f"{', '.join(unused)}: --recipe says it all; leave out one or the other")
  path = Path(_RECIPE.value)
  names = list(mergekit.document_names(path))
  read = lambda i, earlier: _with_dtype(mergekit.read(path, i, earlier))
  if len(names) == 1:
    merge = read(0, {})
    _write(root, merge.models, lambda out: {out: _plan_outputs(out, merge)}, options)
  else:
    _write_documents(root, names, read, options)


def _write(root: Path, inputs: Mapping[str, Path], plan: Callable[[Path], Mapping[Path, Mapping[Path, Recipe]]],
           options: OutputOptions) -> None:
  """Writes --out atomically; `plan` maps its temporary path to groups of outputs, which are merged one by one."""
  started, count = time.monotonic(), 0
  files.check_out(root, inputs, overwrite=_OVERWRITE.value, explain_foreign=_explain_foreign)
  with files.locked(root), files.committed(root) as temporary:
    for jobs in plan(temporary).values():
      command.merge(jobs, options)
      count += len(jobs)
  size = sum(weights.stat().st_size for weights in root.rglob("*.safetensors"))
  print(f"{root}: {count} checkpoint{'s' if count > 1 else ''}, {size / 1e9:.2f} GB in "
        f"{time.monotonic() - started:.1f} s")


def _write_documents(root: Path, names: list[str | None], read: Callable[[int, Mapping[str, Path]], Recipe],
                     options: OutputOptions) -> None:
  """Merges the documents of a recipe one after the other; later ones may use the outputs of earlier ones as models.

  If the last document has no name, its output is --out and the others are temporary; otherwise each has its own folder
  in --out.
  """
  if None in names[:-1] or len(set(names)) < len(names):
    raise UserError(f"{_RECIPE.value}: of several documents each but the last needs a name of its own")
  started = time.monotonic()
  files.check_out(root, {}, overwrite=_OVERWRITE.value, explain_foreign=_explain_foreign)
  with files.locked(root), files.committed(root) as temporary, tempfile.TemporaryDirectory(
      prefix=f".{root.name}.", dir=_make_parent(root)) as scratch:
    earlier: dict[str, Path] = {}
    folder = temporary if names[-1] is not None else Path(scratch)
    for i, name in enumerate(names):
      out = temporary if name is None else folder / name
      command.merge({out: read(i, earlier)}, options)
      if name is not None:
        earlier[name] = out
  print(f"{root}: {len(names)} merges in {time.monotonic() - started:.1f} s")


def _explain_foreign(out: Path) -> str:
  return "" if any(out.rglob("merge.json")) else "is no earlier merge (it has no merge.json)"


def _make_parent(root: Path) -> Path:
  root.absolute().parent.mkdir(parents=True, exist_ok=True)
  return root.absolute().parent


def _with_dtype(merge: Recipe) -> Recipe:
  return dataclasses.replace(merge, dtype=_DTYPE.value or merge.dtype)


def _plan_outputs(out: Path, merge: Recipe) -> dict[Path, Recipe]:
  """Returns the recipe of each folder to write: one, or one for each weight of the sweep."""
  if not _SWEEP.value:
    if _SWEEP.present:
      raise UserError("--sweep_base_weight is empty; expected numbers from 0 to 1")
    return {out: merge}
  if merge.method not in ("imm", "iimm"):
    raise UserError(f"--sweep_base_weight: {merge.method} has no base_weight; it is for imm and iimm")
  if _FLAGS["base_weight"].value is not None:
    raise UserError("--base_weight: --sweep_base_weight gives it; leave out one or the other")
  jobs: dict[Path, Recipe] = {}
  for text in _SWEEP.value:
    weight = _to_numbers("sweep_base_weight", text, _parse_yaml("sweep_base_weight", text))
    if not isinstance(weight, int | float) or not 0 <= weight <= 1:
      raise UserError(f"--sweep_base_weight={text}: expected numbers from 0 to 1")
    if weight in [job.options["base_weight"] for job in jobs.values()]:
      raise UserError(f"--sweep_base_weight={','.join(_SWEEP.value)}: {text} stands in it twice")
    only_slice, = merge.slices
    only_slice = dataclasses.replace(only_slice, options={**only_slice.options, "base_weight": weight})
    jobs[out / f"base_weight_{text.strip()}"] = dataclasses.replace(merge, slices=(only_slice,))
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
    return yaml.safe_load(text)
  except yaml.YAMLError as e:
    raise UserError(f"--{name}={text!r}: is not YAML ({' '.join(str(e).split())})") from e


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
