"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): W + s B A, of which A and B alone are trained.

Each projection W [out, in] of every layer (q, k, v, o, gate, up, down) has A [r, in] and B [out, r], and s = alpha / r.
B begins at zero and A, as the paper has it, with normal entries; their variance 1 / in is ours (peft draws uniform ones
of a third of it). The paper adapts the attention's weights alone, all projections are what is usual since.

A layer's sum is formed where the layer is used, in float32, and is used in the compute dtype as any weight is: what is
trained is what the merged model computes. Its gradient exists for one layer at a time.

Axes: L layers, r rank.
"""

import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from imm_jax import files
from imm_jax.analysis import MODULES
from imm_jax.model import lora as adapters_on_disk, safetensors, sharding
from imm_jax.model.attention import precision
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Layer, Params, abstract_params
from imm_jax.model.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS

FOLDER = "adapter"  # beside the merged weights


class Lora(NamedTuple):
  """Rank and alpha of all adapters."""

  rank: int
  alpha: float

  @property
  def scale(self) -> float:
    """s."""
    return self.alpha / self.rank


def abstract(config: ModelConfig, lora: Lora) -> Params:
  """Shapes of the adapters: {"layers": {block: {projection: {"lora_A": [L, r, in], "lora_B": [L, out, r]}}}}."""
  layers = abstract_params(config)["layers"]
  found: Params = {}
  for name, block in MODULES.items():
    count, out, width = layers[block][name]["weight"].shape
    found.setdefault(block, {})[name] = {"lora_A": jax.ShapeDtypeStruct((count, lora.rank, width), jnp.float32),
                                         "lora_B": jax.ShapeDtypeStruct((count, out, lora.rank), jnp.float32)}
  return {"layers": found}


def init(config: ModelConfig, lora: Lora, mesh: Mesh, *, key: jax.Array) -> Params:
  """The first adapters, float32, which change nothing yet; the same on every mesh."""
  shapes = abstract(config, lora)
  keys = dict(zip(MODULES, jax.random.split(key, len(MODULES)), strict=True))

  def first(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    *_, module, part = (p.key for p in path)
    if part == "lora_B":
      return jnp.zeros(leaf.shape, leaf.dtype)
    return jax.random.normal(keys[module], leaf.shape, leaf.dtype) * leaf.shape[-1]**-0.5

  where = jax.tree_util.tree_map_with_path(
      lambda path, leaf: sharding.param_sharding(mesh, sharding.path_name(path), leaf.shape), shapes)
  return jax.jit(lambda: jax.tree_util.tree_map_with_path(first, shapes), out_shardings=where)()


def add(layer: Layer, adapters: Params, lora: Lora) -> Layer:
  """A layer of a model with W + s B A for each W; `adapters` are the layer's own, A [r, in] and B [out, r]."""

  def with_change(path: tuple, weight: jax.Array) -> jax.Array:
    *where, name = (key.name for key in path if key.name != "value")
    found = functools.reduce(lambda tree, key: tree.get(key, {}), where, adapters)
    if name != "weight" or not found:
      return weight
    return weight + lora.scale * jnp.matmul(found["lora_B"], found["lora_A"], precision=precision(jnp.float32))

  return jax.tree_util.tree_map_with_path(with_change, layer)


def save(adapters: Params, lora: Lora, out: Path, *, like: Path) -> None:
  """Writes the model that adapters make of the checkpoint `like`: an HF folder with the merged weights, in `like`'s
  dtypes, as `imm_jax.model.lora` merges them, and the adapters as peft has them, in its folder `adapter`.

  With several processes all of them call it, and process 0 writes.
  """
  whole = jax.tree.map(lambda leaf: NamedSharding(leaf.sharding.mesh, P()), adapters)
  adapters = jax.device_get(jax.jit(lambda tree: tree, out_shardings=whole)(adapters))
  if jax.process_index() != 0:
    return
  with tempfile.TemporaryDirectory() as scratch:
    write(adapters, lora, Path(scratch))
    adapters_on_disk.merge(like, Path(scratch), out)
  write(adapters, lora, out / FOLDER)


def write(adapters: Params, lora: Lora, folder: Path) -> None:
  """Writes adapters in peft's form: adapter_config.json and adapter_model.safetensors."""
  folder.mkdir(parents=True, exist_ok=True)
  files.write_text(folder / ADAPTER_CONFIG, json.dumps({
      "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0,
      "bias": "none", "target_modules": list(MODULES), "inference_mode": True}, indent=1) + "\n")
  safetensors.write(folder / ADAPTER_WEIGHTS, [
      (name, array.dtype, array.shape, functools.partial(_whole, array)) for name, array in _named(adapters)])


def _named(adapters: Params) -> Iterator[tuple[str, np.ndarray]]:
  """The tensors of each layer by peft's names."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(adapters["layers"]):
    block, module, part = (key.key for key in path)
    for i, array in enumerate(np.asarray(leaf)):
      yield f"base_model.model.model.layers.{i}.{block}.{module}.{part}.weight", array


def _whole(array: np.ndarray) -> list[np.ndarray]:
  return [array]
