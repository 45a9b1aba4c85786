"""The registry of merging methods. Files under `methods/` register them; functions, flags and recipes look them up.

    from imm_jax.merging import registry
    for name, method in registry.METHODS.items():
      print(name, method.summary, method.inputs, [option.name for option in method.options])

`@method(...)` decorates a kernel and turns it into the function on trees that `imm_jax.merging` exports. The command's
flags, their help, and the keys of recipes are derived from the same options.
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from imm_jax.errors import UserError, suggest
from imm_jax.merging import declarations, kernels
from imm_jax.merging.declarations import INPUTS
from imm_jax.merging.options import REQUIRED, Option, Settings
from imm_jax.merging.statistics import Source
from imm_jax.merging.trees import PyTree

# The numbers that a kernel needs for a tensor, by name.
TensorNumbers = dict[str, Any]
# (source, settings) -> numbers of a tensor by its name, static options of the kernel.
Prepare = Callable[[Source, Settings], tuple[Callable[[str], TensorNumbers], dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Plan:
  """Plans a merge of tensors.

  Attributes:
    kernel: (float32 tensors, numbers, shared, **static) -> merged; see `kernels`.
    static: static options of the kernel.
    numbers: tensor name -> numbers that the kernel needs for it.
    draws: whether the kernel draws a mask, and so must know the rows of a block.
    whole: unit that the kernel must see at once, `row` or `tensor`; None if it is elementwise.
  """

  kernel: Callable[..., jax.Array]
  static: Mapping[str, Any]
  numbers: Callable[[str], TensorNumbers]
  draws: bool = False
  whole: str | None = None


@dataclasses.dataclass(frozen=True)
class MergeMethod:
  """Describes a merging method as its file declares it.

  Attributes:
    name: name of the function, the `--method` and the `merge_method`.
    doc: description with the equation; the first line is a summary.
    reference: URL of the publication; empty if there is no single one.
    inputs: its models in order, keys of INPUTS: `base`, `base?` (optional), `start`, `tuned`, `other`, `models`, ...
    options: its options.
    kernel: the arithmetic, see `kernels`.
    prepare: computes the kernel's numbers, from whole tensors if need be; None if they are the options themselves.
    draws: whether it draws random masks, and so needs a key.
    whole: see `Plan`; may be computed from the settings.
    min_models: smallest number of `models`.
    max_models: largest number of `models`; None for no limit.
    measures: whether `prepare` reads tensors.
    gradients: `exact`, or `masks` if jax.grad treats the choice of kept entries as constant.
    layers: whether layer numbers matter beyond settings that vary over the layers.
    strength: the option that says how far a merge goes from the base (0) to the models (1), which a run sets to
      1 - `merge.base_weight`; `1 - NAME` if it counts the other way, so that it is set to `merge.base_weight` itself;
      empty for none. By default `weights`, one for each model, or `1 - base_weight`, where there is such an option.
  """

  name: str
  doc: str
  reference: str
  inputs: tuple[str, ...]
  options: tuple[Option, ...]
  kernel: Callable[..., jax.Array]
  prepare: Prepare | None = None
  draws: bool = False
  whole: str | Callable[[Settings], str | None] | None = None
  min_models: int = 1
  max_models: int | None = None
  measures: bool = False
  gradients: str = "exact"
  layers: bool = False
  strength: str | None = None

  @property
  def strength_option(self) -> str:
    """The option that a run's base weight sets; empty if there is none."""
    if self.strength is not None:
      return self.strength.removeprefix("1 - ")
    weights = self.by_option.get("weights")
    return "weights" if weights and weights.per_model else "base_weight" if "base_weight" in self.by_option else ""

  @property
  def is_base_weight(self) -> bool:
    """Whether `strength_option` is the base's weight, which falls as the strength rises."""
    return self.strength_option == "base_weight" if self.strength is None else self.strength.startswith("1 - ")

  @property
  def summary(self) -> str:
    """The first line of `doc`, without its full stop."""
    return self.doc.strip().partition("\n")[0].rstrip(".")

  @property
  def base(self) -> str:
    """`required`, `optional` or `none`: whether it takes a base."""
    return "required" if "base" in self.inputs else "optional" if "base?" in self.inputs else "none"

  @property
  def needs_whole_tensors(self) -> bool:
    """Whether it needs whole tensors, so that it cannot run on shards."""
    return self.gradients == "masks" or self.whole is not None or self.measures

  @property
  def by_option(self) -> dict[str, Option]:
    """Its options by name."""
    return {option.name: option for option in self.options}

  @property
  def bounds(self) -> tuple[int, int | None]:
    """The least and the largest number of models beside the base; None for no limit."""
    return (self.min_models, self.max_models) if "models" in self.inputs else (1, 1)

  @property
  def count_in_words(self) -> str:
    """The number of models beside the base, such as `2 or more models`."""
    low, high = self.bounds
    count = f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
    return f"{count} model{'s' * (count != '1')}"

  def accepts(self, count: int) -> bool:
    """Returns whether it takes this number of models beside the base."""
    low, high = self.bounds
    return count >= low and (high is None or count <= high)

  def __call__(self, source: Source, **options: Any) -> Plan:
    """Plans a merge of these models; raises ValueError for invalid options."""
    settings = Settings(self.options, options, source, self._num_models(source))
    static = {o.name: settings[o.name] for o in self.options if o.kind in declarations.STATIC}
    names = [o.name for o in self.options if o.kind in ("number", "constant")]
    numbers: Callable[[str], TensorNumbers] = lambda tensor: {name: settings.value(name, tensor) for name in names}
    if self.prepare is not None:
      numbers, static = self.prepare(source if self.needs_whole_tensors else _Unread(source, self.name), settings)
    whole = self.whole(settings) if callable(self.whole) else self.whole
    # If no mask is drawn, blocks may have any shape.
    return Plan(self.kernel, static, numbers, self.draws and static.get("draw", True), whole)

  def _num_models(self, source: Source) -> int:
    """Returns the number of models that `per_model` options apply to."""
    count = source.num_models - source.has_base
    return count // 2 if "fishers" in self.inputs else count


class _Unread:
  """Implements the `Source` of a method that does not declare that it reads tensors."""

  def __init__(self, source: Source, method: str):
    self._source, self._method = source, method

  def __getattr__(self, name: str) -> Any:
    if name in ("reduce", "tensors"):
      raise UserError(f"{self._method}: its prepare reads tensors; @method needs measures=True")
    return getattr(self._source, name)


METHODS: dict[str, MergeMethod] = {}


def method(*inputs: str, options: Sequence[Option] = (), reference: str = "", **attributes: Any,
           ) -> Callable[[Callable[..., jax.Array]], Callable[..., PyTree]]:
  """Registers a kernel as a method under its name, and turns it into a function on trees.

  Args:
    inputs: see `MergeMethod`.
    options: see `MergeMethod`.
    reference: see `MergeMethod`.
    attributes: further attributes of `MergeMethod`.

  Raises:
    UserError: for what cannot work; names the file, the method and the option.
  """

  for kernel in filter(callable, inputs):
    raise UserError(f"{kernels.find_file(kernel)}: @method needs the names of the inputs: @method(\"base\", \"other\")")

  def register(kernel: Callable[..., jax.Array]) -> Callable[..., PyTree]:
    name = kernel.__name__
    if name in METHODS:
      declarations.check_name(kernel, METHODS[name].kernel)
    declarations.check_attributes(kernel, MergeMethod, options, attributes)
    record = MergeMethod(name, inspect.cleandoc(kernel.__doc__ or ""), reference, inputs, tuple(options), kernel,
                         **attributes)
    declarations.check(record)
    METHODS[name] = record
    return _make_function(record)

  return register


def load_file(path: Path) -> None:
  """Imports a Python file of the user's that registers methods; files beside it can be imported in it.

  Raises:
    UserError: if it cannot be imported, or registers none.
  """
  before = dict(METHODS)
  sys.path.insert(0, str(path.resolve().parent))
  try:
    runpy.run_path(str(path))
  except UserError:
    raise
  except Exception as e:  # a file of the user's may raise anything
    raise UserError(f"{path}: cannot be imported: {type(e).__name__}: {' '.join(str(e).split())}") from e
  finally:
    sys.path.remove(str(path.resolve().parent))
  if all(before.get(name) is entry for name, entry in METHODS.items()):
    raise UserError(f"{path}: registers no method with @method")


def list_disk_methods() -> dict[str, MergeMethod]:
  """Returns the methods that merge checkpoints, by name."""
  return {name: METHODS[name] for name in sorted(METHODS) if "delta" not in METHODS[name].inputs}


def list_round_methods() -> dict[str, MergeMethod]:
  """Returns the methods that can merge a round's model with the base, by name."""
  return {name: entry for name, entry in list_disk_methods().items()
          if "fishers" not in entry.inputs and entry.max_models != 1}


def list_round_options() -> list[str]:
  """Returns the names of the options of `list_round_methods()` that are settings of their own (`merge.options`)."""
  names = {option.name for entry in list_round_methods().values() for option in entry.options}
  return sorted(names - {"base_weight", "drop_rate", "importance"})


def format_option_help() -> dict[str, str]:
  """Returns the help of the command's flags: for every option of `list_disk_methods()` its meaning to each method."""
  methods_by_text: dict[str, dict[str, list[str]]] = {}
  for entry in list_disk_methods().values():
    for option in entry.options:
      default = "" if option.suggested is REQUIRED else f" [default: {option.suggested}]"
      text = f"{option.help}; {option.range}{default}" if option.range else option.help + default
      methods_by_text.setdefault(option.name, {}).setdefault(text, []).append(entry.name)
  return {name: " ".join(f"{', '.join(names)}: {text}." for text, names in texts.items())
          for name, texts in methods_by_text.items()}


def load() -> dict[str, Callable[..., PyTree]]:
  """Imports every file of `methods`, which registers its methods, and returns the functions on trees by name."""
  package = importlib.import_module("imm_jax.merging.methods")
  modules = []
  for module in pkgutil.iter_modules(package.__path__):
    try:
      modules.append(importlib.import_module(f"{package.__name__}.{module.name}"))
    except Exception as e:  # every command imports the methods: which file it was must be seen in all of them
      e.add_note(f"This was raised in {module.name}.py, a merging method in {package.__path__[0]}.")
      raise
  return {name: getattr(module, name) for module in modules for name, entry in METHODS.items()
          if entry.kernel.__module__ == module.__name__}


def _make_function(method: MergeMethod) -> Callable[..., PyTree]:
  """Makes the function on trees from a method."""
  parameter = inspect.Parameter
  parameters = [parameter(name, parameter.POSITIONAL_OR_KEYWORD, annotation="Sequence[PyTree]" if name in (
      "models", "fishers") else "PyTree") for name in method.inputs if name != "base?"]
  keywords = [(option.name, option.default, option.annotation) for option in method.options]
  keywords += [("base", None, "PyTree | None")] if "base?" in method.inputs else []
  keywords += [("key", REQUIRED, "jax.Array")] if method.draws else []
  keywords += [("names", None, "PyTree | None"), ("layer_axis", 0, int), ("donate", False, bool)]
  parameters += [parameter(name, parameter.KEYWORD_ONLY, default=default, annotation=annotation)
                 for name, default, annotation in keywords]
  signature = inspect.Signature(parameters, return_annotation="PyTree")

  @functools.wraps(method.kernel)
  def merge(*args: Any, **kwargs: Any) -> PyTree:
    from imm_jax.merging import in_memory  # imported here because it imports this module

    if unknown := [name for name in kwargs if name not in signature.parameters]:
      raise TypeError(f"{method.name}() takes no {unknown[0]!r}; {suggest(unknown[0], [*signature.parameters])}")
    try:
      bound = signature.bind(*args, **kwargs)
    except TypeError as e:
      raise TypeError(f"{method.name}() {e}") from None
    bound.apply_defaults()
    options = dict(bound.arguments)
    trees = {name.rstrip("?"): options.pop(name.rstrip("?")) for name in method.inputs}
    common = {name: options.pop(name) for name in ("names", "layer_axis", "donate")}
    return in_memory.merge(method, trees, options, key=options.pop("key", None), **common)

  merge.__dict__["__signature__"] = signature
  merge.__doc__ = _make_docstring(method)
  merge.__annotations__ = {}
  del merge.__wrapped__  # `inspect` would show the kernel's signature and source
  return merge


def _make_docstring(method: MergeMethod) -> str:
  """Builds the function's docstring: the method's text with the arguments inserted before the example."""
  lines = []
  for name in method.inputs:
    count = f", {method.count_in_words.rpartition(' ')[0]}" if name == "models" else ""
    lines.append(f"  {name.rstrip('?')}: {INPUTS[name]}{count}.")
  for option in method.options:
    per_model = "; one for all models, or a list with one for each" if option.per_model else ""
    lines.append(f"  {option.name}: {option.help.rstrip('.')}{per_model}; {option.range}.".replace("; .", "."))
  lines += ["  key: a threefry key, `jax.random.key(seed)`."] if method.draws else []
  lines += ["  names: tensor names, see `imm_jax.merging`.", "  layer_axis: axis of the layers in stacked leaves.",
            "  donate: donate the first tree's buffers to the result."]
  text, *example = method.doc.partition("\n\n>>>")
  reference = f"\n\nSource: {method.reference}" if method.reference else ""
  return (f"{text}{reference}\n\nArgs:\n" + "\n".join(lines) + "\n\nReturns:\n  The merged tree, in the first tree's "
          "dtypes.\n\nRaises:\n  ValueError: see `imm_jax.merging`." + "".join(example) + "\n")
