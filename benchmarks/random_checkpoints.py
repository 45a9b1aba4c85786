"""Shared by benchmarks: random checkpoints of published shapes, and child processes for measurements."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from imm_jax.model import safetensors

# (hidden, feed-forward, layers, heads, key/value heads, vocabulary); with tied embeddings and biases, like Qwen2.5.
SHAPES = {
    "tiny": (64, 128, 2, 2, 1, 512), "sft": (256, 768, 6, 8, 2, 16_384),
    "small": (512, 1536, 8, 8, 2, 32_000), "0.5b": (896, 4864, 24, 14, 2, 151_936),
    "1.5b": (1536, 8960, 28, 12, 2, 151_936), "3b": (2048, 11_008, 36, 16, 2, 151_936)}
SCALE, CHANGE = 0.02, 0.001


def make(folder: Path, shape: str, seed: int, near: Path | None = None) -> Path:
  """Makes a bfloat16 checkpoint of one of `SHAPES`, unless the folder has it; `near` is a checkpoint to perturb."""
  if (folder / "config.json").exists():
    return folder
  shutil.rmtree(folder, ignore_errors=True)
  hidden, inner, layers, heads, kv_heads, vocab = SHAPES[shape]
  kv = kv_heads * hidden // heads
  shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
  for i in range(layers):
    shapes |= {f"model.layers.{i}.{name}": size for name, size in {
        "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden), "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (kv, hidden), "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, hidden), "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner)}.items()}
  rng = np.random.default_rng(seed)
  other = safetensors.read(near / "model.safetensors") if near else {}

  def values(name: str, size: tuple[int, ...]) -> np.ndarray:
    x = rng.standard_normal(size, np.float32) * (CHANGE if near else SCALE)
    if near:
      x += other[name].astype(np.float32)
    elif name.endswith("norm.weight"):
      x += 1
    return x.astype(ml_dtypes.bfloat16)

  folder.mkdir(parents=True)
  safetensors.write(folder / "model.safetensors", [
      (name, np.dtype(ml_dtypes.bfloat16), size, lambda n=name, s=size: [values(n, s)])
      for name, size in shapes.items()])
  (folder / "config.json").write_text(json.dumps({
      "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": hidden,
      "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
      "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6,
      "rope_theta": 1e6, "tie_word_embeddings": True, "dtype": "bfloat16"}))
  return folder


def run_child(file: str, child: str, env: Mapping[str, str] | None = None) -> str:
  """Runs this program again with `--child` and returns its output; exits with its messages if it fails."""
  command = [sys.executable, file, *sys.argv[1:], f"--child={child}"]
  process = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
  if process.returncode:
    sys.exit(f"{process.stderr}\n{' '.join(command)}: exit code {process.returncode}")
  return process.stdout
