"""Opens the models of a recipe: whole models, or slices of their layers under the output's tensor names."""

import collections
import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from imm_jax import files
from imm_jax.errors import UserError, join_items, print_once
from imm_jax.merging import model_configs, roles
from imm_jax.merging.recipes.recipe import Recipe
from imm_jax.merging.source import CheckpointSource, Table, is_buffer
from imm_jax.merging.trees import count_layers, get_layer, get_stack


@contextlib.contextmanager
def open_parts(recipe: Recipe, replacements: Mapping[Path, Table] | None = None) -> Iterator[list[CheckpointSource]]:
  """Opens one source for each slice of a recipe, in order.

  Args:
    recipe: the recipe.
    replacements: folder -> tensors that replace its own.

  Raises:
    UserError: if models do not match, slices do not fit each other, whole models or slices do not fit the config that
      the output takes, a layer range exceeds a model's layers, or a model that is to be sliced has several stacks of
      layers.
  """
  replacements = replacements or {}
  with contextlib.ExitStack() as stack:
    if recipe.slices[0].layers is None:
      folders = recipe.slices[0].models
      tables = None
      if any(replacements.get(folder) for folder in folders.values()):
        tables = [read_table(label, folder) | replacements.get(folder, {}) for label, folder in folders.items()]
      source = stack.enter_context(CheckpointSource(folders, tables=tables))
      if recipe.donor not in (None, *folders.values()):
        _check_fit(recipe, next(iter(folders)), {name: source.entries(name)[0] for name in source.order},
                     read_table("base_model", recipe.donor))
      yield [source]
      return
    cache: dict[Path, Table] = {}
    for label, folder in recipe.models.items():
      if folder not in cache:
        cache[folder] = read_table(label, folder) | replacements.get(folder, {})
        _check_one_stack(label, folder, list(cache[folder]))
    cache = dict(zip(cache, roles.share_heads(list(cache.values())), strict=True))
    _note_tied_head(recipe, cache)
    parts, begin, total = [], 0, len(source_layers(recipe))
    reference = _find_reference(recipe)[1]
    reference_table = cache[reference] if reference in cache else read_table("base_model", reference)
    for i, (prefix, part) in enumerate(zip(recipe.prefixes, recipe.slices, strict=True)):
      tables = []
      for label, folder in part.models.items():
        first, end = part.layers[label]
        count = max(count_layers(list(cache[folder])).values(), default=0)
        if end > count:
          raise UserError(f"{prefix}{label}: layer_range [{first}, {end}]: {folder} has {count} layers")
        tables.append(_select_layers(cache[folder], first, end, begin, before=i == 0,
                                     after=i == len(recipe.slices) - 1))
      if next(iter(part.models.values())) != reference:
        _check_fit(recipe, prefix + next(iter(part.models)), tables[0], reference_table, before=i == 0,
                     after=i == len(recipe.slices) - 1)
      parts.append(stack.enter_context(CheckpointSource(part.models, tables=tables, first_layer=begin,
                                                   num_layers=total)))
      begin += end - first
    yield parts


def source_layers(recipe: Recipe) -> list[tuple[Path, int]] | None:
  """Returns the folder and layer of the first model that each output layer is merged from; None for whole models."""
  if recipe.slices[0].layers is None:
    return None
  layers = []
  for part in recipe.slices:
    label = next(iter(part.models))
    layers += [(part.models[label], layer) for layer in range(*part.layers[label])]
  return layers


def read_table(label: str, folder: Path) -> Table:
  """Reads the entries of a model's tensors, without those that are computed from others (tied head, rotary)."""
  with CheckpointSource({label: folder}) as source:
    return {name: source.entries(name)[0] for name in source.order}


def _find_reference(recipe: Recipe) -> tuple[str, Path]:
  """Returns label and folder of the model whose config the output takes."""
  return ("base_model", recipe.donor) if recipe.donor is not None else next(iter(recipe.models.items()))


def _check_fit(recipe: Recipe, label: str, table: Table, reference: Table, *, before: bool = True, after: bool = True,
                 ) -> None:
  """Raises UserError unless tensors fit the model whose config the output takes.

  Args:
    recipe: the recipe.
    label: the model that the tensors are of.
    table: its tensors: layers, and those before or after all layers.
    reference: all tensors of the other model.
    before: whether those before the layers are among them.
    after: whether those after the layers are among them.
  """
  shapes, examples = collections.defaultdict(set), {}
  for name, entry in reference.items():
    shapes[_form(name)].add(entry.shape)
    examples.setdefault(_form(name), []).append(name)
  # Of tied and untied models one has no head; its embedding is its head.
  is_own_head = lambda name: get_layer(name) is None and roles.is_head(name) and name.endswith("weight")
  if embedding := roles.find_embedding(reference):
    for name in filter(is_own_head, table):
      shapes[name] = shapes.get(name) or {reference[embedding].shape}
  problems = []
  for name, entry in table.items():
    form, rows = _form(name), int(recipe.tokens is not None and (roles.is_embedding(name) or roles.is_head(name)))
    if form not in shapes:
      problems += [] if is_buffer(name) else [f"has {form}"]
    elif entry.shape[rows:] not in {shape[rows:] for shape in shapes[form]}:
      problems.append(f"has {form} {entry.shape}, not {join_items(sorted(map(str, shapes[form])))}")
  layers, depth = (
      collections.Counter(stack for stack, layer in {(get_stack(name), get_layer(name)) for name in names})
      for names in (table, reference))
  counts = collections.Counter(map(_form, table))
  for form, names in examples.items():
    stack = get_stack(names[0])
    if stack is None:
      needed = 0 if is_own_head(form) else int(before if roles.precedes_layers(form) else after)
    else:  # what each layer of the other model has
      needed = layers[stack] if len(names) == depth[stack] else 0
    if counts[form] < needed and not is_buffer(names[0]):
      problems.append(f"lacks {form}")
  if problems:
    other, folder = _find_reference(recipe)
    raise UserError(f"{label} ({recipe.models[label]}) does not fit {other} ({folder}), whose config.json the output "
                    f"takes: it {join_items(list(dict.fromkeys(problems)), '; ')}")


def _form(name: str) -> str:
  """Returns a tensor's name without the number of its layer."""
  layer = get_layer(name)
  return name if layer is None else _renumber(name, layer, "N")


def _note_tied_head(recipe: Recipe, tables: Mapping[Path, Table]) -> None:
  """Notes that an output that is tied, as all its models are, has the first slice's head and not the last one's."""
  first, last = (list(part.models.values()) for part in (recipe.slices[0], recipe.slices[-1]))
  if first != last and not any(map(roles.find_heads, tables.values())) and model_configs.ties_embeddings(
      files.read_json(last[0] / "config.json")):
    print_once("note: all models of the slices tie head and embedding, and so does the output: both are the first "
               "slice's")


def _check_one_stack(label: str, folder: Path, names: list[str]) -> None:
  """Raises UserError if a model has several stacks of layers, of which a range of layers does not say one."""
  stacks = list(count_layers(names))
  if len(stacks) > 1:
    raise UserError(f"{label}: slices: {folder} has several stacks of layers ({join_items(stacks)}), and layer_range "
                    "does not say of which; only whole ones can be merged (models)")


def _select_layers(table: Table, first: int, end: int, begin: int, *, before: bool, after: bool) -> Table:
  """Selects layers [first, end), renumbered from `begin`, and on request the tensors before or after all layers."""
  result = {}
  for name, entry in table.items():
    layer = get_layer(name)
    if layer is None:
      if before if roles.precedes_layers(name) else after:
        result[name] = entry
    elif first <= layer < end:
      result[_renumber(name, layer, layer - first + begin)] = entry
  return result


def _renumber(name: str, layer: int, new: int | str) -> str:
  return re.sub(rf"(?<=[._]){layer}(?=\.|$)", str(new), name, count=1)
