"""Small Llama folders and recipes of them."""

import json
from pathlib import Path

import numpy as np
import yaml

from imm_jax.merging.recipes import command, mergekit
from imm_jax.model import safetensors
from tests.merge_folders import read

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "hidden_size": 8,
          "intermediate_size": 6, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 12,
          "rope_theta": 1e4, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
          "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]}
SHAPES = {"model.embed_tokens.weight": (12, 8), "model.norm.weight": (8,), "lm_head.weight": (12, 8),
          **{f"model.layers.{i}.{name}": shape for i in range(4)
             for name, shape in {"mlp.up_proj.weight": (6, 8), "self_attn.q_proj.weight": (8, 8)}.items()}}


def save(folder: Path, seed: int, shapes=SHAPES, tree=None, **config) -> Path:
  folder.mkdir(parents=True)
  rng = np.random.default_rng(seed)
  tree = tree or {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  safetensors.write(folder / "model.safetensors", [(n, x.dtype, x.shape, lambda x=x: [x]) for n, x in tree.items()])
  (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
  return folder


def merged(tmp_path: Path, text: str | dict, name: str = "out") -> dict[str, np.ndarray]:
  path = tmp_path / f"{name}.yml"
  path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
  command.merge({tmp_path / name: mergekit.read(path)}, command.OutputOptions())
  return read(tmp_path / name)


def source(folder: Path, layers: list[int], **parameters) -> dict:
  """Some layers of a model, as `slices` lists them."""
  return {"model": str(folder), "layer_range": layers, **({"parameters": parameters} if parameters else {})}
