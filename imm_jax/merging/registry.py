"""Merging methods by name. A file under `methods/` registers one, and everything that offers methods asks here.

    from imm_jax.merging import registry
    for name, method in registry.METHODS.items():
      print(name, method.summary, method.inputs, [option.name for option in method.options])

`@method(...)` stands over a kernel and makes of it the function on trees that `imm_jax.merging` exports. The command's
flags, its help, and the keys of recipes are made from the same options.
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from imm_jax.errors import nearest
from imm_jax.merging.options import REQUIRED, Option, Settings
from imm_jax.merging.statistics import Source
from imm_jax.merging.trees import PyTree

Scalars = dict[str, Any]
# (source, settings) -> numbers of a tensor by its name, static options of the kernel.
Prepare = Callable[[Source, Settings], tuple[Callable[[str], Scalars], dict[str, Any]]]
# What each input is, for help and docstrings.
INPUTS = {"base": "the model that all were tuned from", "base?": "the model that all were tuned from; none by default",
          "start": "the model that was tuned; the base in the first round", "tuned": "the model after SFT",
          "models": "a list of trees", "other": "the other model", "delta": "tuned minus base",
          "fishers": "a list of trees, one for each model: the diagonal of its Fisher matrix"}


@dataclasses.dataclass(frozen=True)
class Plan:
  """How to merge a tensor.

  Attributes:
    kernel: (float32 tensors, numbers, shared) -> merged, without its static options; see `kernels`.
    static: options of the kernel that decide what is compiled.
    scalars: tensor name -> the numbers that its merge needs.
    draws: whether the kernel draws a mask, so that rows must be known to it.
    whole: what a kernel must see at once, `row` or `tensor`; None where entries stand alone.
  """

  kernel: Callable[..., jax.Array]
  static: Mapping[str, Any]
  scalars: Callable[[str], Scalars]
  draws: bool = False
  whole: str | None = None


@dataclasses.dataclass(frozen=True)
class Method:
  """One merging method, as its file describes it.

  Attributes:
    name: what it is called everywhere.
    doc: what it does, its equation and its source; the first line is a summary.
    reference: where it is published, an address; empty for what has no one source.
    inputs: its models in order, of INPUTS: `base`, `base?` (may be left out), `start`, `tuned`, `other`, `models`, ...
    options: what it takes beside them.
    kernel: the arithmetic.
    prepare: what must be known of whole tensors first; None where each option is a number of the kernel.
    draws: whether it draws random masks, and so needs a key.
    whole: see `Plan`.
    least: how many `models` it takes at least.
    most: and at most; None for any number.
    measures: whether `prepare` looks at tensors.
    gradients: how jax.grad goes through it to the models: `exact`, or `masks`: what is dropped or kept counts as given.
    layers: whether it means something by layer numbers beyond settings that vary over them.
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
  least: int = 1
  most: int | None = None
  measures: bool = False
  gradients: str = "exact"
  layers: bool = False

  @property
  def summary(self) -> str:
    """The first line of `doc`, without its full stop."""
    return self.doc.strip().partition("\n")[0].rstrip(".")

  @property
  def base(self) -> str:
    """Whether a base is `required`, `optional`, or there is `none`."""
    return "required" if "base" in self.inputs else "optional" if "base?" in self.inputs else "none"

  @property
  def looks(self) -> bool:
    """Whether it must know something of whole tensors, so that a part of one will not do."""
    return self.gradients == "masks" or self.whole is not None or self.measures

  @property
  def by_option(self) -> dict[str, Option]:
    """Its options by name."""
    return {option.name: option for option in self.options}

  def __call__(self, source: Source, **options: Any) -> Plan:
    """The plan of a merge of these models; raises ValueError for options that do not fit."""
    settings = Settings(self.options, options, source, self._num_models(source))
    static = {o.name: settings[o.name] for o in self.options if o.kind in ("flag", "choice", "integer")}
    numbers = [o.name for o in self.options if o.kind == "number"]
    scalars: Callable[[str], Scalars] = lambda name: {option: settings.of(option, name) for option in numbers}
    if self.prepare is not None:
      scalars, static = self.prepare(source, settings)
    whole = self.whole(settings) if callable(self.whole) else self.whole
    # A kernel without masks to draw reads blocks of any form.
    return Plan(self.kernel, static, scalars, self.draws and static.get("draw", True), whole)

  def _num_models(self, source: Source) -> int:
    """How many models there are settings for."""
    count = source.num_models - source.has_base
    return count // 2 if "fishers" in self.inputs else count


METHODS: dict[str, Method] = {}


def method(*inputs: str, options: Sequence[Option] = (), reference: str = "", **attributes: Any,
           ) -> Callable[[Callable[..., jax.Array]], Callable[..., PyTree]]:
  """Registers a kernel as the method of its name, and makes it the function on trees.

  Args:
    inputs: see `Method`.
    options: see `Method`.
    reference: see `Method`.
    attributes: others of `Method`.
  """

  def register(kernel: Callable[..., jax.Array]) -> Callable[..., PyTree]:
    if kernel.__name__ in METHODS and METHODS[kernel.__name__].kernel.__module__ != kernel.__module__:
      raise ValueError(f"{kernel.__name__}: two files register a method of this name")
    made = METHODS[kernel.__name__] = Method(kernel.__name__, inspect.cleandoc(kernel.__doc__ or ""), reference, inputs,
                                             tuple(options), kernel, **attributes)
    return _function(made)

  return register


def on_disk() -> dict[str, Method]:
  """The methods that merge checkpoints, by name."""
  return {name: METHODS[name] for name in sorted(METHODS) if "delta" not in METHODS[name].inputs}


def option_help() -> dict[str, str]:
  """Every option of a method on disk by its name, and what it is to which methods: the command's flags."""
  users: dict[str, dict[str, list[str]]] = {}
  for made in on_disk().values():
    for option in made.options:
      default = "" if option.suggested is REQUIRED else f" [default: {option.suggested}]"
      text = f"{option.help}; {option.range}{default}" if option.range else option.help + default
      users.setdefault(option.name, {}).setdefault(text, []).append(made.name)
  return {name: " ".join(f"{', '.join(names)}: {text}." for text, names in texts.items())
          for name, texts in users.items()}


def load() -> dict[str, Callable[..., PyTree]]:
  """Imports every file of `methods`, each of which registers what it holds; the functions on trees by name."""
  package = importlib.import_module("imm_jax.merging.methods")
  modules = [importlib.import_module(f"{package.__name__}.{module.name}")
             for module in pkgutil.iter_modules(package.__path__)]
  return {name: getattr(module, name) for module in modules for name, made in METHODS.items()
          if made.kernel.__module__ == module.__name__}


def _function(made: Method) -> Callable[..., PyTree]:
  """The function on trees."""
  parameter = inspect.Parameter
  parameters = [parameter(name, parameter.POSITIONAL_OR_KEYWORD, annotation="Sequence[PyTree]" if name in (
      "models", "fishers") else "PyTree") for name in made.inputs if name != "base?"]
  named = [(option.name, option.default, option.annotation) for option in made.options]
  named += [("base", None, "PyTree | None")] if "base?" in made.inputs else []
  named += [("key", REQUIRED, jax.Array)] if made.draws else []
  named += [("names", None, "PyTree | None"), ("layer_axis", 0, int), ("donate", False, bool)]
  parameters += [parameter(name, parameter.KEYWORD_ONLY, default=default, annotation=annotation)
                 for name, default, annotation in named]
  signature = inspect.Signature(parameters, return_annotation="PyTree")

  @functools.wraps(made.kernel)
  def merge(*args: Any, **kwargs: Any) -> PyTree:
    from imm_jax.merging import in_memory  # late: it needs this module

    if unknown := [name for name in kwargs if name not in signature.parameters]:
      raise TypeError(f"{made.name}() takes no {unknown[0]!r}; {nearest(unknown[0], [*signature.parameters])}")
    try:
      bound = signature.bind(*args, **kwargs)
    except TypeError as e:
      raise TypeError(f"{made.name}() {e}") from None
    bound.apply_defaults()
    given = dict(bound.arguments)
    trees = {name.rstrip("?"): given.pop(name.rstrip("?")) for name in made.inputs}
    rest = {name: given.pop(name) for name in ("names", "layer_axis", "donate")}
    return in_memory.merge(made, trees, given, key=given.pop("key", None), **rest)

  merge.__signature__ = signature
  merge.__doc__ = _docstring(made)
  merge.__annotations__ = {}
  del merge.__wrapped__  # its signature and source are the kernel's
  return merge


def _docstring(made: Method) -> str:
  """The method's own text, with its arguments before the example."""
  lines = []
  for name in made.inputs:
    many = f", {made.least} or more" if name == "models" and made.most is None else (
        f", {made.least}" if name == "models" and made.most == made.least else "")
    lines.append(f"  {name.rstrip('?')}: {INPUTS[name]}{many}.")
  for option in made.options:
    each = "; one for all models, or a list with one for each" if option.per_model else ""
    lines.append(f"  {option.name}: {option.help.rstrip('.')}{each}; {option.range}.".replace("; .", "."))
  lines += ["  key: a threefry key, `jax.random.key(seed)`."] if made.draws else []
  lines += ["  names: tensor names, see `imm_jax.merging`.", "  layer_axis: where the layers of stacked leaves lie.",
            "  donate: give the first tree's memory to the result."]
  text, *example = made.doc.partition("\n\n>>>")
  reference = f"\n\nSource: {made.reference}" if made.reference else ""
  return (f"{text}{reference}\n\nArgs:\n" + "\n".join(lines) + "\n\nReturns:\n  The merged tree, in the first tree's "
          "dtypes.\n\nRaises:\n  ValueError: see `imm_jax.merging`." + "".join(example) + "\n")
