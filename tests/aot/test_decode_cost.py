"""What a decode step costs, read off the compiled program."""

import collections
import math
import re

import jax
import jax.numpy as jnp
import pytest

from imm_jax.aot.hlo import Instruction, Module
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import init_params, unstack_layers
from imm_jax.sampling.native import decode

LAYERS, ROWS = 3, 8
CONFIG = ModelConfig(vocab_size=1000, hidden_size=96, intermediate_size=160, num_layers=LAYERS, num_heads=4,
                     num_kv_heads=2, head_dim=48, rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=False,
                     qkv_bias=True)


def within(module: Module, name: str) -> list[Instruction]:
  """Instructions of a computation and of all that it calls."""
  found, waiting = {}, [name]
  while waiting:
    name = waiting.pop()
    if name in module.computations and name not in found:
      found[name] = module.computations[name]
      waiting += [called for i in found[name]
                  for called in re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", i.attributes)]
  return [i for instructions in found.values() for i in instructions]


def size_of(shape: str) -> int:
  """Entries of a shape such as `f32[8,96]{1,0}`."""
  found = re.match(r"\w+\[([\d,]*)\]", shape)
  return math.prod(int(n) for n in found[1].split(",") if n) if found else 0


@pytest.mark.full
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_step_is_one_pass_over_the_weights(dtype: jnp.dtype) -> None:
  """One product for each weight, and none is copied, converted or transposed on the way."""
  params = unstack_layers(init_params(CONFIG, key=jax.random.key(0), dtype=dtype), LAYERS)
  static = decode.Static(CONFIG, jnp.dtype(dtype), (0,), 1.0, False, kernel="columns")
  state = decode.init(ROWS, 128, 32, static)
  compiled = decode.decode.lower(
      params, decode.no_prefix(64, static), state, jnp.zeros(ROWS, bool), jnp.int32(5), jnp.int32(ROWS),
      jnp.ones(CONFIG.vocab_size, bool), static=static).compile()
  module = Module(compiled.as_text())
  loops = [within(module, i.attribute(r"body=%?([\w.\-]+)")) for instructions in module.computations.values()
           for i in instructions if i.opcode == "while"]
  body = max(loops, key=len)
  products = collections.Counter(re.sub(r"\{.*", "", i.shape) for i in body if i.opcode == "dot")
  # Seven weights, attention's two products with the prefix and two with a row's own; the head.
  assert sum(products.values()) == LAYERS * (7 + 4) + 1
  assert products[f"f32[1000,{ROWS}]"] == 1  # a weight is the left operand, which is not copied into another order
  weights = {leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 2 and leaf.size > ROWS * 1000}
  moved = [i for i in body if i.opcode in ("copy", "convert", "transpose") and size_of(i.shape) in weights]
  assert moved == []
  # Nor is the cache; in bfloat16 XLA widens it.
  cache = state["caches"][0][0].size
  copied = [i for i in body if i.opcode in ("copy", "bitcast-convert", "transpose") and size_of(i.shape) == cache]
  assert dtype == jnp.bfloat16 or copied == []
