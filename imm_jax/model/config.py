"""What the arithmetic of a decoder depends on, read from a checkpoint's config.json."""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imm_jax import files
from imm_jax.errors import UserError
from imm_jax.model import config_keys, folder as checkpoint

# What no model comes near; a damaged file might say it.
_MAX_SIZE, _MAX_LAYERS = 2**31, 10_000


class RopeScaling(NamedTuple):
  """Llama 3.1's stretching of rotary frequencies (`rope_type` llama3): slow ones by `factor`, fast ones not at all."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: float


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """What the arithmetic of a decoder depends on."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float
  rms_norm_eps: float
  tie_embeddings: bool
  qkv_bias: bool
  qk_norm: bool = False
  rope_scaling: RopeScaling | None = None
  # The context that it was trained for, where config.json says it; it changes no arithmetic.
  max_positions: int | None = None

  @classmethod
  def from_hf(cls, config: dict[str, Any], *, source: str = "config.json") -> "ModelConfig":
    """Reads a checkpoint's config.json.

    Raises:
      UserError: for an unknown architecture, a missing key, or an option that changes the arithmetic and is not
        supported, or might; it is never ignored.
    """
    family = config_keys.check(config, source)
    where, rope = config_keys.rope(config, source)

    def size(key: str, absent: int | None = None, null: int | None = None) -> int:
      value = config.get(key, absent)
      value = null if value is None else value
      if type(value) is not int or not 1 <= value < _MAX_SIZE:
        raise UserError(f"{source}: {key} is {'missing' if key not in config else repr(config[key])}; "
                        f"expected a positive integer below {_MAX_SIZE}")
      return value

    def number(key: str, value: object) -> float:
      if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{source}: {key}={value!r}; expected a positive number")
      return float(value)

    scaling = None
    if rope["rope_type"] == "llama3":
      scaling = RopeScaling(*(number(f"{where}.{key}", rope.get(key)) for key in RopeScaling._fields))
      if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise UserError(f"{source}: {where}.low_freq_factor={scaling.low_freq_factor:g} must be less than "
                        f"high_freq_factor={scaling.high_freq_factor:g}")
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
      raise UserError(f"{source}: tie_word_embeddings={tied!r}; expected true or false")
    heads, layers, width = (size(key) for key in ("num_attention_heads", "num_hidden_layers", "hidden_size"))
    if layers > _MAX_LAYERS:
      raise UserError(f"{source}: num_hidden_layers={layers}; expected at most {_MAX_LAYERS}")
    # What is left out has the value that transformers gives it.
    kv_heads = size("num_key_value_heads", absent=heads if family == "llama" else 32, null=heads)
    head_dim = size("head_dim", absent=128 if family == "qwen3" else width // heads, null=width // heads)
    if heads % kv_heads or head_dim % 2:
      raise UserError(f"{source}: num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}, "
                      f"and head_dim={head_dim} even")
    return cls(
        vocab_size=size("vocab_size"),
        hidden_size=width,
        intermediate_size=size("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=number(f"{where}.rope_theta" if where in config else "rope_theta", rope.get("rope_theta")),
        rms_norm_eps=number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=tied,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_scaling=scaling,
        max_positions=None if config.get("max_position_embeddings") is None else size("max_position_embeddings"),
    )


def read_config(folder: str | Path) -> ModelConfig:
  """Reads config.json of a checkpoint folder; raises UserError where it is missing or unsupported."""
  checkpoint.require(Path(folder))
  path = Path(folder) / "config.json"
  return ModelConfig.from_hf(files.read_json(path), source=str(path))


def rope_frequencies(config: ModelConfig) -> np.ndarray:
  """Radians a position of every pair of a head's entries, float32 [head_dim / 2].

  theta^(-2i / head_dim), and for Llama 3.1 divided by `factor` where a turn takes more than original / low_freq_factor
  positions, as it is below original / high_freq_factor, and a blend between the two.

  Positions multiply an error in the last bit, so every step is rounded as in torch, with which checkpoints are trained:
  float32 throughout, the power correctly rounded, a number divided by an array as the number times the reciprocal.

  >>> config = ModelConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_layers=2, num_heads=1,
  ...     num_kv_heads=1, head_dim=4, rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=True, qkv_bias=True)
  >>> rope_frequencies(config)
  array([1.  , 0.01], dtype=float32)
  """
  exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
  powers = np.float64(np.float32(config.rope_theta))**exponents.astype(np.float64)
  frequencies = np.float32(1) / powers.astype(np.float32)
  scaling = config.rope_scaling
  if scaling is None:
    return frequencies
  one, original, low, high, factor = map(np.float32, (
      1, scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor, scaling.factor))
  wavelengths = one / frequencies * np.float32(2 * math.pi)
  blend = (one / wavelengths * original - low) / (high - low)
  blended = (one - blend) * frequencies / factor + blend * frequencies
  # The bounds are quotients of float64, as Python's are.
  slow = wavelengths > np.float32(scaling.original_max_position_embeddings / scaling.low_freq_factor)
  fast = wavelengths < np.float32(scaling.original_max_position_embeddings / scaling.high_freq_factor)
  return np.where(slow, frequencies / factor, np.where(fast, frequencies, blended))
