"""Rotary positions: what a config.json says of them, and the frequencies that follow.

Positions multiply an error in the last bit of a frequency, so every step is rounded as in torch, with which checkpoints
are trained: float32 throughout, the power correctly rounded, a number divided by an array as the number times the
reciprocal.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from imm_jax.errors import UserError
from imm_jax.model.numbers import positive


class LinearScaling(NamedTuple):
  """Position interpolation (`rope_type` linear, Chen et al. 2023, arXiv:2306.15595): all frequencies by `factor`."""

  factor: float

  def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
    """Gives the scaled frequencies, float32 [h / 2]."""
    del theta
    return frequencies / np.float32(self.factor)

  def check(self) -> str:
    """Says what is wrong with the values; "" where nothing is."""
    return ""


class Llama3Scaling(NamedTuple):
  """Llama 3.1's stretching (`rope_type` llama3): slow frequencies by `factor`, fast ones not at all.

  Slow ones take more than original / low_freq_factor positions a turn, fast ones less than original / high_freq_factor;
  those between are blends.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: float

  def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
    """Gives the scaled frequencies, float32 [h / 2]."""
    del theta
    one, original, low, high, factor = map(np.float32, (
        1, self.original_max_position_embeddings, self.low_freq_factor, self.high_freq_factor, self.factor))
    wavelengths = one / frequencies * np.float32(2 * math.pi)
    blend = (one / wavelengths * original - low) / (high - low)
    blended = (one - blend) * frequencies / factor + blend * frequencies
    # The bounds are quotients of float64, as Python's are.
    slow = wavelengths > np.float32(self.original_max_position_embeddings / self.low_freq_factor)
    fast = wavelengths < np.float32(self.original_max_position_embeddings / self.high_freq_factor)
    return np.where(slow, frequencies / factor, np.where(fast, frequencies, blended))

  def check(self) -> str:
    """Says what is wrong with the values; "" where nothing is."""
    if self.low_freq_factor < self.high_freq_factor:
      return ""
    return (f"low_freq_factor={self.low_freq_factor:g} must be less than "
            f"high_freq_factor={self.high_freq_factor:g}")


class YarnScaling(NamedTuple):
  """YaRN (`rope_type` yarn, Peng et al. 2023, arXiv:2309.00071).

  Frequencies with fewer than `beta_slow` turns in the original context are divided by `factor`, those with more than
  `beta_fast` kept, with a linear ramp over the dimensions between; cos and sin are multiplied by `attention_factor`.
  """

  factor: float
  original_max_position_embeddings: float
  beta_fast: float
  beta_slow: float
  attention_factor: float
  truncate: bool

  def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
    """Gives the scaled frequencies, float32 [h / 2]."""
    dim = 2 * len(frequencies)

    def dimension(turns: float) -> float:
      """The dimension whose frequency makes this many turns in the original context."""
      return dim * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(self.beta_fast), dimension(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 * (low == high)
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = np.float32(1) - np.clip(ramp, 0, 1, dtype=np.float32)
    divided = np.float32(1) / (np.float32(self.factor) * _powers(dim, theta))
    return divided * (np.float32(1) - kept) + frequencies * kept

  def check(self) -> str:
    """Says what is wrong with the values; "" where nothing is."""
    if self.beta_slow < self.beta_fast:
      return ""
    return f"beta_slow={self.beta_slow:g} must be less than beta_fast={self.beta_fast:g}"


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


class Rope(NamedTuple):
  """What turns the heads: the base theta, the scaling of frequencies, and keys that have no effect, as `where.key`."""

  theta: float
  scaling: RopeScaling | None
  passed_over: tuple[str, ...]


# rope_type -> the keys that it reads, beside rope_theta.
_KEYS = {
    "default": (),
    "linear": LinearScaling._fields,
    "llama3": Llama3Scaling._fields,
    "yarn": (*YarnScaling._fields, "mscale", "mscale_all_dim")}
_ORIGINAL = "original_max_position_embeddings"


def frequencies(theta: float, scaling: RopeScaling | None, head_dim: int) -> np.ndarray:
  """Computes the radians a position of every pair of a head's entries: theta^(-2i / head_dim), scaled.

  Args:
    theta: the base.
    scaling: of the frequencies; None leaves them.
    head_dim: h.

  Returns:
    float32 [h / 2].

  >>> frequencies(1e4, None, 4)
  array([1.  , 0.01], dtype=float32)
  >>> frequencies(1e4, LinearScaling(2.0), 4)
  array([0.5  , 0.005], dtype=float32)
  """
  plain = np.float32(1) / _powers(head_dim, theta)
  return plain if scaling is None else scaling.scale(plain, theta)


def magnitude(scaling: RopeScaling | None) -> float:
  """Gives the factor of cos and sin.

  >>> magnitude(None)
  1.0
  """
  return scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0


def _powers(dim: int, theta: float) -> np.ndarray:
  exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
  return (np.float64(np.float32(theta))**exponents.astype(np.float64)).astype(np.float32)


def read(config: Mapping[str, Any], source: str) -> Rope:
  """Reads what a config.json says of rotary positions.

  transformers 5 writes rope_parameters, older releases rope_theta and rope_scaling; a file may hold both.

  Raises:
    UserError: where they disagree, or a value is not supported or out of range; it begins with `source`.
  """
  found = {}
  for where in ("rope_parameters", "rope_scaling"):
    given = config.get(where)
    if given in (None, False, {}, []):  # nothing, to transformers too
      continue
    if not isinstance(given, dict):
      raise UserError(f"{source}: {where}={given!r}; expected an object")
    found[where] = _read(config, where, given, source)
  if len(found) == 2 and found["rope_parameters"][:2] != found["rope_scaling"][:2]:
    raise UserError(f"{source}: rope_parameters={config['rope_parameters']!r} and rope_scaling="
                    f"{config['rope_scaling']!r} disagree; remove the one that is not meant")
  return next(iter(found.values()), None) or _read(config, "rope_parameters", {}, source)


def _read(config: Mapping[str, Any], where: str, given: dict[str, Any], source: str) -> Rope:
  kind = given.get("rope_type") or given.get("type") or "default"
  if given.get("type") not in (None, kind):
    raise UserError(f"{source}: {where}.rope_type={kind!r} and {where}.type={given['type']!r} disagree")
  if not isinstance(kind, str) or kind not in _KEYS:
    raise UserError(f"{source}: {where}.rope_type={kind!r} changes the arithmetic and is not supported; "
                    f"expected one of {', '.join(_KEYS)}")
  values = {key: value for key, value in given.items() if key not in ("type", "rope_type")}
  for key in ("rope_theta", _ORIGINAL):
    above = config.get(key)
    if above is not None and key in values and values[key] != above:
      raise UserError(f"{source}: {key}={above!r} and {where}.{key}={values[key]!r} disagree")
    if above is not None:
      values[key] = above
  if values.get("partial_rotary_factor") not in (None, 1):
    raise UserError(f"{source}: {where}.partial_rotary_factor={values['partial_rotary_factor']!r} changes the "
                    "arithmetic and is not supported")
  passed_over = []
  for key, value in values.items():
    if key in ("rope_theta", _ORIGINAL, "partial_rotary_factor", *_KEYS[kind]) or not value:
      continue
    if isinstance(value, dict):
      raise UserError(f"{source}: {where}.{key}={value!r:.200}: rotary positions by kind of layer are not supported")
    passed_over.append(f"{where}.{key}")
  number = lambda key, default=None: positive(source, f"{where}.{key}",
                                              default if values.get(key) is None else values[key])
  theta = values.get("rope_theta")
  theta = positive(source, f"{where}.rope_theta" if "rope_theta" in given else "rope_theta",
                   10_000.0 if theta is None else theta)
  if not 1 < theta < 1e30:
    raise UserError(f"{source}: rope_theta={theta:g}; expected a number above 1 that float32 holds")

  def original() -> float:
    # What transformers takes where it is left out.
    if values.get(_ORIGINAL) is None and config.get("max_position_embeddings") is None:
      raise UserError(f"{source}: {where}: rope_type={kind!r} needs {_ORIGINAL}, or max_position_embeddings")
    return number(_ORIGINAL, config.get("max_position_embeddings"))

  if kind == "default":
    scaling = None
  elif kind == "linear":
    scaling = LinearScaling(number("factor"))
  elif kind == "llama3":
    scaling = Llama3Scaling(number("factor"), number("low_freq_factor"), number("high_freq_factor"), original())
  else:
    scaling = _yarn(values, number, original, config.get("max_position_embeddings"), f"{source}: {where}")
  if scaling and (wrong := scaling.check()):
    raise UserError(f"{source}: {where}.{wrong}")
  return Rope(theta, scaling, tuple(passed_over))


def _yarn(values: Mapping[str, Any], number: Any, original: Any, context: object, where: str) -> YarnScaling:
  truncate = values.get("truncate", True)
  if truncate not in (None, True, False):
    raise UserError(f"{where}.truncate={truncate!r}; expected true or false")
  # A factor that is null follows from the contexts, one that is missing is an error in transformers.
  factor = number("factor", positive(where, "max_position_embeddings", context) / original()
                  if "factor" in values and values["factor"] is None and context is not None else None)
  if values.get("attention_factor") is not None:
    attention_factor = number("attention_factor")
  elif values.get("mscale") and values.get("mscale_all_dim"):
    attention_factor = _mscale(factor, number("mscale")) / _mscale(factor, number("mscale_all_dim"))
  else:
    attention_factor = _mscale(factor, 1.0)
  fast, slow = (number(key) if values.get(key) else default
                for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)))
  return YarnScaling(factor, original(), fast, slow, attention_factor, bool(truncate))


def _mscale(factor: float, weight: float) -> float:
  """Peng et al., eq. 22: 0.1 ln(factor) + 1."""
  return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
