"""What the arithmetic of a decoder depends on, read from a checkpoint's config.json."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from imm_jax.errors import UserError, nearest

_FAMILIES = ("qwen2", "qwen3", "llama")
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

  @classmethod
  def from_hf(cls, config: dict[str, Any], *, source: str = "config.json") -> "ModelConfig":
    """Reads a checkpoint's config.json.

    Raises:
      UserError: for an unknown architecture, a missing key, or an option that changes the arithmetic and is not
        supported; it is never ignored.
    """
    family = config.get("model_type")
    if family not in _FAMILIES:
      raise UserError(f"{source}: model_type={family!r} is not supported; {nearest(str(family), list(_FAMILIES))}")
    # transformers 5 writes rope_parameters, older releases rope_theta and rope_scaling; the latter counts where given.
    rope = {"rope_theta": config.get("rope_theta")}
    for key in ("rope_parameters", "rope_scaling"):
      if not isinstance(config.get(key) or {}, dict):
        raise UserError(f"{source}: {key}={config[key]!r}; expected an object")
      rope |= config.get(key) or {}
    where = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    kind = rope.get("rope_type") or rope.get("type") or "default"
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list):
      raise UserError(f"{source}: layer_types={layer_types!r}; expected a list")
    for key, value, supported in (
        ("hidden_act", config.get("hidden_act") or "silu", "silu"),
        (f"{where}.rope_type", kind if kind != "llama3" else "default", "default"),
        ("partial_rotary_factor", rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0, 1.0),
        ("use_sliding_window", bool(config.get("use_sliding_window")), False),
        ("layer_types", next((t for t in layer_types if t != "full_attention"), None), None),
        ("attention_bias", family != "qwen2" and bool(config.get("attention_bias")), False),
        ("mlp_bias", bool(config.get("mlp_bias")), False),
        ("is_causal", config.get("is_causal", True), True),
        ("quantization_config", config.get("quantization_config"), None),
        (where, next((v for v in rope.values() if isinstance(v, dict)), None), None)):
      if value != supported:
        raise UserError(f"{source}: {key}={value!r} changes the arithmetic and is not supported")

    def size(key: str, default: int | None = None) -> int:
      value = config.get(key) or default
      if type(value) is not int or not 1 <= value < _MAX_SIZE:
        raise UserError(f"{source}: {key} is {'missing' if key not in config else repr(config[key])}; "
                        f"expected a positive integer below {_MAX_SIZE}")
      return value

    def number(key: str, value: object) -> float:
      if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{source}: {key}={value!r}; expected a positive number")
      return float(value)

    scaling = None
    if kind == "llama3":
      given = {key: rope.get(key) or (config.get(key) if key == "original_max_position_embeddings" else None)
               for key in RopeScaling._fields}
      scaling = RopeScaling(*(number(f"{where}.{key}", value) for key, value in given.items()))
      if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise UserError(f"{source}: {where}.low_freq_factor={scaling.low_freq_factor:g} must be less than "
                        f"high_freq_factor={scaling.high_freq_factor:g}")
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
      raise UserError(f"{source}: tie_word_embeddings={tied!r}; expected true or false")
    heads = size("num_attention_heads")
    if size("num_hidden_layers") > _MAX_LAYERS:
      raise UserError(f"{source}: num_hidden_layers={config['num_hidden_layers']}; expected at most {_MAX_LAYERS}")
    result = cls(
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", heads),
        # Qwen3 does not derive it from the width.
        head_dim=size("head_dim", 128 if family == "qwen3" else size("hidden_size") // heads),
        rope_theta=number("rope_theta", 10_000.0 if rope["rope_theta"] is None else rope["rope_theta"]),
        rms_norm_eps=number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=tied,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_scaling=scaling,
    )
    if result.num_heads % result.num_kv_heads or result.head_dim % 2:
      raise UserError(f"{source}: num_attention_heads={heads} must be a multiple of num_key_value_heads="
                      f"{result.num_kv_heads}, and head_dim={result.head_dim} even")
    return result


def rope_frequencies(config: ModelConfig) -> np.ndarray:
  """Radians a position of every pair of a head's entries, float32 [head_dim / 2].

  theta^(-2i / head_dim), and for Llama 3.1 divided by `factor` where a turn takes more than original / low_freq_factor
  positions, as it is below original / high_freq_factor, and a blend between the two.
  """
  exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
  frequencies = (1.0 / np.float32(config.rope_theta)**exponents).astype(np.float32)
  scaling = config.rope_scaling
  if scaling is None:
    return frequencies
  turns = scaling.original_max_position_embeddings * frequencies.astype(np.float64) / (2 * np.pi)
  blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
  blend = blend.clip(0, 1)
  return ((1 - blend) * frequencies / scaling.factor + blend * frequencies).astype(np.float32)
