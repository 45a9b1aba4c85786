"""Rotary position embeddings: reads their settings from a config.json and computes the frequencies.

Positions amplify errors in the last bit of a frequency, so every step is rounded as in torch, with which checkpoints
are trained: float32 throughout, a correctly rounded power, and division of a number by an array as multiplication by
the reciprocal.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from imm_jax.errors import UserError
from imm_jax.model.json_numbers import parse_positive


class LinearScaling(NamedTuple):
  """Interpolates positions: divides frequencies by `factor` (`rope_type` linear, Chen et al. 2023,
  arXiv:2306.15595)."""

  factor: float

  def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
    """Gives the scaled frequencies, float32 [h / 2]."""
    del theta
    return frequencies / np.float32(self.factor)

  def find_problem(self) -> str:
    """Describes what is wrong with the values; returns "" if nothing is."""
    return ""


class Llama3Scaling(NamedTuple):
  """Scales as Llama 3.1 does (`rope_type` llama3): divides low frequencies by `factor` and keeps high ones.

  Low frequencies have wavelengths above original / low_freq_factor positions, high ones below
  original / high_freq_factor; those between are interpolated.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: float

  def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
    """Gives the scaled frequencies, float32 [h / 2]."""
    del theta
    one, original_context, low, high, factor = map(np.float32, (
        1, self.original_max_position_embeddings, self.low_freq_factor, self.high_freq_factor, self.factor))
    wavelengths = one / frequencies * np.float32(2 * math.pi)
    blend = (one / wavelengths * original_context - low) / (high - low)
    blended = (one - blend) * frequencies / factor + blend * frequencies
    # The bounds are computed in float64, as in Python.
    slow = wavelengths > np.float32(self.original_max_position_embeddings / self.low_freq_factor)
    fast = wavelengths < np.float32(self.original_max_position_embeddings / self.high_freq_factor)
    return np.where(slow, frequencies / factor, np.where(fast, frequencies, blended))

  def find_problem(self) -> str:
    """Describes what is wrong with the values; returns "" if nothing is."""
    if self.low_freq_factor < self.high_freq_factor:
      return ""
    return (f"low_freq_factor={self.low_freq_factor:g} must be less than "
            f"high_freq_factor={self.high_freq_factor:g}")


class YarnScaling(NamedTuple):
  """Scales as YaRN does (`rope_type` yarn, Peng et al. 2023, arXiv:2309.00071).

  Frequencies with fewer than `beta_slow` turns in the original context are divided by `factor`, those with more than
  `beta_fast` are kept, with a linear ramp over the dimensions between; cos and sin are scaled by `attention_factor`.
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

    def dimension_of(turns: float) -> float:
      """Returns the dimension whose frequency makes this many turns in the original context."""
      return dim * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 * (low == high)
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = np.float32(1) - np.clip(ramp, 0, 1, dtype=np.float32)
    divided = np.float32(1) / (np.float32(self.factor) * _inverse_frequencies(dim, theta))
    return divided * (np.float32(1) - keep) + frequencies * keep

  def find_problem(self) -> str:
    """Describes what is wrong with the values; returns "" if nothing is."""
    if self.beta_slow < self.beta_fast:
      return ""
    return f"beta_slow={self.beta_slow:g} must be less than beta_fast={self.beta_fast:g}"


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


class Rope(NamedTuple):
  """Holds the rotary settings: base theta, scaling of frequencies, and keys without effect, as `section.key`."""

  theta: float
  scaling: RopeScaling | None
  ignored_keys: tuple[str, ...]


# rope_type -> the keys that it reads, in addition to rope_theta.
_KEYS = {
    "default": (),
    "linear": LinearScaling._fields,
    "llama3": Llama3Scaling._fields,
    "yarn": (*YarnScaling._fields, "mscale", "mscale_all_dim")}
_ORIGINAL = "original_max_position_embeddings"


def frequencies(theta: float, scaling: RopeScaling | None, head_dim: int) -> np.ndarray:
  """Computes the frequency in radians per position of every pair of a head's entries: theta^(-2i / head_dim), scaled.

  Args:
    theta: the base.
    scaling: scaling of the frequencies; None for none.
    head_dim: h.

  Returns:
    float32 [h / 2].

  >>> frequencies(1e4, None, 4)
  array([1.  , 0.01], dtype=float32)
  >>> frequencies(1e4, LinearScaling(2.0), 4)
  array([0.5  , 0.005], dtype=float32)
  """
  unscaled = np.float32(1) / _inverse_frequencies(head_dim, theta)
  return unscaled if scaling is None else scaling.scale(unscaled, theta)


def magnitude(scaling: RopeScaling | None) -> float:
  """Returns the factor of cos and sin.

  >>> magnitude(None)
  1.0
  """
  return scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0


def _inverse_frequencies(dim: int, theta: float) -> np.ndarray:
  exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
  return (np.float64(np.float32(theta))**exponents.astype(np.float64)).astype(np.float32)


def read_config(config: Mapping[str, Any], source: str) -> Rope:
  """Reads the rotary settings of a config.json.

  transformers 5 writes rope_parameters, older releases rope_theta and rope_scaling; a file may hold both.

  Raises:
    UserError: if they disagree, or a value is unsupported or out of range; the message begins with `source`.
  """
  sections = {}
  for where in ("rope_parameters", "rope_scaling"):
    section = config.get(where)
    if section in (None, False, {}, []):  # counts as absent, as in transformers
      continue
    if not isinstance(section, dict):
      raise UserError(f"{source}: {where}={section!r}; expected an object")
    sections[where] = _read_section(config, where, section, source)
  if len(sections) == 2 and sections["rope_parameters"][:2] != sections["rope_scaling"][:2]:
    raise UserError(f"{source}: rope_parameters={config['rope_parameters']!r} and rope_scaling="
                    f"{config['rope_scaling']!r} disagree; remove the one that is not meant")
  return next(iter(sections.values()), None) or _read_section(config, "rope_parameters", {}, source)


def _read_section(config: Mapping[str, Any], where: str, section: dict[str, Any], source: str) -> Rope:
  rope_type = section.get("rope_type") or section.get("type") or "default"
  if section.get("type") not in (None, rope_type):
    raise UserError(f"{source}: {where}.rope_type={rope_type!r} and {where}.type={section['type']!r} disagree")
  if not isinstance(rope_type, str) or rope_type not in _KEYS:
    raise UserError(f"{source}: {where}.rope_type={rope_type!r} changes the arithmetic and is not supported; "
                    f"expected one of {', '.join(_KEYS)}")
  values = {key: value for key, value in section.items() if key not in ("type", "rope_type")}
  for key in ("rope_theta", _ORIGINAL):
    top_level = config.get(key)
    if top_level is not None and key in values and values[key] != top_level:
      raise UserError(f"{source}: {key}={top_level!r} and {where}.{key}={values[key]!r} disagree")
    if top_level is not None:
      values[key] = top_level
  if values.get("partial_rotary_factor") not in (None, 1):
    raise UserError(f"{source}: {where}.partial_rotary_factor={values['partial_rotary_factor']!r} changes the "
                    "arithmetic and is not supported")
  ignored_keys = []
  for key, value in values.items():
    if key in ("rope_theta", _ORIGINAL, "partial_rotary_factor", *_KEYS[rope_type]) or not value:
      continue
    if isinstance(value, dict):
      raise UserError(f"{source}: {where}.{key}={value!r:.200}: rotary positions by kind of layer are not supported")
    ignored_keys.append(f"{where}.{key}")
  number = lambda key, default=None: parse_positive(source, f"{where}.{key}",
                                                    default if values.get(key) is None else values[key])
  theta = values.get("rope_theta")
  theta = parse_positive(source, f"{where}.rope_theta" if "rope_theta" in section else "rope_theta",
                         10_000.0 if theta is None else theta)
  if not 1 < theta < 1e30:
    raise UserError(f"{source}: rope_theta={theta:g}; expected a number above 1 that float32 holds")

  def original_context() -> float:
    # transformers falls back to max_position_embeddings too.
    if values.get(_ORIGINAL) is None and config.get("max_position_embeddings") is None:
      raise UserError(f"{source}: {where}: rope_type={rope_type!r} needs {_ORIGINAL}, or max_position_embeddings")
    return number(_ORIGINAL, config.get("max_position_embeddings"))

  if rope_type == "default":
    scaling = None
  elif rope_type == "linear":
    scaling = LinearScaling(number("factor"))
  elif rope_type == "llama3":
    scaling = Llama3Scaling(number("factor"), number("low_freq_factor"), number("high_freq_factor"), original_context())
  else:
    scaling = _read_yarn(values, number, original_context, config.get("max_position_embeddings"), f"{source}: {where}")
  if scaling and (wrong := scaling.find_problem()):
    raise UserError(f"{source}: {where}.{wrong}")
  return Rope(theta, scaling, tuple(ignored_keys))


def _read_yarn(values: Mapping[str, Any], number: Any, original_context: Any, context: object, where: str,
               ) -> YarnScaling:
  truncate = values.get("truncate", True)
  if truncate not in (None, True, False):
    raise UserError(f"{where}.truncate={truncate!r}; expected true or false")
  # As in transformers, factor=null is derived from the context lengths, and a missing factor is an error.
  factor = number("factor", parse_positive(where, "max_position_embeddings", context) / original_context()
                  if "factor" in values and values["factor"] is None and context is not None else None)
  if values.get("attention_factor") is not None:
    attention_factor = number("attention_factor")
  elif values.get("mscale") and values.get("mscale_all_dim"):
    attention_factor = _mscale(factor, number("mscale")) / _mscale(factor, number("mscale_all_dim"))
  else:
    attention_factor = _mscale(factor, 1.0)
  fast, slow = (number(key) if values.get(key) else default
                for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)))
  return YarnScaling(factor, original_context(), fast, slow, attention_factor, bool(truncate))


def _mscale(factor: float, weight: float) -> float:
  """Computes 0.1 weight ln(factor) + 1 (Peng et al., eq. 22)."""
  return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
