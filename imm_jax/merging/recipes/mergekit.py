"""Reads merge recipes in mergekit's YAML format.

A recipe names models or slices of their layers, a method and parameters. A parameter is a value, a list over the
layers, or a list of `{filter: part of a tensor name, value: ...}`, of which the first match counts. A source's own
parameters take precedence over its slice's, these over the module's, these over the file's. Arithmetic is float32
whatever `dtype` says (which, without `out_dtype`, is the dtype written); docs/merging.md lists the differences.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from imm_jax.errors import UserError, suggest
from imm_jax.merging import registry
from imm_jax.merging.recipes import parameters
from imm_jax.merging.recipes.models import Models, read_model
from imm_jax.merging.recipes.parameters import Level
from imm_jax.merging.recipes.recipe import DTYPES, Recipe, Slice
from imm_jax.merging.recipes.recipe_file import RecipeFile, YamlLoader, describe_yaml_error
from imm_jax.merging.registry import MergeMethod

_KEYS = {"merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype",
         "tokenizer_source", "tokenizer", "chat_template", "name"}
# Keys that mergekit or its older versions accept and that have no effect here.
_IGNORED_KEYS = {"random_seed", "embed_slerp", "residual_weight", "architecture"}
_CHATML = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
           "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
_INNER_KEYS = {"sources", "model", "layer_range", "experts", "gate_mode"}


def read_documents(path: Path) -> list[dict[str, Any]]:
  """Loads the documents of a YAML file without interpreting them.

  Raises:
    UserError: if the file does not hold recipes.
  """
  try:
    raws = [raw for raw in yaml.load_all(path.read_text(encoding="utf-8"), YamlLoader) if raw is not None]
  except OSError as e:
    raise UserError(f"{path}: cannot be read ({e.strerror})") from e
  except UnicodeDecodeError as e:
    raise UserError(f"{path}: is not YAML ({e})") from e
  except yaml.YAMLError as e:
    raise UserError(f"{path}: {describe_yaml_error(e)}") from e
  if not raws or not all(isinstance(raw, dict) for raw in raws):
    raise UserError(f"{path}: expected a mapping with merge_method and models")
  return raws


def read(path: Path, number: int = 0, earlier: Mapping[str, Path] | None = None) -> Recipe:
  """Reads one recipe.

  Args:
    path: the YAML file.
    number: index of the document in the file.
    earlier: name -> folder of the merges of earlier documents.

  Raises:
    UserError: if the document is no recipe, or has a key or method that is not supported.
  """
  documents = read_documents(path)
  later = [name for raw in documents[number + 1:] if isinstance(name := raw.get("name"), str)]
  place = f"{path}: document {number + 1}" if len(documents) > 1 else str(path)
  keys = _KEYS | _IGNORED_KEYS | _list_parameters() | parameters.IGNORED | _INNER_KEYS
  return _Reader(RecipeFile(place, keys), earlier or {}, later).recipe(documents[number])


def _list_methods() -> dict[str, MergeMethod]:
  """Returns the methods that recipes may use, by name; those of the user's files, too."""
  return {name: method for name, method in registry.list_disk_methods().items() if "fishers" not in method.inputs}


def _list_parameters() -> set[str]:
  return {option.key for method in _list_methods().values() for option in method.options}


def read_names(path: Path) -> list[str | None]:
  """Reads each document's name, by which later ones refer to its result; None for a last document without one.

  Raises:
    UserError: if one of several documents cannot be written under its name in the output's folder.
  """
  names = [raw.get("name") for raw in read_documents(path)]
  if len(names) == 1:
    return [None]
  for i, name in enumerate(names):
    if name is None and i == len(names) - 1:
      continue
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or any(part.startswith((".", "/")) or "\0" in part for part in parts) or parts[0] == "merge.json":
      raise UserError(f"{path}: name={name!r} of document {i + 1}: each document but the last needs a name, the "
                      "text of a path in --out, without .. or a dot in front")
    if clash := next((other for other in names[:i] if _overlap(name, other)), None):
      raise UserError(f"{path}: name={name!r} of document {i + 1}: is, holds or lies in {clash!r} of another document")
  return names


def _overlap(name: str, other: str) -> bool:
  a, b = PurePosixPath(name), PurePosixPath(other)
  return a == b or a in b.parents or b in a.parents


class _Reader:
  """Reads one document."""

  def __init__(self, file: RecipeFile, earlier: Mapping[str, Path], later: Sequence[str]):
    self._file, self._models = file, Models(file, earlier, later)

  def recipe(self, raw: Mapping[str, Any]) -> Recipe:
    file = self._file
    raw = {key: value for key, value in raw.items() if value is not None and (value or key not in ("models", "slices"))}
    if "experts" in raw:
      file.fail("experts: a mixture of experts, as mergekit-moe makes them, is not supported; expected merge_method "
                "with models or slices")
    file.note_unknown("", raw, _KEYS, _IGNORED_KEYS)
    method = self._find_method(raw.get("merge_method"))
    raw, outer = self._unwrap_module(raw)
    if ("models" in raw) == ("slices" in raw):
      file.fail("expected models or slices" + (", not both" if "models" in raw else ""))
    outer = [*outer, ("parameters", raw.get("parameters"))]
    base = raw.get("base_model")
    if "models" in raw:
      slices = [self._read_slice(method, "models", raw["models"], ("base_model", base), outer, whole=True)]
    else:
      slices = []
      for i, entry in enumerate(self._require_entries("slices", raw["slices"])):
        where = f"slices[{i}]"
        file.note_unknown(f"{where}.", entry, {"sources", "parameters", "base_model"}, _IGNORED_KEYS)
        own = entry.get("base_model")
        slices.append(self._read_slice(
            method, f"{where}.sources", entry.get("sources"),
            ("base_model", base) if own is None else (f"{where}.base_model", own),
            [(f"{where}.parameters", entry.get("parameters")), *outer], whole=False))
      if not any(end - first for part in slices for first, end in part.layers.values()):
        file.fail("slices: none of them has a layer")
    if len(slices) > 1 and any(part.options.get("scope") == "model" for part in slices):
      file.fail("parameters.scope='model': slices are merged one by one, so nothing is counted over the whole model; "
                "give models in place of slices, or scope: tensor")
    dtype = raw.get("out_dtype") or raw.get("dtype")
    if dtype is not None:
      dtype = str(dtype).removeprefix("torch.")
      if dtype not in DTYPES:
        file.fail(f"dtype={dtype!r}: {suggest(dtype, list(DTYPES))}")
    donor = None if base is None else self._models.find("base_model", base)
    tokens = self._models.read_tokens(raw)
    return Recipe(method.name, tuple(slices), dtype, donor, tokens, self._read_chat_template(raw),
                  tuple(self._models.parts))

  def _find_method(self, name: Any) -> MergeMethod:
    if name == "fisher":
      self._file.fail("merge_method='fisher': a recipe has no place for Fisher matrices; give --method=fisher with "
                      "--models and --fishers in place of --recipe")
    methods = _list_methods()
    method = methods.get(name) if isinstance(name, str) else None
    if method is None:
      self._file.fail(f"merge_method={name!r}: {suggest(str(name), list(methods))}")
    return method

  def _unwrap_module(self, raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Level]]:
    """Returns the recipe with the models or slices of its only module, and that module's parameters."""
    modules = raw.get("modules")
    if modules is None:
      return raw, []
    if not isinstance(modules, dict) or len(modules) != 1 or not isinstance(next(iter(modules.values())), dict):
      names = ", ".join(map(str, modules)) if isinstance(modules, dict) else modules
      self._file.fail(f"modules: {names}: expected one module with models or slices; mergekit merges each module of a "
                      "model of several (vision and text) on its own, which is not supported")
    (name, module), = modules.items()
    self._file.note_unknown(f"modules.{name}.", module, {"models", "slices", "parameters"}, _IGNORED_KEYS)
    content = {key: module[key] for key in ("models", "slices") if module.get(key)}
    return {**raw, **content}, [(f"modules.{name}.parameters", module.get("parameters"))]

  def _read_slice(self, method: MergeMethod, where: str, raw: Any, base: Level, outer: Sequence[Level], *,
                  whole: bool) -> Slice:
    """Reads one slice; `outer` lists the levels of parameters outside its sources, innermost first."""
    file = self._file
    entries = [(f"{where}[{i}]", entry) for i, entry in enumerate(self._require_entries(where, raw))]
    for place, entry in entries:
      file.note_unknown(f"{place}.", entry, {"model", "parameters"} | (set() if whole else {"layer_range"}),
                        _IGNORED_KEYS)
      if "model" not in entry:
        file.fail(f"{place}: expected an entry with the key model")
    names = [read_model(file, f"{place}.model", entry["model"]) for place, entry in entries]
    base_name = None if base[1] is None else read_model(file, *base)
    # One model may be spelled in several ways.
    same = [base_name is not None and (name == base_name or self._models.identify(name) == self._models.identify(
        base_name)) for name in names]
    uses_base = method.base == "required" or (method.base == "optional" and base_name is not None)
    if uses_base and base_name is None:
      file.fail(f"base_model is missing; {method.name} needs one")
    has_per_model = any(option.per_model for option in method.options)
    if base_name is not None and not any(same):
      # As in mergekit, the base counts as one of the models, unless the method has options for each model.
      if uses_base and not whole:
        file.fail(f"{where}: base_model is not among the sources; {method.name} needs its layers")
      if uses_base or (not has_per_model and method.bounds[1] is None):
        entries.append((f"{where}[{len(entries)}]", {"model": base_name}))
        same.append(True)
    order = [i for i in range(len(entries)) if not (uses_base and same[i])]
    # The slice's place is no part of the labels, because `Recipe.models` puts it in front.
    chosen = {entries[i][0].rpartition(".")[2]: entries[i] for i in order}
    if uses_base:
      chosen = {"base": entries[same.index(True)], **chosen}
    chosen = self._label_inputs(method, where, chosen, len(order))
    own = {label: (f"{place}.parameters", entry.get("parameters")) for label, (place, entry) in chosen.items()}
    known = _list_parameters()
    for level in own.values():
      parameters.check_keys(file, method, level, known, of_model=True)
    for level in outer:
      parameters.check_keys(file, method, level, known)
    options = {}
    for option in method.options:
      if option.per_model:
        options[option.name] = [parameters.inherit_setting(file, method, option, own[label][0],
                                                                  [own[label], *outer])
                                for label in chosen if label != "base"]
      elif option.suggested is not option.default or option.required or any(
          isinstance(level, dict) and level.get(option.key) is not None for _, level in outer):
        options[option.name] = parameters.inherit_setting(file, method, option, outer[0][0], outer)
    layers = None if whole else {label: self._read_layer_range(*chosen[label]) for label in chosen}
    if layers and len({end - first for first, end in layers.values()}) > 1:
      file.fail(f"{where}: layer_range: all sources of a slice need the same number of layers")
    return Slice({label: self._models.find(f"{place}.model", entry["model"])
                  for label, (place, entry) in chosen.items()}, options, layers)

  def _label_inputs(self, method: MergeMethod, where: str, chosen: dict[str, Level], count: int) -> dict[str, Level]:
    """Labels the models in the method's order; fails if it takes another number of models."""
    if "start" in method.inputs:
      if count not in (1, 2):
        self._file.fail(f"{where}: {method.name} takes base_model and one other model, or two, start and tuned")
      values = list(chosen.values())
      return dict(zip(("base", "start", "tuned"), values if count == 2 else [values[0], *values], strict=True))
    if not method.accepts(count):
      other = "other than base_model" if method.base == "required" else "in all"
      self._file.fail(f"{where}: {method.name} takes {method.count_in_words} {other}, not {count}")
    return chosen

  def _read_layer_range(self, place: str, entry: Mapping[str, Any]) -> tuple[int, int]:
    value, expected = entry.get("layer_range"), "[first, end] with 0 <= first <= end"
    if not isinstance(value, list) or len(value) != 2:
      self._file.fail(f"{place}.layer_range={value!r}: expected {expected}")
    first, end = (self._file.read_integer(f"{place}.layer_range", number, expected) for number in value)
    if first > end:
      self._file.fail(f"{place}.layer_range={value!r}: expected {expected}")
    return first, end

  def _read_chat_template(self, raw: Mapping[str, Any]) -> str | None:
    template = raw.get("chat_template")
    if template == "chatml":
      return _CHATML
    if template is not None and template != "auto" and (not isinstance(template, str) or "{" not in template):
      self._file.fail(f"chat_template={template!r}: expected auto, chatml or a Jinja template; mergekit's other named "
                      "templates are not supported")
    return template

  def _require_entries(self, where: str, raw: Any) -> list[dict[str, Any]]:
    if not isinstance(raw, list) or not raw or not all(isinstance(entry, dict) for entry in raw):
      self._file.fail(f"{where}: expected a list of entries" + (" with the key model" if where == "models" else ""))
    return raw
