"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): W + s B A, where only A and B are trained.

Each projection W [out, in] of every layer (q, k, v, o, gate, up, down) has A [r, in] and B [out, r], and s = alpha / r.
B is initialized to zero and A with normal entries, as in the paper; the variance 1 / in is our choice (peft draws
uniform entries with a third of it). The paper adapts only attention weights; adapting all projections is common since.

W + s B A is computed in float32 when the layer is used, and cast to the compute dtype like any weight, so that training
computes what the merged model computes. The gradient of W + s B A exists for one layer at a time.

Axes: L layers, r rank.
"""

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from imm_jax import files
from imm_jax.model import lora as adapters_on_disk, safetensors, sharding
from imm_jax.model.attention import precision
from imm_jax.model.checkpoint_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from imm_jax.model.config import PROJECTIONS, ModelConfig
from imm_jax.model.decoder import Layer, Params, abstract_params

FOLDER = "adapter"  # within the folder of the merged weights


class Lora(NamedTuple):
  """Holds the rank and alpha of all adapters."""

  rank: int
  alpha: float

  @property
  def scale(self) -> float:
    """Returns the factor s = alpha / rank."""
    return self.alpha / self.rank


def abstract(config: ModelConfig, lora: Lora) -> Params:
  """Returns the adapters' shapes: {"layers": {block: {projection: {"lora_A": [L, r, in], "lora_B": [L, out, r]}}}}."""
  layers = abstract_params(config)["layers"]
  shapes: Params = {}
  for name, block in PROJECTIONS.items():
    count, out, width = layers[block][name]["weight"].shape
    shapes.setdefault(block, {})[name] = {"lora_A": jax.ShapeDtypeStruct((count, lora.rank, width), jnp.float32),
                                          "lora_B": jax.ShapeDtypeStruct((count, out, lora.rank), jnp.float32)}
  return {"layers": shapes}


def init(config: ModelConfig, lora: Lora, mesh: Mesh, *, key: jax.Array) -> Params:
  """Returns initial float32 adapters, which leave the model unchanged; the same on every mesh."""
  shapes = abstract(config, lora)
  keys = dict(zip(PROJECTIONS, jax.random.split(key, len(PROJECTIONS)), strict=True))

  def first(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    *_, module, part = (p.key for p in path)
    if part == "lora_B":
      return jnp.zeros(leaf.shape, leaf.dtype)
    return jax.random.normal(keys[module], leaf.shape, leaf.dtype) * leaf.shape[-1]**-0.5

  shardings = jax.tree_util.tree_map_with_path(
      lambda path, leaf: sharding.param_sharding(mesh, sharding.path_name(path), leaf.shape), shapes)
  return jax.jit(lambda: jax.tree_util.tree_map_with_path(first, shapes), out_shardings=shardings)()


def add(layer: Layer, adapters: Params, lora: Lora) -> Layer:
  """Returns a layer with W + s B A for each W; `adapters` are those of this layer, A [r, in] and B [out, r]."""

  def add_adapter(path: tuple, weight: jax.Array) -> jax.Array:
    *parents, name = (key.name for key in path if key.name != "value")
    adapter = functools.reduce(lambda tree, key: tree.get(key, {}), parents, adapters)
    if name != "weight" or not adapter:
      return weight
    return weight + lora.scale * jnp.matmul(adapter["lora_B"], adapter["lora_A"], precision=precision(jnp.float32))

  return jax.tree_util.tree_map_with_path(add_adapter, layer)


def save(adapters: Params, lora: Lora, out: Path, *, like: Path) -> None:
  """Merges adapters into the checkpoint `like` and writes the result to `out`.

  Writes an HF folder with the merged weights in the dtypes of `like` (see `imm_jax.model.lora`), and the adapters in
  peft's format to its subfolder `adapter`. All processes must call it; process 0 writes.
  """
  replicated = jax.tree.map(lambda leaf: NamedSharding(leaf.sharding.mesh, P()), adapters)
  adapters = jax.device_get(jax.jit(lambda tree: tree, out_shardings=replicated)(adapters))
  if jax.process_index() != 0:
    return
  with tempfile.TemporaryDirectory() as scratch:
    write(adapters, lora, Path(scratch))
    adapters_on_disk.merge(like, Path(scratch), out)
  write(adapters, lora, out / FOLDER)


def write(adapters: Params, lora: Lora, folder: Path) -> None:
  """Writes adapters in peft's format: adapter_config.json and adapter_model.safetensors."""
  folder.mkdir(parents=True, exist_ok=True)
  files.write_json(folder / ADAPTER_CONFIG, {
      "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0,
      "bias": "none", "target_modules": list(PROJECTIONS), "inference_mode": True})
  safetensors.write(folder / ADAPTER_WEIGHTS, [
      (name, array.dtype, array.shape, lambda array=array: [array]) for name, array in _named_tensors(adapters)])


def _named_tensors(adapters: Params) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the tensors of each layer under peft's names."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(adapters["layers"]):
    block, module, part = (key.key for key in path)
    for i, array in enumerate(np.asarray(leaf)):
      yield f"base_model.model.model.layers.{i}.{block}.{module}.{part}.weight", array
