"""Fixtures that several test files share."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

try:
  import torch
except ImportError:  # the tests that need it are skipped
  torch = None

_SIZES = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
          "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
          "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}  # torch learns no pad row


def _torch_model(kind: str) -> "transformers.PreTrainedModel":
  """A small model whose every parameter is random and matters; its dimensions are all different."""
  if kind == "llama":
    config = transformers.LlamaConfig(**_SIZES, head_dim=8, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config)
  else:
    config = transformers.Qwen2Config(**_SIZES, tie_word_embeddings=kind == "qwen2-tied")
    model = transformers.Qwen2ForCausalLM(config)
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      noise = torch.randn(p.shape, generator=generator)
      p.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise if p.ndim == 1 else noise * 1.5 / p.shape[1]**0.5)
  return model.eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> "Callable[..., tuple[transformers.PreTrainedModel, Path]]":
  """Makes (torch model, its folder) for `qwen2-tied`, `qwen2-untied` or `llama` (untied, its own head_dim)."""

  def make(kind: str, *, dtype: "torch.dtype | None" = None, old_rope_key: bool = False):
    model = _torch_model(kind).to(dtype or torch.float32)
    folder = tmp_path / kind
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if old_rope_key:
      config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
      (folder / "config.json").write_text(json.dumps(config))
    return model, folder

  return make
