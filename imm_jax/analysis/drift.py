"""How far a model has gone from the base, on texts that are given."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from imm_jax.analysis import sums
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params
from imm_jax.training.loss import compare_heads
from imm_jax.training.packing import PackedBatches


class Drift(NamedTuple):
  """Means over the learned tokens of some texts, in nats a token.

  Attributes:
    tokens: how many.
    kl: KL(p_base || p), over the whole vocabulary at temperature 1.
    loss: -log p of the tokens.
    base_loss: the base's.
    entropy: of p.
    base_entropy: the base's.
  """

  tokens: int
  kl: float
  loss: float
  base_loss: float
  entropy: float
  base_entropy: float


def drift(config: ModelConfig, base: Params, params: Params, batches: PackedBatches, *, mesh: Mesh,
          compute_dtype: jnp.dtype, attention: str = "xla", accumulation: int = 1, label: str = "drift") -> Drift:
  """Compares a model with the base on the responses of packed texts, each token given all before it.

  Of this KL "RL's Razor" (Shenfeld et al. 2025, https://arxiv.org/abs/2509.04259) finds that it predicts forgetting,
  where it is measured on the new task; which texts these are is the caller's choice.

  Args:
    config: of both models.
    base: parameters of the base, stacked layers, placed by `sharding.RULES`.
    params: of the model.
    batches: prompts and responses, once: packed with `epochs=1`.
    mesh: devices.
    compute_dtype: dtype of activations.
    attention: what `attention.choose_backend` gave.
    accumulation: parts that a batch is run in.
    label: what the progress bar says.
  """
  *found, tokens = sums.over(_compare, config, (base, params), batches, mesh=mesh, compute_dtype=compute_dtype,
                             attention=attention, accumulation=accumulation, label=label)
  return Drift(round(float(tokens)), *(float(total / tokens) for total in found))


def _compare(inputs: Sequence[sums.Inputs], chunk: int) -> jax.Array:
  (base_x, base_head, *_), (x, head, targets, weights) = inputs
  found = compare_heads(x, head, base_x, base_head, targets, weights, chunk)
  return jnp.concatenate([found, jnp.sum(weights)[None]])
