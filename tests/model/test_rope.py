"""Rotary frequencies against transformers', bit by bit."""

from typing import Any

import numpy as np
import pytest
import transformers

from imm_jax.model import rope
from imm_jax.model.config import ModelConfig

pytest.importorskip("torch")

LLAMA = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
         "max_position_embeddings": 8192}
# As published (Llama 3.1 and 3.2, DeepSeek-Coder, Qwen2.5's card for long contexts, DeepSeek-R1-0528-Qwen3, gpt-oss),
# and with every option and numbers that are no powers of two.
SCALINGS = {
    "plain": {},
    "llama3.1": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": 8192},
    "llama3.2": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": 8192},
    "llama3-odd": {"rope_type": "llama3", "factor": 3.7, "low_freq_factor": 1.3, "high_freq_factor": 4.1,
                   "original_max_position_embeddings": 1000},
    "linear": {"type": "linear", "factor": 4.0},
    "linear-odd": {"rope_type": "linear", "factor": 3.7},
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-r1": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
                "attn_factor": 0.8782488562869419},
    "yarn-untruncated": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                         "original_max_position_embeddings": 4096},
    "yarn-mscale": {"rope_type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 20,
                    "beta_slow": 2, "original_max_position_embeddings": 1000},
    "yarn-given": {"rope_type": "yarn", "factor": 2.5, "attention_factor": 1.3,
                   "original_max_position_embeddings": 3000},
    "yarn-of-context": {"rope_type": "yarn", "factor": 2.0},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_frequencies_have_the_bits_of_transformers(scaling: dict[str, Any]) -> None:
  """But for one entry by one unit in the last place: torch's power is not always correctly rounded."""
  from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

  for theta in (1e4, 1e5, 5e5, 1e6):
    for head_dim in (64, 80, 128):
      sizes = {**LLAMA, "head_dim": head_dim, "rope_theta": theta, "rope_scaling": scaling or None}
      wanted = LlamaRotaryEmbedding(transformers.LlamaConfig(**{**sizes, "rope_scaling": dict(scaling) or None}))
      config = ModelConfig.from_hf({**sizes, "model_type": "llama"})
      got = rope.frequencies(config.rope_theta, config.rope_scaling, head_dim)
      assert got.dtype == np.float32
      units = np.abs(got.view(np.int32) - wanted.inv_freq.numpy().view(np.int32))
      # YaRN adds two multiples of it.
      assert units.max() <= 1 + isinstance(config.rope_scaling, rope.YarnScaling), (theta, head_dim, units)
      assert np.count_nonzero(units) <= 1, (theta, head_dim, units)
      assert rope.magnitude(config.rope_scaling) == pytest.approx(wanted.attention_scaling, rel=1e-12)


def test_unread_rope_key_is_passed_over() -> None:
  """DeepSeek-R1-0528-Qwen3 has one."""
  raw = {**LLAMA, "model_type": "llama", "rope_theta": 1e6, "rope_scaling": SCALINGS["yarn-r1"]}
  assert rope.read_config(raw, "config.json").ignored_keys == ("rope_scaling.attn_factor",)
  raw["rope_scaling"] = {"type": "default", "mrope_section": [2, 3, 3]}
  assert rope.read_config(raw, "config.json").ignored_keys == ("rope_scaling.mrope_section",)
