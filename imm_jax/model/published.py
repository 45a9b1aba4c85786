"""Configs of published models by hub id, for estimates made before a model is downloaded."""

from imm_jax.model import hf, hub
from imm_jax.model.config import ModelConfig

_QWEN = {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "qkv_bias": True}
_LLAMA = {"rms_norm_eps": 1e-5, "tie_embeddings": False, "qkv_bias": False, "head_dim": 128, "hidden_size": 4096,
          "num_layers": 32, "num_heads": 32}
_QWEN_0_5B = ModelConfig(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14,
                         num_kv_heads=2, head_dim=64, tie_embeddings=True, **_QWEN)
_QWEN_1_5B = ModelConfig(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12,
                         num_kv_heads=2, head_dim=128, tie_embeddings=True, **_QWEN)
_QWEN_7B = ModelConfig(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28,
                       num_kv_heads=4, head_dim=128, tie_embeddings=False, **_QWEN)
_SMOLLM2_135M = ModelConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
                            num_kv_heads=3, head_dim=64, tie_embeddings=True, rope_theta=1e5, rms_norm_eps=1e-5,
                            qkv_bias=False)
MODELS = {
    "HuggingFaceTB/SmolLM2-135M": _SMOLLM2_135M, "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "Qwen/Qwen2.5-0.5B": _QWEN_0_5B, "Qwen/Qwen2.5-0.5B-Instruct": _QWEN_0_5B,
    "Qwen/Qwen2.5-1.5B": _QWEN_1_5B, "Qwen/Qwen2.5-1.5B-Instruct": _QWEN_1_5B, "Qwen/Qwen2.5-Math-1.5B": _QWEN_1_5B,
    "Qwen/Qwen2.5-7B": _QWEN_7B, "Qwen/Qwen2.5-7B-Instruct": _QWEN_7B,
    "meta-llama/Llama-2-7b-hf": ModelConfig(vocab_size=32000, intermediate_size=11008, num_kv_heads=32, rope_theta=1e4,
                                            **_LLAMA),
    "meta-llama/Meta-Llama-3-8B": ModelConfig(vocab_size=128256, intermediate_size=14336, num_kv_heads=8,
                                              rope_theta=5e5, **_LLAMA)}


def find_config(model: str) -> ModelConfig | None:
  """Finds a model's config in its folder, the local hub cache, or the table above; None if unknown.

  For a model with an adapter it is the base's.

  >>> find_config("Qwen/Qwen2.5-7B-Instruct").num_layers
  28
  """
  folder = hub.find_config_folder(model)
  return hf.read_config(folder) if folder else MODELS.get(hub.strip_adapter(model).partition("@")[0])
