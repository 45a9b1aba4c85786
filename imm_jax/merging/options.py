"""Options of merging methods. Validation, flags, help texts and recipe keys are all derived from them."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from imm_jax.merging import masks
from imm_jax.merging.statistics import Source
from imm_jax.merging.trees import Setting, get_num_layers, resolve

# The default of an option that must be given.
REQUIRED = inspect.Parameter.empty
# Arithmetic is float32, in which a larger number is infinite.
_LARGEST = float(np.finfo(np.float32).max)
# One setting for all models, or one for each model.
PerModel = Setting | Sequence[Setting]
# Numbers that a method interprets.
Vector = ArrayLike | Sequence[float]


@dataclasses.dataclass(frozen=True)
class Option:
  """Describes one option of a method.

  Attributes:
    name: name of the argument and of the flag.
    help: description in one line.
    default: default value, or REQUIRED.
    kind: `number` may vary by tensor (see `trees.resolve`); `constant` (a number), `integer`, `flag` and `choice` hold
      for the whole merge; `vector` is a list of numbers that the method interprets.
    per_model: whether it takes one setting for all models, or a sequence with one for each.
    low: smallest number allowed.
    high: largest number allowed.
    excludes_high: whether `high` itself is excluded.
    choices: values allowed for a `choice`.
    key: key in recipes; `name` by default.
    in_commands: default on the command line; `default` by default.
  """

  name: str
  help: str
  default: Any = REQUIRED
  kind: Literal["number", "constant", "integer", "flag", "choice", "vector"] = "number"
  per_model: bool = False
  low: float | None = None
  high: float | None = None
  excludes_high: bool = False
  choices: tuple[str, ...] = ()
  key: str = ""
  in_commands: Any = REQUIRED

  def __post_init__(self) -> None:
    object.__setattr__(self, "key", self.key or self.name)

  @property
  def suggested(self) -> Any:
    """The default on the command line: `in_commands`, or else `default`."""
    return self.default if self.in_commands is REQUIRED else self.in_commands

  @property
  def required(self) -> bool:
    """Whether it has no default."""
    return self.default is REQUIRED

  @property
  def range(self) -> str:
    """A description of the values it allows.

    >>> Option("drop_rate", "p", low=0, high=1, excludes_high=True).range
    '0 <= drop_rate < 1'
    """
    if self.kind == "flag":
      return "True or False"
    if self.kind == "choice":
      return " or ".join(map(repr, self.choices))
    if self.low is None and self.high is None:
      return {"number": "a finite number (of float32)", "constant": "a finite number (of float32)",
              "integer": "an integer"}.get(self.kind, "")
    return (("an integer, " if self.kind == "integer" else "")
            + (f"{self.low:g} <= " if self.low is not None else "") + self.name
            + (f" {'<' if self.excludes_high else '<='} {self.high:g}" if self.high is not None else ""))

  @property
  def annotation(self) -> type | str:
    """The annotation of the function's argument."""
    kinds: dict[str, type | str] = {"flag": bool, "integer": int, "constant": float, "vector": "Vector",
                                    "choice": f"Literal[{', '.join(map(repr, self.choices))}]"}
    return kinds.get(self.kind, "PerModel" if self.per_model else "Setting")

  def check(self, value: Any, where: str = "") -> None:
    """Raises ValueError if a value is out of range; traced values pass."""
    if isinstance(value, jax.core.Tracer):
      return
    if self.kind == "flag":
      valid = isinstance(value, bool | np.bool_)
    elif self.kind == "choice":
      valid = value in self.choices
    elif self.kind == "vector":
      valid = True
    else:
      kinds = int | np.integer if self.kind == "integer" else int | float | np.number
      valid = isinstance(value, kinds) and not isinstance(value, bool) and abs(value) <= _LARGEST and (
          (self.low is None or value >= self.low)
          and (self.high is None or (value < self.high if self.excludes_high else value <= self.high)))
    if not valid:
      kind = "a number, " if self.kind in ("number", "constant") and isinstance(value, str) and "number" not in (
          self.range) else ""
      raise ValueError(f"{self.name}={value!r}{where}: expected {kind}{self.range}")


class _ByTensor(dict[str, Any]):
  """Holds an option's numbers by the tensor's name."""


class Settings:
  """Holds a method's validated options, with defaults, resolved for every tensor of a source."""

  def __init__(self, options: Sequence[Option], given: Mapping[str, Any], source: Source, num_models: int):
    """Resolves all options for all tensors.

    Args:
      options: the method's options.
      given: option name -> value.
      source: source of the tensors' names.
      num_models: number of models that `per_model` options apply to.

    Raises:
      ValueError: if an option is missing, unknown or invalid; names the option and the tensor.
    """
    known = {option.name: option for option in options}
    if unknown := sorted(given.keys() - known.keys()):
      raise ValueError(f"{', '.join(unknown)}: not taken, but {', '.join(known) or 'no option'}")
    self._values: dict[str, Any] = {}
    for option in options:
      value = given.get(option.name, option.default)
      if value is REQUIRED:
        raise ValueError(f"{option.name} is missing")
      if option.kind != "number":
        option.check(value)
        self._values[option.name] = value
        continue
      per_model = _per_model_settings(value, num_models, option.name) if option.per_model else [value]
      resolved = _ByTensor()
      for name in source.names:
        numbers = [resolve(setting, name, get_num_layers(name, source.layers), option.name, source.first_layer)
                   for setting in per_model]
        for number in numbers:
          option.check(number, f" at {name!r}")
        resolved[name] = numbers if option.per_model else numbers[0]
      self._values[option.name] = resolved

  def __getitem__(self, option: str) -> Any:
    """Returns the value of an option that holds for the whole merge."""
    return self._values[option]

  def value(self, option: str, tensor: str) -> Any:
    """Returns an option's number for a tensor; an array [n] of one for each model if it is `per_model`."""
    value = self._values[option]
    if isinstance(value, _ByTensor):
      value = value[tensor]
    return stack(value) if isinstance(value, list) else value

  def concrete_values(self, option: str, tensor: str) -> list[float]:
    """Returns the numbers of a `per_model` option for a tensor that decide a mask and so must be concrete.

    Raises:
      ValueError: if jax traces a value.
    """
    return [masks.require_concrete(value, option, tensor) for value in self._values[option][tensor]]


def stack(values: Sequence[Any]) -> Any:
  """Stacks numbers into a float32 array [n], of jax if any of them is."""
  has_jax = any(isinstance(value, jax.Array) for value in values)
  return jnp.stack([jnp.asarray(v, jnp.float32) for v in values]) if has_jax else np.array(values, np.float32)


def _per_model_settings(settings: Any, count: int, option_name: str) -> list[Any]:
  """Returns one setting for each model."""
  is_list = isinstance(settings, Sequence) or (isinstance(settings, np.ndarray | jax.Array) and settings.ndim > 0)
  if not is_list or isinstance(settings, str):
    return [settings] * count
  if len(settings) != count:
    raise ValueError(f"{option_name}: {len(settings)} of them for {count} models; expected one for each, or one number")
  return list(settings)
