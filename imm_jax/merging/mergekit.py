"""Reads merge recipes in mergekit's YAML format.

A recipe names models or slices of their layers, a method and parameters. A parameter is a value, a list over the
layers, or a list of `{filter: part of a tensor name, value: ...}`, of which the first match counts. A source's own
parameters take precedence over its slice's, these over the module's, these over the file's. Arithmetic is float32
whatever `dtype` says (which, without `out_dtype`, is the dtype written); docs/merging.md lists the differences.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from imm_jax.errors import UserError, print_once, suggest
from imm_jax.merging import registry
from imm_jax.merging.options import REQUIRED, Option
from imm_jax.merging.recipe import DTYPES, Recipe, Slice, Tokens
from imm_jax.merging.registry import Method
from imm_jax.model import hub

# Methods by name that recipes may use.
_METHODS = {name: method for name, method in registry.on_disk().items() if "fishers" not in method.inputs}
_KEYS = {"merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype",
         "tokenizer_source", "tokenizer", "chat_template", "name"}
# Keys that mergekit or its older versions accept and that have no effect here.
_IGNORED_KEYS = {"random_seed", "embed_slerp", "residual_weight", "architecture"}
_IGNORED_PARAMETERS = {"int8_mask", "embed_slerp", "normalize", "rescale"}
_CHATML = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
           "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
_ALL_PARAMETERS = {option.key for method in _METHODS.values() for option in method.options} | _IGNORED_PARAMETERS


def read_documents(path: Path) -> list[dict[str, Any]]:
  """Loads the documents of a YAML file without interpreting them.

  Raises:
    UserError: if the file does not hold recipes.
  """
  try:
    raws = [raw for raw in yaml.safe_load_all(path.read_text(encoding="utf-8")) if raw is not None]
  except OSError as e:
    raise UserError(f"{path}: cannot be read ({e.strerror})") from e
  except (yaml.YAMLError, UnicodeDecodeError) as e:
    raise UserError(f"{path}: is not YAML ({' '.join(str(e).split())})") from e
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
  return _Reader(path, dict(earlier or {})).recipe(read_documents(path)[number])


def document_names(path: Path) -> Iterator[str | None]:
  """Yields each document's name, by which later documents refer to its result."""
  return (raw.get("name") for raw in read_documents(path))


class _Reader:
  """Reads one document; errors name the file."""

  def __init__(self, path: Path, earlier: Mapping[str, Path]):
    self._path, self._earlier, self._method = path, earlier, ""

  def recipe(self, raw: Mapping[str, Any]) -> Recipe:
    raw = {key: value for key, value in raw.items() if value is not None}
    if "experts" in raw:
      self._fail("experts: a mixture of experts, as mergekit-moe makes them, is not supported; expected merge_method "
                 "with models or slices")
    self._refuse_unknown("", raw, _KEYS, _IGNORED_KEYS)
    method = _METHODS.get(raw.get("merge_method", ""))
    if method is None:
      self._fail(f"merge_method={raw.get('merge_method')!r}: {suggest(str(raw.get('merge_method')), list(_METHODS))}")
    self._method = method.name
    raw, outer = self._unwrap_module(raw)
    if ("models" in raw) == ("slices" in raw):
      self._fail("expected models or slices" + (", not both" if "models" in raw else ""))
    outer = [*outer, ("parameters", raw.get("parameters"))]
    base = raw.get("base_model")
    if "models" in raw:
      slices = [self._read_slice(method, "models", raw["models"], base, outer, whole=True)]
    else:
      entries = self._require_entries("slices", raw["slices"])
      slices = []
      for i, entry in enumerate(entries):
        where = f"slices[{i}]"
        self._refuse_unknown(f"{where}.", entry, {"sources", "parameters", "base_model"}, _IGNORED_KEYS)
        slices.append(self._read_slice(
            method, f"{where}.sources", entry.get("sources"), entry.get("base_model") or base,
            [(f"{where}.parameters", entry.get("parameters")), *outer], whole=False))
    dtype = raw.get("out_dtype") or raw.get("dtype")
    if dtype is not None:
      dtype = str(dtype).removeprefix("torch.")
      if dtype not in DTYPES:
        self._fail(f"dtype={dtype!r}: {suggest(dtype, list(DTYPES))}")
    return Recipe(method.name, tuple(slices), dtype, self._resolve_folder(base) if base is not None else None,
                  self._read_tokens(raw), self._read_chat_template(raw), raw.get("name"))

  def _unwrap_module(self, raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[tuple[str, Any]]]:
    """Returns the recipe with the models or slices of its only module, and that module's parameters."""
    modules = raw.get("modules")
    if modules is None:
      return raw, []
    if not isinstance(modules, dict) or len(modules) != 1 or not isinstance(next(iter(modules.values())), dict):
      names = ", ".join(map(str, modules)) if isinstance(modules, dict) else modules
      self._fail(f"modules: {names}: expected one module with models or slices; mergekit merges each module of a model "
                 "of several (vision and text) on its own, which is not supported")
    (name, module), = modules.items()
    self._refuse_unknown(f"modules.{name}.", module, {"models", "slices", "parameters"})
    return {**raw, **{k: v for k, v in module.items() if k != "parameters"}}, [
        (f"modules.{name}.parameters", module.get("parameters"))]

  def _read_slice(self, method: Method, where: str, raw: Any, base: Any, outer: Sequence[tuple[str, Any]], *,
                  whole: bool) -> Slice:
    """Reads one slice; `outer` lists the levels of parameters outside its sources, innermost first."""
    entries = self._require_entries(where, raw)
    for i, entry in enumerate(entries):
      known = {"model", "parameters"} | (set() if whole else {"layer_range"})
      self._refuse_unknown(f"{where}[{i}].", entry, known)
      if "model" not in entry:
        self._fail(f"{where}[{i}]: expected an entry with the key model")
    document_names = [self._model_name(entry["model"]) for entry in entries]
    has_base = base is not None and self._model_name(base) in document_names
    uses_base = method.base == "required" or (method.base == "optional" and base is not None)
    if uses_base and base is None:
      self._fail(f"base_model is missing; {method.name} needs one")
    has_per_model = any(option.per_model for option in method.options)
    if base is not None and not has_base:
      # As in mergekit, the base counts as one of the models, unless the method has options for each model.
      if uses_base and not whole:
        self._fail(f"{where}: base_model is not among the sources; {method.name} needs its layers")
      if uses_base or (not has_per_model and method.most is None):
        entries = [*entries, {"model": base}]
        document_names.append(self._model_name(base))
    order = [i for i in range(len(entries)) if not (uses_base and document_names[i] == self._model_name(base))]
    labels = {f"{where}[{i}]": entries[i] for i in order}
    if uses_base:
      labels = {"base": entries[document_names.index(self._model_name(base))], **labels}
    labels = self._label_inputs(method, where, labels, len(order))
    own = {label: (f"{label}.parameters", entry.get("parameters")) for label, entry in labels.items()}
    for place, parameters in [*own.values(), *outer]:
      self._check_keys(method, place, parameters)
    options = {}
    for option in method.options:
      if option.per_model:
        options[option.name] = [self._inherit_setting(option, label, [own[label], *outer])
                                for label in labels if label != "base"]
      else:
        given = any(isinstance(level, dict) and level.get(option.key) is not None for _, level in outer)
        if given or option.suggested is not option.default or option.required:
          options[option.name] = self._inherit_setting(option, "parameters", outer)
    layers = None if whole else {label: self._read_layer_range(label, entry) for label, entry in labels.items()}
    if layers and len({end - first for first, end in layers.values()}) > 1:
      self._fail(f"{where}: layer_range: all sources of a slice need the same number of layers")
    return Slice({label: self._resolve_folder(entry["model"]) for label, entry in labels.items()}, options, layers)

  def _label_inputs(self, method: Method, where: str, labels: dict[str, Any], count: int) -> dict[str, Any]:
    """Labels the models in the method's order; fails if it takes another number of models."""
    if "start" in method.inputs:
      if count not in (1, 2):
        self._fail(f"{where}: {method.name} takes base_model and one other model, or two, start and tuned")
      values = list(labels.values())
      return dict(zip(("base", "start", "tuned"), values if count == 2 else [values[0], *values], strict=True))
    least, most = (method.least, method.most) if "models" in method.inputs else (1, 1)
    if count < least or (most is not None and count > most):
      wanted = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
      other = "other than base_model" if method.base == "required" else "in all"
      self._fail(f"{where}: {method.name} takes {wanted} model{'s' * (wanted != '1')} {other}, not {count}")
    return labels

  def _inherit_setting(self, option: Option, where: str, levels: Sequence[tuple[str, Any]]) -> Any:
    """Returns an option's setting from the first level that has it; unmatched filters fall through to the next."""
    settings = [self._read_setting(option, f"{place}.{option.key}", level[option.key]) for place, level in levels
                if isinstance(level, dict) and level.get(option.key) is not None]
    # In recipes densities default to 1, and weights must be given.
    default = {"density": 1.0, "weight": REQUIRED}.get(option.key, option.suggested)
    if not settings and default is REQUIRED:
      place = "" if where == "parameters" else f"{where}."
      self._fail(f"{place}parameters.{option.key} is missing; {self._method} needs it")
    if option.kind != "number" or not settings:
      return settings[0] if settings else default
    patterns: dict[str, Any] = {}
    for setting in (*settings, *([] if default is REQUIRED else [default])):
      for pattern, value in (setting.items() if isinstance(setting, dict) else [("", setting)]):
        patterns.setdefault(pattern, value)
    first = next(iter(patterns))
    return patterns[first] if first == "" else patterns

  def _read_setting(self, option: Option, where: str, value: Any) -> Any:
    """Converts a value of a recipe to a setting: filters become regexes."""
    if option.kind == "number":
      return self._read_numbers(where, value)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and set(value[0]) == {"value"}:
      value = value[0]["value"]
    if option.kind == "flag":
      if not isinstance(value, bool | int) or value not in (0, 1):
        self._fail(f"{where}={value!r}: expected true or false, the same for all tensors")
      return bool(value)
    return self._read_numbers(where, value) if option.kind in ("constant", "vector") else value

  def _read_numbers(self, where: str, value: Any) -> Any:
    if isinstance(value, dict):
      value = [value]
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
      patterns: dict[str, Any] = {}
      for condition in value:
        self._refuse_unknown(f"{where}.", condition, {"filter", "value"})
        if "value" not in condition:
          self._fail(f"{where}: an entry has no value")
        part = condition.get("filter")
        patterns.setdefault("" if part in (None, "*") else re.escape(str(part)),
                            self._read_numbers(where, condition["value"]))
      return patterns
    try:
      # YAML parses 1e-3 as a string.
      return [float(v) for v in value] if isinstance(value, list) and value else float(value)
    except (TypeError, ValueError):
      self._fail(f"{where}={value!r}: expected a number, a list of numbers, or a list of filters")

  def _check_keys(self, method: Method, where: str, raw: Any) -> None:
    """Refuses parameters that no method takes; those of other methods are ignored with a note, as in mergekit."""
    if raw is None:
      return
    if not isinstance(raw, dict):
      self._fail(f"{where}: expected a mapping")
    keys = {option.key for option in method.options}
    if raw.get("rescale") and "rescale" not in keys and any(o.key == "density" for o in method.options):
      self._fail(f"{where}.rescale: {method.name} does not rescale; mergekit restores the L1 norm of what it trims")
    self._refuse_unknown(f"{where}.", raw, keys, _ALL_PARAMETERS)
    for key in sorted(raw.keys() - keys - _IGNORED_PARAMETERS):
      print_once(f"note: {self._path}: {where}.{key} has no effect on {method.name}")

  def _read_layer_range(self, label: str, entry: Mapping[str, Any]) -> tuple[int, int]:
    value = entry.get("layer_range")
    is_pair = isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) for n in value)
    if not is_pair or not 0 <= value[0] < value[1]:
      self._fail(f"{label}.layer_range={value!r}: expected [first, end] with 0 <= first < end")
    return value[0], value[1]

  def _read_tokens(self, raw: Mapping[str, Any]) -> Tokens | None:
    given = raw.get("tokenizer")
    if given is None:
      source = raw.get("tokenizer_source")
      return None if source is None else Tokens(self._tokenizer_source(source))
    if "tokenizer_source" in raw:
      self._fail("tokenizer_source and tokenizer: give one of them")
    if not isinstance(given, dict):
      self._fail("tokenizer: expected a mapping with source")
    self._refuse_unknown("tokenizer.", given, {"source", "tokens", "pad_to_multiple_of"})
    multiple = given.get("pad_to_multiple_of")
    if multiple is not None and (not isinstance(multiple, int) or multiple < 1):
      self._fail(f"tokenizer.pad_to_multiple_of={multiple!r}: expected a number of rows")
    tokens = {}
    for token, entry in (given.get("tokens") or {}).items():
      where = f"tokenizer.tokens.{token}"
      if not isinstance(entry, dict):
        self._fail(f"{where}: expected a mapping with source or force")
      self._refuse_unknown(f"{where}.", entry, {"source", "force"})
      source = entry.get("source")
      if isinstance(source, dict) and source.get("kind") == "model_token":
        self._refuse_unknown(f"{where}.source.", source, {"kind", "model", "token", "token_id"})
        if (source.get("token") is None) == (source.get("token_id") is None):
          self._fail(f"{where}.source: expected token or token_id")
        source = {**source, "model": self._resolve_folder(source.get("model"))}
      elif isinstance(source, dict) and source.get("kind") == "zero":
        source = {"kind": "zero"}
      elif source is not None:
        source = self._resolve_folder(source)
      tokens[str(token)] = {"source": source, "force": bool(entry.get("force", False))}
    return Tokens(self._tokenizer_source(given.get("source", "union")), tokens, multiple)

  def _tokenizer_source(self, source: Any) -> str | Path:
    return source if source in ("union", "base") else self._resolve_folder(source)

  def _read_chat_template(self, raw: Mapping[str, Any]) -> str | None:
    template = raw.get("chat_template")
    if template == "chatml":
      return _CHATML
    if template is not None and template != "auto" and (not isinstance(template, str) or "{" not in template):
      self._fail(f"chat_template={template!r}: expected auto, chatml or a Jinja template; mergekit's other named "
                 "templates are not supported")
    return template

  def _model_name(self, model: Any) -> str:
    """Returns a model's name in mergekit's form, PATH[@REVISION][+ADAPTER[@REVISION]]."""
    if isinstance(model, dict) and isinstance(model.get("model"), dict):
      self._refuse_unknown("model.", model, {"model", "lora"})
      parts = [model["model"], *([model["lora"]] if model.get("lora") else [])]
    elif isinstance(model, dict) and "path" in model:
      parts = [model]
    else:
      if not isinstance(model, str):
        self._fail(f"model {model!r}: expected a folder or a hub id")
      return model
    return "+".join(part["path"] + (f"@{part['revision']}" if part.get("revision") else "") for part in parts)

  def _resolve_folder(self, model: Any) -> Path:
    name = self._model_name(model)
    return self._earlier[name] if name in self._earlier else hub.resolve(name)

  def _require_entries(self, where: str, raw: Any) -> list[dict[str, Any]]:
    if not isinstance(raw, list) or not raw or not all(isinstance(entry, dict) for entry in raw):
      self._fail(f"{where}: expected a list of entries" + (" with the key model" if where == "models" else ""))
    return raw

  def _refuse_unknown(self, where: str, raw: Mapping[str, Any], known: set[str], ignored: set[str] | None = None,
                      ) -> None:
    for key in raw:
      if key not in known and key not in (ignored or set()):
        hint = suggest(str(key), sorted(known | (ignored or set()))) if known else "expected none here"
        self._fail(f"{where}{key} is not supported; {hint}")

  def _fail(self, problem: str) -> None:
    raise UserError(f"{self._path}: {problem}")
