"""Carries out recipes: opens and checks the models, merges them, and writes weights, config, tokenizer and a record."""

import collections
import contextlib
import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from imm_jax import __version__
from imm_jax.errors import ResourceError, UserError, join_items
from imm_jax.merging import arrange, checkpoint, configs, masks, recipe as recipes, vocabulary
from imm_jax.merging.recipe import Recipe
from imm_jax.merging.source import CheckpointSource, Table
from imm_jax.model import folder as model_folder


@dataclasses.dataclass(frozen=True)
class OutputOptions:
  """Options common to all outputs: seed of the masks, largest file size, and whether NaN and infinity are allowed."""

  seed: int = 0
  max_shard_bytes: int = model_folder.MAX_SHARD_BYTES
  allow_nonfinite: bool = False


def merge(jobs: Mapping[Path, Recipe], options: OutputOptions) -> None:
  """Writes one checkpoint for each job, reading the models, which all jobs share, once.

  Args:
    jobs: folder to write -> recipe; the recipes may differ in their options only.
    options: see `OutputOptions`.

  Raises:
    UserError: if models or options do not fit, the disk is full, or a value is not finite.
  """
  recipe = next(iter(jobs.values()))
  parent = next(iter(jobs)).parent
  parent.mkdir(parents=True, exist_ok=True)
  configs.require_compatible(recipe.models, layers_may_differ=recipe.slices[0].layers is not None)
  donor = recipe.donor or next(iter(recipe.models.values()))
  with contextlib.ExitStack() as stack:
    tokenizer, replacements, rows = None, {}, None
    if recipe.tokens is not None:
      tokenizer, replacements, rows = _align_vocabularies(recipe, donor, stack.enter_context(_scratch_folder(parent)))
    sources = stack.enter_context(arrange.open_parts(recipe, replacements))
    _require_space(sources, recipe, list(jobs))
    parts = [checkpoint.Part(source, [recipes.build_plan(source, job.method, job.slices[i].options)
                                      for job in jobs.values()], recipe.prefixes[i])
             for i, source in enumerate(sources)]
    dtype = recipes.DTYPES[recipe.dtype] if recipe.dtype else None
    result = checkpoint.merge_parts(
        parts, [(folder, dtype) for folder in jobs], key=masks.seed_words(options.seed),
        max_shard_bytes=options.max_shard_bytes, allow_nonfinite=options.allow_nonfinite)
    names = {name for source in sources for name in source.order}
    written = recipe.dtype or _main_dtype(sources)
  for folder, job, overflowed in zip(jobs, jobs.values(), result.overflowed, strict=True):
    configs.copy_companion_files(donor, folder)
    configs.update_config(folder, dtype=written, rows=rows, head=_changed_head(donor, names),
                          layers=arrange.source_layers(recipe))
    if tokenizer is not None:
      vocabulary.save_tokenizer(tokenizer, folder)
    if recipe.chat_template:
      configs.set_chat_template(folder, _choose_chat_template(recipe))
    if overflowed:
      which = join_items([f"{name} ({count})" for name, count in overflowed.most_common(5)])
      print(f"note: {sum(overflowed.values())} entries are beyond what {recipe.dtype or 'the dtype'} holds and became "
            f"infinite: {which}; give a wider --out_dtype", file=sys.stderr)
    _write_record(folder, job, options, result.digests, overflowed)


def _align_vocabularies(recipe: Recipe, donor: Path, scratch: Path) -> tuple[object, dict[Path, Table], int]:
  """Builds the output's tokenizer and reorders the models' token rows to match it; returns their number too."""
  models = list(dict.fromkeys(recipe.models.values()))
  tokenizer, known = vocabulary.build_tokenizer(recipe.tokens, donor, models)
  with contextlib.ExitStack() as stack:
    opened = {folder: stack.enter_context(CheckpointSource({"model": folder})) for folder in models}
    tables = {folder: {name: source.entries(name)[0] for name in source.order} for folder, source in opened.items()}
  return tokenizer, *vocabulary.align_rows(recipe.tokens, tokenizer.get_vocab(), known, tables, recipe.donor, scratch)


def _main_dtype(sources: list[CheckpointSource]) -> str:
  """Returns the dtype of most of the weights that are written if none is given: that of the first models."""
  counts = collections.Counter()
  for source in sources:
    for name in source.names:
      counts[source.entries(name)[0].dtype.name] += source.size(name)
  return counts.most_common(1)[0][0]


@contextlib.contextmanager
def _scratch_folder(parent: Path):
  """Creates a temporary folder on the output's disk and removes it at the end of the block."""
  path = parent / ".rows.part"
  shutil.rmtree(path, ignore_errors=True)
  path.mkdir(parents=True)
  try:
    yield path
  finally:
    shutil.rmtree(path, ignore_errors=True)


def _changed_head(donor: Path, names: set[str]) -> bool | None:
  """Returns whether the output has an output head of its own; None if that is the same as in the donor."""
  has = model_folder.HEAD in names
  with CheckpointSource({"donor": donor}) as source:
    return None if has == (model_folder.HEAD in source.order) else has


def _choose_chat_template(recipe: Recipe) -> str:
  if recipe.chat_template != "auto":
    return recipe.chat_template
  templates = list(filter(None, map(configs.read_chat_template, dict.fromkeys(recipe.models.values()))))
  if not templates:
    raise UserError("chat_template: auto: none of the models has one")
  return collections.Counter(templates).most_common(1)[0][0]


def _require_space(sources: list[CheckpointSource], recipe: Recipe, out: list[Path]) -> None:
  """Raises UserError if the disk has too little space for the outputs."""
  width = lambda entry: (recipes.DTYPES[recipe.dtype] if recipe.dtype else entry.dtype).itemsize
  needed = len(out) * sum(s.size(name) * width(s.entries(name)[0]) for s in sources for name in s.order)
  free = shutil.disk_usage(next(p for p in out[0].absolute().parents if p.exists())).free
  if needed > free:
    raise ResourceError(f"--out: needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; make room or give "
                        "another folder")


def _write_record(folder: Path, job: Recipe, options: OutputOptions, digests: Mapping[str, str],
                  overflowed: Mapping[str, int]) -> None:
  """Writes merge.json and a model card."""
  record = {"imm_jax": __version__, "method": job.method, "options": dict(job.options), "seed": options.seed,
            "dtype": job.dtype, "inputs": {label: {"path": str(path), "xxh3_128": digests[label]}
                                           for label, path in job.models.items()}}
  if job.slices[0].layers is not None:
    record["slices"] = [{"layers": {label: list(r) for label, r in piece.layers.items()},
                         "options": dict(piece.options)} for piece in job.slices]
  if overflowed:
    record["overflowed"] = dict(overflowed)
  (folder / "merge.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
  inputs = [f"- {label}: `{model['path']}`" for label, model in record["inputs"].items()]
  shown = {key: record[key] for key in ("options", "slices") if key in record} | {"seed": options.seed}
  (folder / "README.md").write_text("\n".join([
      "---", "library_name: transformers", "tags:", "- merge", "- imm_jax", "---", f"# {folder.name.strip('.')}", "",
      f"A merge by the method `{job.method}`, made with imm_jax {__version__}.", "", *inputs, "",
      "```json", json.dumps(shown, indent=2), "```", ""]), encoding="utf-8")
