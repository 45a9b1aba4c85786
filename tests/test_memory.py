"""What a run is said to need, against sizes counted by hand."""

import dataclasses

from jax.sharding import AbstractMesh, AxisType

from imm_jax import memory
from imm_jax.model import sharding
from imm_jax.model.config import ModelConfig

MODEL = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
                    head_dim=8, rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=True, qkv_bias=True)
ODD = dataclasses.replace(MODEL, vocab_size=63)
PRODUCTS = 2 * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 32 * 48)
WHOLE = 2 * (32 + 16 + 16 + 2 * 32) + 32  # biases and norms


def mesh(*sizes: int) -> AbstractMesh:
  return AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * len(sizes))


def test_the_state_of_a_device():
  assert memory.state_bytes(MODEL, mesh(1, 1, 1)) == 16 * (PRODUCTS + WHOLE + 64 * 32)
  assert memory.state_bytes(MODEL, mesh(2, 4, 1)) == 16 * (PRODUCTS // 4 + WHOLE + 64 * 32 // 4)
  assert memory.state_bytes(ODD, mesh(2, 4, 1)) == 16 * (PRODUCTS // 4 + WHOLE + 63 * 32)


def test_parameters_that_the_mesh_does_not_divide_are_named():
  assert memory.undivided(MODEL, mesh(2, 4, 1)) == []
  assert memory.undivided(ODD, mesh(2, 4, 1)) == ["embed_tokens.weight"]
  assert memory.undivided(ODD, mesh(8, 1, 1)) == []
