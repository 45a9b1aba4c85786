"""Small checkpoint folders for the tests of merging, and the command that merges them."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from imm_jax.model import safetensors
from tests import REPO

# Rows of several lengths, odd and even, one row, one entry, one axis, more than two, none.
SHAPES = {"model.embed_tokens.weight": (37, 6), "model.layers.0.mlp.up_proj.weight": (7, 5),
          "model.layers.1.mlp.up_proj.weight": (7, 5), "model.layers.0.self_attn.q_proj.bias": (9,),
          "model.layers.1.self_attn.q_proj.bias": (9,), "model.norm.weight": (6,), "conv": (3, 2, 5), "one": (1, 1),
          "scalar": (), "nothing": (0, 4), "thin": (600, 3), "conv1d": (700, 1, 4)}


def models(dtypes=(np.float32, ml_dtypes.bfloat16, np.float16, np.float32)):
  rng = np.random.default_rng(0)
  first = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
  trees = [first, *({n: x + 0.1 * rng.normal(size=x.shape) for n, x in first.items()} for _ in range(3))]
  return [{n: np.asarray(x, dtype) for n, x in tree.items()} | {"ids": np.arange(5)}
          for tree, dtype in zip(trees, dtypes, strict=True)]


def write(folder: Path, tree: dict[str, np.ndarray], shards: int = 1) -> Path:
  folder.mkdir(parents=True)
  (folder / "config.json").write_text('{"model_type": "qwen2", "torch_dtype": "float32"}')
  (folder / "tokenizer.json").write_text("{}")
  names = list(tree)
  parts = [names[i::shards] for i in range(shards)]
  weight_map = {}
  for i, part in enumerate(parts):
    file = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
    safetensors.write(folder / file, [(n, tree[n].dtype, tree[n].shape, lambda n=n: [tree[n]]) for n in part])
    weight_map |= dict.fromkeys(part, file)
  if shards > 1:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  return folder


def read(folder: Path) -> dict[str, np.ndarray]:
  index = folder / "model.safetensors.index.json"
  files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
  return {name: np.array(x) for file in files for name, x in safetensors.read(folder / file).items()}


def run(*flags: str, **options) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, "-m", "imm_jax.merge", *flags], cwd=REPO, capture_output=True, text=True,
                        check=False, **options)


def one_line(done: subprocess.CompletedProcess, code: int = 1) -> str:
  assert done.returncode == code
  assert "Traceback" not in done.stderr
  lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
  assert len(lines) == 1, done.stderr
  return lines[0]
