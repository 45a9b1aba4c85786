"""Checks what a file declares of a merging method when it registers it: inputs, options, attributes, and its name."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from imm_jax.errors import UserError, suggest
from imm_jax.merging.kernels import find_file
from imm_jax.merging.options import REQUIRED, Option

if TYPE_CHECKING:
  from imm_jax.merging.registry import MergeMethod

# Inputs in the order in which kernels get them, and their descriptions for help and docstrings.
INPUTS = {"base": "the model that all were tuned from", "base?": "the model that all were tuned from; none by default",
          "start": "the model that was tuned; the base in the first round", "tuned": "the model after SFT",
          "models": "a list of trees", "other": "the other model", "delta": "tuned minus base",
          "fishers": "a list of trees, one for each model: the diagonal of its Fisher matrix"}
# Arguments of the functions on trees, and flags of `imm merge`, its own and absl's, that options cannot be called.
RESERVED = {
    *(name.rstrip("?") for name in INPUTS), "names", "layer_axis", "donate", "key",
    "allow_nonfinite", "compilation_cache", "import", "max_shard_size", "method", "out", "out_dtype", "overwrite",
    "recipe", "seed", "sweep_base_weight",
    "alsologtostderr", "flagfile", "help", "helpfull", "helpshort", "helpxml", "log_dir", "logger_levels",
    "logtostderr", "only_check_args", "pdb", "pdb_post_mortem", "profile_file", "run_with_pdb", "run_with_profiling",
    "showprefixforinfo", "stderrthreshold", "undefok", "use_cprofile_for_profiling", "v", "verbosity"}
# Options that a run sets by name.
_KINDS = {"base_weight": "number", "drop_rate": "number", "densities": "number", "normalize": "flag",
          "importance": "vector"}
# Options that a kernel gets as keyword arguments unless `prepare` says otherwise.
STATIC = ("flag", "choice", "integer")


def check_name(kernel: Callable[..., Any], earlier: Callable[..., Any]) -> None:
  """Raises UserError if two files register a method of this name, or one file does so twice.

  The same file may be loaded again, and a cell of a notebook be run again.
  """
  name, file, other = kernel.__name__, find_file(kernel), find_file(earlier)
  if file != other and {kernel.__module__, earlier.__module__} != {"__main__"}:
    raise UserError(f"{name}: {other} and {file} register a method of this name; rename one of them")
  if file == other and Path(file).is_file() and len(re.findall(
      rf"^def {name}\(".encode(), Path(file).read_bytes(), re.M)) > 1:
    raise UserError(f"{file}: registers two methods called {name}; rename one of them")


def check_attributes(kernel: Callable[..., Any], record: Any, options: Any, attributes: Mapping[str, Any]) -> None:
  """Raises UserError for arguments of `@method` from which no record, a dataclass, can be made."""
  where = f"{find_file(kernel)}: {kernel.__name__}"
  own = {"name", "doc", "inputs", "kernel"}
  known = [field.name for field in dataclasses.fields(record) if field.name not in own]
  if unknown := [name for name in attributes if name not in known]:
    raise UserError(f"{where}: @method takes no {unknown[0]!r}; {suggest(unknown[0], known)}")
  if not isinstance(options, Sequence) or not all(isinstance(option, Option) for option in options):
    raise UserError(f"{where}: options: expected a tuple of Option(...); with a single one, (Option(...),)")


def check(method: "MergeMethod") -> None:
  """Raises UserError, which names the file, for the first thing in a method's record that cannot work."""
  for problem in (*_check_inputs(method), *_check_options(method), *_check_kernel(method), *_check_rest(method)):
    raise UserError(f"{find_file(method.kernel)}: {method.name}: {problem}")


def _check_inputs(method: "MergeMethod") -> Iterator[str]:
  for name in method.inputs:
    if name not in INPUTS:
      yield f"input {name!r}: {suggest(str(name), [*INPUTS])}"
  order = [name for name in INPUTS if name in method.inputs]
  if [*method.inputs] != order:
    given = ", ".join(method.inputs) or "(none)"
    yield f"inputs {given}: expected each once, in the order {', '.join(order or INPUTS)}"
  for pair in (("base", "base?"), ("models", "other"), *(("delta", name) for name in INPUTS if name != "delta")):
    if {*pair} <= {*method.inputs}:
      yield f"inputs {' and '.join(pair)}: cannot be combined"
  if "fishers" in method.inputs and "models" not in method.inputs:
    yield "input fishers: is one for each of models, which are no input"
  if "models" not in method.inputs and (method.min_models, method.max_models) != (1, None):
    yield "min_models and max_models: count the input models, which it has not"
  if method.min_models < 1 or (method.max_models or method.min_models) < method.min_models:
    yield f"min_models={method.min_models}, max_models={method.max_models}: expected 1 <= min_models <= max_models"


def _check_options(method: "MergeMethod") -> Iterator[str]:
  kinds = get_args(get_type_hints(Option)["kind"])
  for i, option in enumerate(method.options):
    where, others = f"option {option.name}", method.options[:i]
    if not option.name.isidentifier() or option.name in RESERVED:
      yield f"{where}: the name is taken, by an argument or a flag of imm merge" if option.name in RESERVED else (
          f"{where}: expected a name as of an argument of Python")
    if option.name in [other.name for other in others]:
      yield f"{where}: is declared twice"
    if option.key in [other.key for other in others]:
      yield f"{where}: another option has its key {option.key!r}"
    if option.kind not in kinds:
      yield f"{where}: kind {option.kind!r}: {suggest(str(option.kind), [*kinds])}"
    if (option.kind == "choice") != bool(option.choices):
      yield f"{where}: choices are for options of kind choice, which need some"
    if option.per_model and (option.kind != "number" or "models" not in method.inputs):
      yield f"{where}: per_model is for numbers of a method with the input models"
    if option.kind != (wanted := _KINDS.get(option.name, option.kind)):
      yield f"{where}: a run sets the option of this name, a {wanted}; rename it"
    if option.kind == "vector" and method.prepare is None:
      yield f"{where}: a vector reaches the kernel through prepare= only"
    for default in (option.default, option.in_commands):
      if default is not REQUIRED and (option.kind not in ("number", "vector") or isinstance(default, int | float)):
        try:
          option.check(default)
        except ValueError as e:
          yield f"the default of {e}"


def _check_kernel(method: "MergeMethod") -> Iterator[str]:
  if method.prepare is not None:
    return  # which names the kernel's arguments
  parameters = [*inspect.signature(method.kernel).parameters.values()][3:]  # after tensors, numbers and shared
  named = {p.name: p.default is p.empty for p in parameters if p.kind is not p.VAR_KEYWORD}
  static = {option.name: option.kind for option in method.options if option.kind in STATIC}
  if len(named) == len(parameters) and (missing := [name for name in static if name not in named]):
    yield f"option {missing[0]}: the kernel needs the keyword argument {missing[0]} for this {static[missing[0]]}"
  if unknown := [name for name, is_required in named.items() if is_required and name not in static]:
    yield f"the kernel's argument {unknown[0]} is no option of kind {', '.join(STATIC)}"


def _check_rest(method: "MergeMethod") -> Iterator[str]:
  if not method.doc.strip():
    yield "expected a docstring, whose first line is the summary"
  if method.gradients not in ("exact", "masks"):
    yield f"gradients={method.gradients!r}: expected 'exact' or 'masks'"
  if not callable(method.whole) and method.whole not in (None, "row", "tensor"):
    yield f"whole={method.whole!r}: expected 'row', 'tensor' or None"
  if not method.strength:
    return
  option = method.by_option.get(method.strength_option)
  if option is None or option.kind != "number" or (option.per_model and method.is_base_weight):
    yield (f"strength={method.strength!r}: expected NAME or '1 - NAME' of an option that is a number" + (
        ", the latter not per model" if option and option.per_model else ""))
