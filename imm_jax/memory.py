"""What a run needs, estimated from the model's config before anything is loaded."""

import math

import jax
import ml_collections

from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import abstract_params

_BYTES = {"bfloat16": 2, "float32": 4}


def count_params(model: ModelConfig) -> int:
  """Number of parameters."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(model)))


def estimate(config: ml_collections.ConfigDict, model: ModelConfig, devices: int) -> str:
  """One line on sizes: parameters, training state, sampling cache, disk."""
  count = count_params(model)
  fsdp = config.mesh.fsdp if config.mesh.fsdp > 0 else max(1, devices // max(1, config.mesh.data))
  # float32 weights, two moments and gradients, split over the fsdp axis.
  state = 16 * count / fsdp
  width = _BYTES[config.sample.compute_dtype]
  cache = (2 * model.num_layers * model.num_kv_heads * model.head_dim * width
           * config.sample.batch_size * (512 + config.sample.max_new_tokens)) / devices
  checkpoints = config.rounds * (2 if config.method == "imm" else 1)
  return (f"{count:,} parameters; on each device SFT state {_size(state)}, sampling weights "
          f"{_size(width * count / fsdp)} and cache {_size(cache)} (prompts of 512 tokens); {checkpoints} checkpoints "
          f"of {_size(2 * count)} in bfloat16")


def _size(num_bytes: float) -> str:
  for unit in ("B", "KiB", "MiB"):
    if num_bytes < 1024:
      return f"{num_bytes:.1f} {unit}"
    num_bytes /= 1024
  return f"{num_bytes:.1f} GiB"
