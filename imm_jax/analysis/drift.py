"""Measures how far a model has drifted from the base on given texts."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from imm_jax.analysis import sums
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params
from imm_jax.training.computation import Computation
from imm_jax.training.loss import compare_heads
from imm_jax.training.packing import PackedBatches


class Drift(NamedTuple):
  """Holds means over the learned tokens of some texts, in nats per token.

  Attributes:
    tokens: number of tokens.
    kl: KL(p_base || p), over the whole vocabulary at temperature 1.
    loss: -log p of the tokens.
    base_loss: the same for the base.
    entropy: entropy of p.
    base_entropy: the same for the base.
  """

  tokens: int
  kl: float
  loss: float
  base_loss: float
  entropy: float
  base_entropy: float


def measure_drift(config: ModelConfig, base: Params, params: Params, batches: PackedBatches,
                  computation: Computation, *, label: str = "drift") -> Drift:
  """Compares a model with the base on the responses of packed texts, with teacher forcing.

  "RL's Razor" (Shenfeld et al. 2025, https://arxiv.org/abs/2509.04259) finds that this KL predicts forgetting if it is
  measured on the new task; the caller chooses the texts.

  Args:
    config: config of both models.
    base: parameters of the base with stacked layers, sharded by `sharding.RULES`.
    params: parameters of the model.
    batches: prompts and responses, packed with `epochs=1`.
    computation: how the passes are computed.
    label: label of the progress bar.
  """
  *totals, tokens = sums.sum_over_batches(_sum_differences, config, (base, params), batches, computation, label=label)
  return Drift(round(float(tokens)), *(float(total / tokens) for total in totals))


def _sum_differences(inputs: Sequence[sums.Inputs], chunk: int) -> jax.Array:
  (base_x, base_head, *_), (x, head, targets, loss_mask) = inputs
  sums_ = compare_heads(x, head, base_x, base_head, targets, loss_mask, chunk)
  return jnp.concatenate([sums_, jnp.sum(loss_mask)[None]])
