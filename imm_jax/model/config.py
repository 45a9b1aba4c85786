"""The decoder's configuration, read from a checkpoint's config.json."""

import dataclasses
from pathlib import Path
from typing import Any

from imm_jax import files
from imm_jax.errors import UserError, join_items, print_once
from imm_jax.model import checkpoint_folder, hf_keys, rope
from imm_jax.model.families import Family
from imm_jax.model.json_numbers import parse_positive
from imm_jax.model.rope import RopeScaling

# Upper limits far above any model, to detect damaged files.
_MAX_SIZE, _MAX_LAYERS = 2**31, 10_000
# The matrices of every layer -> the block of the layer that holds each.
PROJECTIONS = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
               "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}
# Activation names of transformers -> names in `decoder.ACTIVATIONS`.
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
                "gelu_new": "gelu_tanh", "relu": "relu"}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Holds the configuration of a decoder: all that its arithmetic depends on."""

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
  o_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  rope_scaling: RopeScaling | None = None
  activation: str = "silu"  # a name of `decoder.ACTIVATIONS`
  # Scale of the attention scores; None for head_dim^-0.5.
  attention_scale: float | None = None
  # Multipliers of embeddings and of residual branches, and the divisor of the logits.
  embedding_multiplier: float = 1.0
  residual_multiplier: float = 1.0
  logits_divisor: float = 1.0
  # Context length in training, if config.json has it; it does not affect the arithmetic.
  max_positions: int | None = None

  @classmethod
  def from_hf(cls, config: dict[str, Any], *, source: str = "config.json") -> "ModelConfig":
    """Reads a checkpoint's config.json.

    Raises:
      UserError: for an unknown architecture, a missing key, or an unsupported option that would change the arithmetic.
    """
    return _parse(config, source)[0]


def read_config(folder: str | Path) -> ModelConfig:
  """Reads config.json of a checkpoint folder; prints a note once on keys that have no effect.

  Raises:
    UserError: if it is missing or unsupported.
  """
  checkpoint_folder.check_model_folder(Path(folder))
  path = Path(folder) / "config.json"
  if not path.exists():
    unread = checkpoint_folder.unread_weights(file.name for file in path.parent.iterdir())
    raise UserError(f"{path}: missing; " + (f"found only {unread}" if unread else
                                            "expected a checkpoint folder of transformers"))
  config, ignored_keys = _parse(files.read_json(path), str(path))
  settings = [key for key in ignored_keys if not key.startswith("_")]  # the others are transformers' own records
  if settings:
    print_once(f"note: {path}: ignored, because transformers does not read them for this model: "
               f"{join_items(settings)}")
  return config


def _parse(config: dict[str, Any], source: str) -> tuple[ModelConfig, tuple[str, ...]]:
  """Parses a config.json; returns the model's config and the keys that are ignored."""
  family, ignored_keys = hf_keys.check_keys(config, source)
  positions, fields = rope.read_config(config, source), _Fields(config, family, source)
  heads, layers, width = map(fields.size, ("num_attention_heads", "num_hidden_layers", "hidden_size"))
  if layers > _MAX_LAYERS:
    raise UserError(f"{source}: num_hidden_layers={layers}; expected at most {_MAX_LAYERS}")
  kv_heads, head_dim = _parse_heads(fields, heads, width)
  activation = fields.read("hidden_act")
  if not isinstance(activation, str) or activation not in _ACTIVATIONS:
    raise UserError(f"{source}: hidden_act={activation!r} is not supported; "
                    f"expected one of {', '.join(_ACTIVATIONS)}")
  attention_bias = fields.flag("attention_bias")
  model = ModelConfig(
      vocab_size=fields.size("vocab_size"),
      hidden_size=width,
      intermediate_size=fields.size("intermediate_size"),
      num_layers=layers,
      num_heads=heads,
      num_kv_heads=kv_heads,
      head_dim=head_dim,
      rope_theta=positions.theta,
      rms_norm_eps=fields.number("rms_norm_eps"),
      tie_embeddings=fields.flag("tie_word_embeddings"),
      qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
      o_bias=attention_bias,
      mlp_bias=fields.flag("mlp_bias"),
      qk_norm=family.qk_norm,
      rope_scaling=positions.scaling,
      activation=_ACTIVATIONS[activation],
      attention_scale=fields.number("attention_multiplier") if "attention_multiplier" in family.keys else None,
      embedding_multiplier=fields.number("embedding_multiplier", 1.0),
      residual_multiplier=fields.number("residual_multiplier", 1.0),
      logits_divisor=fields.number("logits_scaling", 1.0),
      max_positions=None if config.get("max_position_embeddings") is None else fields.size("max_position_embeddings"))
  return model, (*ignored_keys, *positions.ignored_keys)


class _Fields:
  """Reads the fields of a config.json; raises a UserError that names file and key for a value of the wrong kind."""

  def __init__(self, config: dict[str, Any], family: Family, source: str):
    """Takes the parsed file, the model's family, and the file's name in messages."""
    self.config, self.source = config, source
    # From a key to its value in the file, or else the family's default; see `hf_keys.make_reader`.
    self.read = hf_keys.make_reader(config, family)

  def size(self, key: str) -> int:
    """Returns a size that the file must have."""
    return self.parse_size(key, self.config.get(key))

  def parse_size(self, key: str, value: object) -> int:
    """Returns the value of a key, if it is a size."""
    if type(value) is not int or not 1 <= value < _MAX_SIZE:
      raise UserError(f"{self.source}: {key} is "
                      f"{'missing' if key not in self.config else f'{self.config[key]!r:.100}'}; "
                      f"expected a positive integer below {_MAX_SIZE}")
    return value

  def number(self, key: str, neutral: float | None = None) -> float:
    """Returns a positive number; `neutral` if the file has none."""
    value = self.read(key)
    return parse_positive(self.source, key, neutral if value is None else value)

  def flag(self, key: str) -> bool:
    """Returns a flag, false if the file has none."""
    value = self.read(key)
    if value not in (None, True, False):
      raise UserError(f"{self.source}: {key}={value!r}; expected true or false")
    return bool(value)


def _parse_heads(fields: _Fields, heads: int, width: int) -> tuple[int, int]:
  """Returns the number of key/value heads and the dim of a head."""
  config, source = fields.config, fields.source
  kv_heads, head_dim = fields.read("num_key_value_heads"), config.get("head_dim", fields.read("head_dim"))
  kv_heads = fields.parse_size("num_key_value_heads", heads if kv_heads is None else kv_heads)
  if head_dim is None and heads > width:
    raise UserError(f"{source}: num_attention_heads={heads} is more than hidden_size={width}; correct one of them, or "
                    "give head_dim")
  head_dim = fields.parse_size("head_dim", width // heads if head_dim is None else head_dim)
  if heads % kv_heads or head_dim % 2:
    raise UserError(f"{source}: num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}, "
                    f"and head_dim={head_dim} even")
  return kv_heads, head_dim
