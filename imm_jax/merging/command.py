"""From recipes to folders: opens the models, checks them, merges, and writes what lies beside the weights."""

import collections
import contextlib
import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from imm_jax import __version__
from imm_jax.errors import ResourceError, UserError, listed
from imm_jax.merging import arrange, checkpoint, configs, masks, recipe
from imm_jax.merging.recipe import Recipe
from imm_jax.merging.source import CheckpointSource, Table
from imm_jax.model import folder as folders


@dataclasses.dataclass(frozen=True)
class How:
  """What holds for all outputs: the seed of masks, the size of files, and whether NaN and infinity may pass."""

  seed: int = 0
  max_shard_bytes: int = folders.MAX_SHARD_BYTES
  allow_nonfinite: bool = False


def merge(jobs: Mapping[Path, Recipe], how: How) -> None:
  """Writes one checkpoint for each job, all of the same models, from one read.

  Args:
    jobs: folder to write -> recipe; they differ in options alone.
    how: see `How`.

  Raises:
    UserError: for models that do not fit, options that do not, a full disk, or values that are not finite.
  """
  made = next(iter(jobs.values()))
  parent = next(iter(jobs)).parent
  parent.mkdir(parents=True, exist_ok=True)
  configs.compare(made.models, layers_may_differ=made.slices[0].layers is not None)
  donor = made.donor or next(iter(made.models.values()))
  with contextlib.ExitStack() as stack:
    tokenizer, replaced = None, {}
    if made.tokens is not None:
      tokenizer, replaced = _align(made, donor, stack.enter_context(_scratch(parent)))
    sources = stack.enter_context(arrange.open_parts(made, replaced))
    _require_space(sources, made, list(jobs))
    parts = [checkpoint.Part(source, [recipe.build(source, job.method, job.slices[i].options)
                                      for job in jobs.values()], made.prefixes[i]) for i, source in enumerate(sources)]
    dtype = recipe.DTYPES[made.dtype] if made.dtype else None
    result = checkpoint.merge_parts(parts, [(folder, dtype) for folder in jobs], key=masks.seed_words(how.seed),
                                    max_shard_bytes=how.max_shard_bytes, allow_nonfinite=how.allow_nonfinite)
    names = {name for source in sources for name in source.order}
    rows = next((s.entries(folders.EMBEDDING)[0].shape[0] for s in sources if folders.EMBEDDING in s.order), None)
  for folder, job, overflowed in zip(jobs, jobs.values(), result.overflowed, strict=True):
    configs.copy_beside(donor, folder)
    configs.adjust(folder, dtype=made.dtype, rows=rows if tokenizer is not None else None,
                   head=_head(donor, names), layers=arrange.source_layers(made))
    if tokenizer is not None:
      tokenizer.save_pretrained(folder)
    if made.chat_template:
      configs.set_template(folder, _template(made))
    if overflowed:
      which = listed([f"{name} ({count})" for name, count in overflowed.most_common(5)])
      print(f"note: {sum(overflowed.values())} entries are beyond what {made.dtype or 'the dtype'} holds and became "
            f"infinite: {which}; give a wider --out_dtype", file=sys.stderr)
    _record(folder, job, how, result.digests, overflowed)


def _align(made: Recipe, donor: Path, scratch: Path) -> tuple[object, dict[Path, Table]]:
  """The output's tokenizer, and the models' rows in its order."""
  from imm_jax.merging import vocabulary  # late: it needs transformers

  models = list(dict.fromkeys(made.models.values()))
  tokenizer, known = vocabulary.build(made.tokens, donor, models)
  with contextlib.ExitStack() as stack:
    opened = {folder: stack.enter_context(CheckpointSource({"model": folder})) for folder in models}
    tables = {folder: {name: source.entries(name)[0] for name in source.order} for folder, source in opened.items()}
  return tokenizer, vocabulary.aligned(made.tokens, tokenizer.get_vocab(), known, tables, made.donor, scratch)


@contextlib.contextmanager
def _scratch(parent: Path):
  """A folder on the output's disk that goes again."""
  path = parent / ".rows.part"
  shutil.rmtree(path, ignore_errors=True)
  path.mkdir(parents=True)
  try:
    yield path
  finally:
    shutil.rmtree(path, ignore_errors=True)


def _head(donor: Path, names: set[str]) -> bool | None:
  """Whether the output has a head of its own, where that is other than in the donor."""
  has = folders.HEAD in names
  with CheckpointSource({"donor": donor}) as source:
    return None if has == (folders.HEAD in source.order) else has


def _template(made: Recipe) -> str:
  if made.chat_template != "auto":
    return made.chat_template
  found = [text for text in map(configs.template_of, dict.fromkeys(made.models.values())) if text]
  if not found:
    raise UserError("chat_template: auto: none of the models has one")
  return collections.Counter(found).most_common(1)[0][0]


def _require_space(sources: list[CheckpointSource], made: Recipe, out: list[Path]) -> None:
  """Fails before the work where the disk is too full for the result."""
  width = lambda entry: (recipe.DTYPES[made.dtype] if made.dtype else entry.dtype).itemsize
  needed = len(out) * sum(s.size(name) * width(s.entries(name)[0]) for s in sources for name in s.order)
  free = shutil.disk_usage(next(p for p in out[0].absolute().parents if p.exists())).free
  if needed > free:
    raise ResourceError(f"--out: needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; make room or give "
                        "another folder")


def _record(folder: Path, job: Recipe, how: How, digests: Mapping[str, str], overflowed: Mapping[str, int]) -> None:
  """merge.json and a model card."""
  record = {"imm_jax": __version__, "method": job.method, "options": dict(job.options), "seed": how.seed,
            "dtype": job.dtype, "inputs": {label: {"path": str(path), "xxh3_128": digests[label]}
                                           for label, path in job.models.items()}}
  if job.slices[0].layers is not None:
    record["slices"] = [{"layers": {label: list(r) for label, r in piece.layers.items()},
                         "options": dict(piece.options)} for piece in job.slices]
  if overflowed:
    record["overflowed"] = dict(overflowed)
  (folder / "merge.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
  inputs = [f"- {label}: `{model['path']}`" for label, model in record["inputs"].items()]
  shown = {key: record[key] for key in ("options", "slices") if key in record} | {"seed": how.seed}
  (folder / "README.md").write_text("\n".join([
      "---", "library_name: transformers", "tags:", "- merge", "- imm_jax", "---", f"# {folder.name.strip('.')}", "",
      f"A merge by the method `{job.method}`, made with imm_jax {__version__}.", "", *inputs, "",
      "```json", json.dumps(shown, indent=2), "```", ""]), encoding="utf-8")
