"""Additions to plain SFT that keep a model near a reference model, or restrict how much of it changes.

| | what it does | source |
|---|---|---|
| `l2_sp` | adds w/2 ||theta - theta_base||^2 to the loss | Li et al. 2018, https://arxiv.org/abs/1802.01483 |
| `kl` | adds w times the mean KL(p_base || p_theta) over the answers' tokens | Li & Hoiem 2016, arXiv 1606.09282 |
| `ema` | keeps a moving average of the weights | Polyak & Juditsky 1992; Tarvainen & Valpola 2017, 1703.01780 |
| `lora` | trains only a low-rank update of each projection | Hu et al. 2021, https://arxiv.org/abs/2106.09685 |

Our choices: the base is the model that the run started from, not the one that the round started from. `l2_sp` has no
separate term for a new head, because there is none, and its gradient goes through AdamW like that of the loss. `kl`
uses the next-token distributions of the learned tokens, at temperature 1, as the outputs of the old tasks. The moving
average starts at the initial weights of SFT, in float32, without bias correction.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from imm_jax import methods
from imm_jax.model.decoder import Params
from imm_jax.training.lora import Lora


class Additions(NamedTuple):
  """Holds what a fine-tuning adds to SFT; the defaults add nothing.

  Attributes:
    l2_sp: weight w of L2-SP; 0 disables it.
    kl: weight w of the KL to the base; 0 disables it.
    ema: decay of the moving average; 0 keeps no average.
    lora: adapters to train instead of all weights.
  """

  l2_sp: float = 0.0
  kl: float = 0.0
  ema: float = 0.0
  lora: Lora | None = None

  @property
  def anchored(self) -> bool:
    """Returns whether the base model's weights are needed."""
    return bool(self.l2_sp or self.kl)


PLAIN = Additions()


def get_additions(config: ml_collections.ConfigDict) -> Additions:
  """Returns the additions that a run's config asks for."""
  sft, method = config.sft, methods.get_method(config)
  return Additions(**methods.get_anchor_weights(config),
                   ema=sft.ema_decay if methods.keeps_average(config) else 0.0,
                   lora=Lora(sft.lora_rank, sft.lora_alpha) if method.lora else None)


def add_l2_sp(params: Params, anchor: Params, weight: float, grads: Params) -> tuple[jax.Array, Params]:
  """Returns the L2-SP penalty w/2 ||theta - anchor||^2, and `grads` plus its gradient w (theta - anchor).

  >>> value, grads = add_l2_sp({"a": jnp.array([3.0, 1.0])}, {"a": jnp.array([1.0, 1.0])}, 0.5, {"a": jnp.ones(2)})
  >>> float(value), grads["a"].tolist()
  (1.0, [2.0, 1.0])
  """
  difference = lambda p, a: p - a.astype(p.dtype)
  sums_of_squares = jax.tree.map(lambda p, a: jnp.sum(jnp.square(difference(p, a))), params, anchor)
  return (weight / 2 * sum(jax.tree.leaves(sums_of_squares)),
          jax.tree.map(lambda g, p, a: g + weight * difference(p, a), grads, params, anchor))


def update_average(average: Params, params: Params, decay: float) -> Params:
  """Returns the moving average after a step: decay * average + (1 - decay) * params.

  >>> update_average({"a": jnp.array(1.0)}, {"a": jnp.array(3.0)}, 0.75)["a"].item()
  1.5
  """
  return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)
