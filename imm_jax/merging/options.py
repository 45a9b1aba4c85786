"""What a merging method takes beside its models, said once: checks, flags, help and recipe keys follow from it."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax.merging import masks
from imm_jax.merging.statistics import Source
from imm_jax.merging.trees import Setting, count_layers, resolve

# An option without a default must be given.
REQUIRED = inspect.Parameter.empty
# One setting for all models, or one for each.
PerModel = Setting | Sequence[Setting]


@dataclasses.dataclass(frozen=True)
class Option:
  """One option of a method.

  Attributes:
    name: as functions and flags have it.
    help: what it is, in a line.
    default: its value where none is given, or REQUIRED.
    kind: `number` may vary by tensor (see `trees.resolve`); `constant` (a number), `integer`, `flag` and `choice` hold
      for the whole merge; `vector` is a list of numbers that the method itself reads.
    per_model: takes one setting for all models, or a sequence with one for each.
    low: the least number.
    high: the greatest number.
    below: numbers are less than `high`.
    choices: of a `choice`.
    key: what recipes call it; the name, unless given.
    in_commands: what commands take where it is not given; the default, unless given.
  """

  name: str
  help: str
  default: Any = REQUIRED
  kind: Literal["number", "constant", "integer", "flag", "choice", "vector"] = "number"
  per_model: bool = False
  low: float | None = None
  high: float | None = None
  below: bool = False
  choices: tuple[str, ...] = ()
  key: str = ""
  in_commands: Any = REQUIRED

  def __post_init__(self) -> None:
    object.__setattr__(self, "key", self.key or self.name)

  @property
  def suggested(self) -> Any:
    """What commands take where it is not given; it follows a default that is replaced."""
    return self.default if self.in_commands is REQUIRED else self.in_commands

  @property
  def required(self) -> bool:
    """Whether functions must be given it."""
    return self.default is REQUIRED

  @property
  def range(self) -> str:
    """Which values it may have.

    >>> Option("drop_rate", "p", low=0, high=1, below=True).range
    '0 <= drop_rate < 1'
    """
    if self.kind == "flag":
      return "True or False"
    if self.kind == "choice":
      return " or ".join(map(repr, self.choices))
    if self.low is None and self.high is None:
      return {"number": "a finite number", "constant": "a finite number", "integer": "an integer"}.get(self.kind, "")
    return (("an integer, " if self.kind == "integer" else "")
            + (f"{self.low:g} <= " if self.low is not None else "") + self.name
            + (f" {'<' if self.below else '<='} {self.high:g}" if self.high is not None else ""))

  @property
  def annotation(self) -> Any:
    """The type of its argument."""
    return {"flag": bool, "integer": int, "constant": float, "choice": str, "vector": Sequence[float]}.get(
        self.kind, "PerModel" if self.per_model else "Setting")

  def check(self, value: Any, where: str = "") -> None:
    """Raises ValueError for one value out of range; traced values pass."""
    if isinstance(value, jax.core.Tracer):
      return
    if self.kind == "flag":
      good = isinstance(value, bool | np.bool_)
    elif self.kind == "choice":
      good = value in self.choices
    elif self.kind == "vector":
      good = True
    else:
      kinds = int | np.integer if self.kind == "integer" else int | float | np.number
      good = isinstance(value, kinds) and not isinstance(value, bool) and np.isfinite(value) and (
          (self.low is None or value >= self.low)
          and (self.high is None or (value < self.high if self.below else value <= self.high)))
    if not good:
      raise ValueError(f"{self.name}={value!r}{where}: expected {self.range}")


class Settings:
  """A method's options for the tensors of a source: checked, with their defaults, by tensor where they vary."""

  def __init__(self, options: Sequence[Option], given: Mapping[str, Any], source: Source, num_models: int):
    """Resolves all options for all tensors.

    Args:
      options: what the method takes.
      given: values by name.
      source: its names and layers count.
      num_models: how many models the options with `per_model` are for.

    Raises:
      ValueError: for an option that is missing, unknown, or of a wrong value; it names option and tensor.
    """
    known = {option.name: option for option in options}
    if unknown := sorted(given.keys() - known.keys()):
      raise ValueError(f"{', '.join(unknown)}: not taken, but {', '.join(known) or 'no option'}")
    self._values: dict[str, Any] = {}
    layers = count_layers(source.names)
    for option in options:
      value = given.get(option.name, option.default)
      if value is REQUIRED:
        raise ValueError(f"{option.name} is missing")
      if option.kind != "number":
        option.check(value)
        self._values[option.name] = value
        continue
      each = _spread(value, num_models, option.name) if option.per_model else [value]
      resolved = {}
      for name in source.names:
        numbers = [resolve(setting, name, layers, option.name, source.first_layer) for setting in each]
        for number in numbers:
          option.check(number, f" at {name!r}")
        resolved[name] = numbers if option.per_model else numbers[0]
      self._values[option.name] = resolved

  def __getitem__(self, option: str) -> Any:
    """The value of an option that holds for the whole merge."""
    return self._values[option]

  def of(self, option: str, tensor: str) -> Any:
    """An option's number for a tensor; [n] with one for each model where it is `per_model`."""
    value = self._values[option][tensor]
    return stack(value) if isinstance(value, list) else value

  def each(self, option: str, tensor: str) -> list[float]:
    """The numbers of a `per_model` option for a tensor, which decide about a mask and so must be known.

    Raises:
      ValueError: for values traced by jax.
    """
    return [masks.known(value, option, tensor) for value in self._values[option][tensor]]


def stack(values: Sequence[Any]) -> Any:
  """float32 [n] of numbers, by jax where any of them is traced."""
  traced = any(isinstance(value, jax.Array) for value in values)
  return jnp.stack([jnp.asarray(v, jnp.float32) for v in values]) if traced else np.array(values, np.float32)


def _spread(settings: Any, count: int, what: str) -> list[Any]:
  """A setting for each model."""
  is_list = isinstance(settings, Sequence) or (isinstance(settings, np.ndarray | jax.Array) and settings.ndim > 0)
  if not is_list or isinstance(settings, str):
    return [settings] * count
  if len(settings) != count:
    raise ValueError(f"{what}: {len(settings)} of them for {count} models; expected one for each, or one number")
  return list(settings)
