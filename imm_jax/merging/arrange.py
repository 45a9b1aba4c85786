"""Opens the models of a recipe as parts: whole models, or slices of their layers under the output's names."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from imm_jax.errors import UserError
from imm_jax.merging.recipe import Recipe
from imm_jax.merging.source import CheckpointSource, Table
from imm_jax.merging.trees import count_layers, layer_of
from imm_jax.model import folder as checkpoint

# Of the tensors in no layer, what comes before the layers; all others come after them.
_BEFORE = re.compile(r"embed|(^|\.)w[tp]e\.")


@contextlib.contextmanager
def open_parts(made: Recipe, replaced: Mapping[Path, Table] | None = None) -> Iterator[list[CheckpointSource]]:
  """The sources of a recipe's slices, in their order.

  Args:
    made: the recipe.
    replaced: folder -> tensors that take the place of its own.

  Raises:
    UserError: for models that do not match, and a layer range that a model has not.
  """
  replaced = replaced or {}
  with contextlib.ExitStack() as stack:
    if made.slices[0].layers is None:
      folders = made.slices[0].models
      tables = None
      if any(replaced.get(folder) for folder in folders.values()):
        tables = [_table(label, folder) | replaced.get(folder, {}) for label, folder in folders.items()]
      yield [stack.enter_context(CheckpointSource(folders, tables=tables))]
      return
    cache: dict[Path, Table] = {}
    for label, folder in made.models.items():
      if folder not in cache:
        cache[folder] = _table(label, folder) | replaced.get(folder, {})
    last = [cache[folder] for folder in made.slices[-1].models.values()]
    if any(checkpoint.HEAD in table for table in last):
      for table in last:  # a tied model's head is its embedding
        if checkpoint.HEAD not in table and checkpoint.EMBEDDING in table:
          table[checkpoint.HEAD] = table[checkpoint.EMBEDDING]
    parts, begin = [], 0
    for i, (prefix, piece) in enumerate(zip(made.prefixes, made.slices, strict=True)):
      tables = []
      for label, folder in piece.models.items():
        first, end = piece.layers[label]
        count = count_layers(list(cache[folder]))
        if end > count:
          raise UserError(f"{prefix}{label}: layer_range [{first}, {end}]: {folder} has {count} layers")
        tables.append(_cut(cache[folder], first, end, begin, before=i == 0, after=i == len(made.slices) - 1))
      parts.append(stack.enter_context(CheckpointSource(piece.models, tables=tables, first_layer=begin)))
      begin += end - first
    yield parts


def source_layers(made: Recipe) -> list[tuple[Path, int]] | None:
  """For each layer of the output the folder and the layer that it comes from first; None for whole models."""
  if made.slices[0].layers is None:
    return None
  found = []
  for piece in made.slices:
    label = next(iter(piece.models))
    found += [(piece.models[label], layer) for layer in range(*piece.layers[label])]
  return found


def _table(label: str, folder: Path) -> Table:
  with CheckpointSource({label: folder}) as source:
    return {name: source.entries(name)[0] for name in source.order}


def _cut(table: Table, first: int, end: int, begin: int, *, before: bool, after: bool) -> Table:
  """Layers [first, end) as layers from `begin` on, and what comes before and after all layers."""
  result = {}
  for name, entry in table.items():
    layer = layer_of(name)
    if layer is None:
      if before if _BEFORE.search(name) else after:
        result[name] = entry
    elif first <= layer < end:
      result[_renumber(name, layer, layer - first + begin)] = entry
  return result


def _renumber(name: str, layer: int, new: int) -> str:
  return re.sub(rf"(?<=[._]){layer}(?=\.|$)", str(new), name, count=1)
