"""Carries out recipes: opens and checks the models, merges them, and writes weights, config, tokenizer and a record."""

import collections
import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jax
import numpy as np

from imm_jax import __version__, files
from imm_jax.errors import ResourceError, UserError, join_items
from imm_jax.formatting import format_size
from imm_jax.merging import kernels, masks, model_configs, on_disk, registry, roles, users_kernels
from imm_jax.merging.recipes import arrange, vocabulary
from imm_jax.merging.recipes.recipe import DTYPES, Recipe, build_plan
from imm_jax.merging.source import CheckpointSource, Table, is_floating
from imm_jax.model import checkpoint_folder

# The file in an output that says how it was made and which files were written.
RECORD = "merge.json"
# Name, dtype and shape of a tensor to write.
Tensor = tuple[str, np.dtype, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class OutputOptions:
  """Holds what all outputs share: seed of the masks, largest file size, whether NaN and infinity are allowed."""

  seed: int = 0
  max_shard_bytes: int = checkpoint_folder.MAX_SHARD_BYTES
  allow_nonfinite: bool = False


class Aligned(NamedTuple):
  """Holds the tokenizer of an output, the rewritten tensors of each model, and the size of the vocabulary."""

  built: vocabulary.Built
  replacements: dict[Path, Table]
  rows: int


def merge(jobs: Mapping[Path, Recipe], options: OutputOptions, origins: Mapping[Path, Mapping[str, Any]] | None = None,
          ) -> None:
  """Writes one checkpoint for each job, reading the models, which all jobs share, once.

  Args:
    jobs: folder to write -> recipe; the recipes may differ in their options only.
    options: see `OutputOptions`.
    origins: folder of a model that is at another place later, or gone -> what merge.json says of it, with `path`.

  Raises:
    UserError: if models or options do not fit, the disk is full, or a value is not finite.
  """
  recipe, origins = next(iter(jobs.values())), origins or {}
  first_out = next(iter(jobs))
  _check_compatible(recipe)
  with contextlib.ExitStack() as stack:
    aligned = None
    if recipe.tokens is not None:
      # In the output, so that two merges never share it and what a killed one leaves goes with its output.
      first_out.mkdir(parents=True, exist_ok=True)
      scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".rows.", dir=first_out)))
      aligned = _align_vocabularies(recipe, scratch)
    sources = stack.enter_context(arrange.open_parts(recipe, aligned and aligned.replacements))
    tensors = _describe_outputs(sources, recipe)
    # Rewritten rows are on the disk already.
    check_space(len(jobs) * sum(map(count_bytes, tensors)), first_out)
    parts = [on_disk.Part(source, [build_plan(source, job.method, job.slices[i].options, recipe.prefixes[i])
                                   for job in jobs.values()], recipe.prefixes[i])
             for i, source in enumerate(sources)]
    dtype = DTYPES[recipe.dtype] if recipe.dtype else None
    result = on_disk.merge_parts(
        parts, [(folder, dtype) for folder in jobs], key=masks.seed_words(options.seed),
        max_shard_bytes=options.max_shard_bytes, allow_nonfinite=options.allow_nonfinite)
  write_companions(jobs, recipe, tensors, aligned)
  for folder, job, overflowed in zip(jobs, jobs.values(), result.overflowed, strict=True):
    if overflowed:
      which = join_items([f"{name} ({count})" for name, count in overflowed.most_common(5)])
      print(f"note: {sum(overflowed.values())} entries are beyond what {recipe.dtype or 'the dtype'} holds and became "
            f"infinite: {which}; give a wider --out_dtype", file=sys.stderr)
    inputs = {label: {**origins.get(path, {"path": str(path)}), "xxh3_128": result.digests[label]}
              for label, path in job.models.items()}
    _write_record(folder, job, options, inputs, overflowed)


def write_companions(folders: Iterable[Path], recipe: Recipe, tensors: Sequence[Tensor], aligned: Aligned | None,
                     ) -> None:
  """Writes all of the outputs of a recipe but their weights: config.json, tokenizer and other files.

  Args:
    folders: the outputs, which exist.
    recipe: the recipe.
    tensors: their tensors.
    aligned: the tokenizer, if the recipe asks for one.
  """
  donor = _find_donor(recipe)
  head = _changed_head(donor, tensors)  # once for all outputs of a sweep, for it reads the donor
  template = _choose_chat_template(recipe) if recipe.chat_template else None
  for folder in folders:
    model_configs.copy_companion_files(donor, folder, tokenizer=aligned is None)
    model_configs.update_config(folder, dtype=recipe.dtype or _main_dtype(tensors), rows=aligned and aligned.rows,
                                head=head, layers=arrange.source_layers(recipe))
    if aligned is not None:
      vocabulary.save_tokenizer(aligned.built, folder)
    if template is not None:
      model_configs.set_chat_template(folder, template)


def _check_compatible(recipe: Recipe) -> None:
  """Checks that the configs of the models and of the donor allow a merge."""
  model_configs.check_compatible(recipe.models, donor=recipe.donor,
                                   layers_may_differ=recipe.slices[0].layers is not None)


def _find_donor(recipe: Recipe) -> Path:
  """Returns the folder whose config and tokenizer the output takes."""
  return recipe.donor or next(iter(recipe.models.values()))


def check_recipe(recipe: Recipe) -> tuple[list[Tensor], Aligned | None]:
  """Checks a recipe as far as that needs no tensor to be read; returns what it will write, and its tokenizer.

  Raises:
    UserError: if models or options do not fit.
  """
  _check_compatible(recipe)
  aligned = None if recipe.tokens is None else _align_vocabularies(recipe, None)
  if recipe.chat_template:
    _choose_chat_template(recipe)
  with arrange.open_parts(recipe, aligned and aligned.replacements) as sources:
    for source, part, prefix in zip(sources, recipe.slices, recipe.prefixes, strict=True):
      with contextlib.suppress(_NeedsTensors):
        build_plan(_HeadersOnly(source), recipe.method, part.options, prefix)
    return _describe_outputs(sources, recipe), aligned


class _NeedsTensors(Exception):  # noqa: N818 (it is no error)
  """Reports that a method's preparation begins to read."""


class _HeadersOnly:
  """Implements a `Source` that knows names and shapes of tensors, and refuses to read them."""

  def __init__(self, source: CheckpointSource):
    self._source = source

  def __getattr__(self, name: str) -> Any:
    return getattr(self._source, name)

  def reduce(self, *_: Any, **__: Any) -> Any:
    raise _NeedsTensors


def _align_vocabularies(recipe: Recipe, scratch: Path | None) -> Aligned:
  """Builds the output's tokenizer and reorders the models' token rows to match it; without `scratch` writes no rows."""
  models = list(dict.fromkeys(recipe.models.values()))
  built = vocabulary.build_tokenizer(recipe.tokens, _find_donor(recipe), models)
  with contextlib.ExitStack() as stack:
    opened = {folder: stack.enter_context(CheckpointSource({"model": folder})) for folder in models}
    tables = {folder: {name: source.entries(name)[0] for name in source.order} for folder, source in opened.items()}
  return Aligned(built, *vocabulary.align_rows(recipe.tokens, built.tokenizer.get_vocab(), built.rows_by_token, tables,
                                               recipe.donor, scratch))


def _main_dtype(tensors: Sequence[Tensor]) -> str:
  """Returns the dtype of most floating weights among those to write; float32 if they are not known."""
  counts = collections.Counter()
  for _, dtype, shape in tensors:
    if jax.numpy.issubdtype(dtype, jax.numpy.floating):
      counts[dtype.name] += math.prod(shape)
  return counts.most_common(1)[0][0] if counts else "float32"


def _changed_head(donor: Path, tensors: Sequence[Tensor]) -> bool | None:
  """Returns whether the output has an output head of its own; None if that is the same as in the donor."""
  has, had = (bool(roles.find_heads(table)) for table in (
      {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype, shape in tensors},
      arrange.read_table("base_model", donor)))
  return None if has == had else has


def _choose_chat_template(recipe: Recipe) -> str:
  if recipe.chat_template != "auto":
    return recipe.chat_template
  templates = list(filter(None, map(model_configs.read_chat_template, dict.fromkeys(recipe.models.values()))))
  if not templates:
    raise UserError("chat_template: auto: none of the models has one")
  return collections.Counter(templates).most_common(1)[0][0]


def _describe_outputs(sources: Sequence[CheckpointSource], recipe: Recipe) -> list[Tensor]:
  """Returns name, dtype and shape of each tensor of the output."""
  wanted = DTYPES[recipe.dtype] if recipe.dtype else None
  entries = {name: source.entries(name)[0] for source in sources for name in source.order}
  return [(name, wanted if wanted is not None and is_floating(entry) else entry.dtype, entry.shape)
          for name, entry in entries.items()]


def count_bytes(tensor: Tensor) -> int:
  """Returns the size of a tensor on disk."""
  _, dtype, shape = tensor
  return math.prod(shape) * dtype.itemsize


def check_space(needed: int, out: Path) -> None:
  """Raises ResourceError if the disk of an output has too little space for that many bytes."""
  free = shutil.disk_usage(files.find_existing_parent(out.absolute().parent)).free
  if needed > free:
    raise ResourceError(f"--out: needs {format_size(needed)}, the disk has {format_size(free)} free; make "
                        "room or give another folder")


def _write_record(folder: Path, recipe: Recipe, options: OutputOptions, inputs: Mapping[str, Mapping[str, Any]],
                  overflowed: Mapping[str, int]) -> None:
  """Writes merge.json and a model card."""
  record = {"imm_jax": __version__, "method": recipe.method, "options": dict(recipe.options), "seed": options.seed,
            "dtype": recipe.dtype, "inputs": dict(inputs)}
  kernel = registry.METHODS[recipe.method].kernel
  if code := users_kernels.digest_code(kernel):
    record |= {"code": code, "file": kernels.find_file(kernel)}
  if recipe.slices[0].layers is not None:
    record["slices"] = [{"layers": {label: list(r) for label, r in slice_.layers.items()},
                         "options": dict(slice_.options)} for slice_ in recipe.slices]
  if overflowed:
    record["overflowed"] = dict(overflowed)
  files.write_json(folder / RECORD, record, indent=2)
  listed = [f"- {label}: `{model['path']}`" for label, model in inputs.items()]
  shown = {key: record[key] for key in ("options", "slices") if key in record} | {"seed": options.seed}
  title = folder.name.strip(".").removesuffix(".part")
  (folder / "README.md").write_text("\n".join([
      "---", "library_name: transformers", "tags:", "- merge", "- imm_jax", "---", f"# {title}", "",
      f"A merge by the method `{recipe.method}`, made with imm_jax {__version__}.", "", *listed, "",
      "```json", json.dumps(shown, indent=2), "```", ""]), encoding="utf-8")


def record_files(out: Path) -> None:
  """Adds the list of all files in an output to its merge.json; where the output is several checkpoints, in each.

  That of the whole is made where there is none.
  """
  for folder in {out, *(path.parent for path in out.rglob(RECORD) if path.is_file())}:
    record = files.read_json(folder / RECORD) if (folder / RECORD).exists() else {"imm_jax": __version__}
    files.write_json(folder / RECORD, {**record, "files": sorted({RECORD, *_list_files(folder)})}, indent=2)


def explain_foreign(out: Path) -> str:
  """Returns why a folder must not be replaced: it is no merge, or has files that no merge wrote; "" if it may be."""
  if not (out / RECORD).is_file():
    return f"is no earlier merge (it has no {RECORD})"
  try:
    known = set(files.read_json(out / RECORD)["files"])
  except (UserError, KeyError, TypeError):
    return f"is no earlier merge ({RECORD} does not list its files)"
  for name in sorted(known - {RECORD}):  # a checkpoint in it may have been replaced by itself since
    if PurePosixPath(name).name == RECORD and not explain_foreign((out / name).parent):
      known |= {f"{PurePosixPath(name).parent}/{file}" for file in files.read_json(out / name)["files"]}
  foreign = sorted(set(_list_files(out)) - known)
  return f"holds {foreign[0]}, which no merge wrote" if foreign else ""


def _list_files(out: Path) -> list[str]:
  """Returns all that is no folder below a folder, relative to it; a link to a folder is none."""
  return [os.path.relpath(os.path.join(folder, name), out) for folder, folders, names in os.walk(out)
          for name in [*names, *(f for f in folders if os.path.islink(os.path.join(folder, f)))]]
