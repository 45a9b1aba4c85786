"""What a run needs, estimated from the model's config before anything is loaded."""

import math

import jax
import ml_collections
from jax.sharding import Mesh, NamedSharding

from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import abstract_params
from imm_jax.model.sharding import for_decoding, param_sharding, path_name, spec_of
from imm_jax.training.loss import CHUNK

_BYTES = {"bfloat16": 2, "float32": 4}


def count_params(model: ModelConfig) -> int:
  """Number of parameters."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(model)))


def row_activations(model: ModelConfig, *, length: int, remat: str, width: int) -> int:
  """Bytes that the forward pass of SFT keeps of one row for the backward pass, and its logits.

  Args:
    model: of the checkpoint.
    length: tokens of the row.
    remat: one of `decoder.REMAT`.
    width: bytes of an activation.

  >>> model = ModelConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_layers=2, num_heads=2, num_kv_heads=1,
  ...     head_dim=2, rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=True, qkv_bias=True)
  >>> row_activations(model, length=10, remat="full", width=2)
  800
  """
  hidden, inner = model.hidden_size, model.intermediate_size
  queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
  # Of a token and layer: its input; what attention reads and gives; results of products; inputs of products and norms.
  kept = {"full": hidden, "attention": hidden + 2 * (queries + keys),
          "dots": 3 * hidden + queries + 2 * keys + 2 * inner,
          "none": 7 * hidden + 3 * queries + 3 * keys + 4 * inner}[remat]
  logits = 2 * min(length, CHUNK) * model.vocab_size * 4
  return model.num_layers * length * kept * width + logits


def state_bytes(model: ModelConfig, mesh: Mesh) -> int:
  """Bytes of SFT's float32 weights, AdamW's two moments and the gradients on one device."""
  return 16 * sum(math.prod(where.shard_shape(shape)) for where, shape in _placed(model, mesh).values())


def undivided(model: ModelConfig, mesh: Mesh) -> list[str]:
  """Parameters that every device holds whole although they are to be split, for the mesh does not divide them."""
  return [path for path, (where, _) in _placed(model, mesh).items()
          if where.is_fully_replicated and not NamedSharding(mesh, spec_of(path)).is_fully_replicated]


def _placed(model: ModelConfig, mesh: Mesh) -> dict[str, tuple[NamedSharding, tuple[int, ...]]]:
  """Where each parameter lies, and its shape."""
  return {path_name(path): (param_sharding(mesh, path_name(path), leaf.shape), leaf.shape)
          for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(model))}


def estimate(config: ml_collections.ConfigDict, model: ModelConfig, mesh: Mesh) -> str:
  """One line on sizes: parameters, training state, activations, sampling cache, disk."""
  count = count_params(model)
  tensor = mesh.shape["tensor"]
  state = state_bytes(model, mesh)
  width = _BYTES[config.sample.compute_dtype]
  row = row_activations(model, length=config.sft.row_length, remat=config.sft.remat,
                        width=_BYTES[config.sft.compute_dtype]) / tensor
  cache = (2 * model.num_layers * model.num_kv_heads * model.head_dim * width
           * config.sample.batch_size * (512 + config.sample.max_new_tokens)) / mesh.size
  copies = for_decoding(mesh, model.num_kv_heads).shape["tensor"]
  checkpoints = config.rounds * (1 + (1 + len(config.merge.sweep) if config.method in ("imm", "iimm") else 0))
  return (f"{count:,} parameters; on each device SFT state {_size(state)} and {_size(row)} for each row of "
          f"{config.sft.row_length} tokens that it holds at once, sampling weights {_size(width * count / copies)} and "
          f"cache {_size(cache)} (prompts of 512 tokens); {checkpoints} checkpoints of {_size(2 * count)} in bfloat16")


def _size(num_bytes: float) -> str:
  for unit in ("B", "KiB", "MiB"):
    if num_bytes < 1024:
      return f"{num_bytes:.1f} {unit}"
    num_bytes /= 1024
  return f"{num_bytes:.1f} GiB"
