"""The supported model families, one record each; docs/models.md shows how to add one."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
  """Describes how a family's config.json configures the decoder.

  Attributes:
    architecture: the class in transformers whose weights are read.
    keys: keys that the family's config class declares and the decoder implements, with the class's defaults, in
      addition to `COMMON`. Biases, multipliers and other options in neither are neutral in this family, whatever
      config.json says; sizes, rotary positions and windows are read for all families.
    qkv_bias: whether q, k and v have biases; None if `attention_bias` decides, also for o.
    qk_norm: whether the heads of q and k are normalized.
    windows_by_layer: whether windows apply to the layers from `max_window_layers` on if `use_sliding_window` is true;
      otherwise to all layers if `sliding_window` is given.
  """

  architecture: str
  keys: Mapping[str, Any]
  qkv_bias: bool | None = None
  qk_norm: bool = False
  windows_by_layer: bool = False


# Keys of every family. head_dim defaults to hidden_size / num_attention_heads, and num_key_value_heads=null stands for
# num_attention_heads.
COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_BIASES = {"attention_bias": False, "mlp_bias": False}
_QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
# model_type -> family.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", {"num_key_value_heads": None, "head_dim": None, **_BIASES}),
    "mistral": Family("MistralForCausalLM", {"num_key_value_heads": 8, "head_dim": None, "sliding_window": 4096},
                      qkv_bias=False),
    "qwen2": Family("Qwen2ForCausalLM", {"num_key_value_heads": 32, **_QWEN_WINDOWS}, qkv_bias=True,
                    windows_by_layer=True),
    "qwen3": Family("Qwen3ForCausalLM", {"num_key_value_heads": 32, "head_dim": 128, "attention_bias": False,
                                         **_QWEN_WINDOWS}, qk_norm=True, windows_by_layer=True),
    "granite": Family("GraniteForCausalLM", {
        "num_key_value_heads": None, **_BIASES, "embedding_multiplier": 1.0, "attention_multiplier": 1.0,
        "residual_multiplier": 1.0, "logits_scaling": 1.0}),
}
