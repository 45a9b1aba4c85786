"""What is added to plain SFT so that a model stays near another one, or changes little of itself.

| | what it does | source |
|---|---|---|
| `l2_sp` | adds w/2 ||theta - theta_base||^2 to the loss | Li et al. 2018, https://arxiv.org/abs/1802.01483 |
| `kl` | adds w times the mean KL(p_base || p_theta) of the answers' tokens | Li & Hoiem 2016, arXiv 1606.09282 |
| `ema` | keeps a moving average of the weights | Polyak & Juditsky 1992; Tarvainen & Valpola 2017, 1703.01780 |
| `lora` | trains a low-rank change of each projection alone | Hu et al. 2021, https://arxiv.org/abs/2106.09685 |

Ours: the base is the model that the run began with, not the one that the round did; `l2_sp` has no term of its own for
a new head, for there is none, and AdamW sees its gradient as it sees the loss's; `kl` takes the text model's next
tokens for the old tasks' outputs, at temperature 1, where the tokens are learned; the average begins with the weights
that SFT begins with, in float32, without a correction for that.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from imm_jax import methods
from imm_jax.model.decoder import Params
from imm_jax.training.lora import Lora


class Additions(NamedTuple):
  """What a training adds to SFT; the defaults add nothing.

  Attributes:
    l2_sp: w of L2-SP; 0 for none.
    kl: w of the KL to the base; 0 for none.
    ema: the share of the old average that a step keeps; 0 for no average.
    lora: what is trained in place of all weights.
  """

  l2_sp: float = 0.0
  kl: float = 0.0
  ema: float = 0.0
  lora: Lora | None = None

  @property
  def anchored(self) -> bool:
    """Whether the base model's weights are at hand."""
    return bool(self.l2_sp or self.kl)


PLAIN = Additions()


def additions_of(config: ml_collections.ConfigDict) -> Additions:
  """What the SFT of a run adds."""
  sft, method = config.sft, methods.method_of(config)
  return Additions(l2_sp=sft.l2_sp_weight if method.anchor == "l2_sp" else 0.0,
                   kl=sft.kl_weight if method.anchor == "kl" else 0.0,
                   ema=sft.ema_decay if methods.averages(config) else 0.0,
                   lora=Lora(sft.lora_rank, sft.lora_alpha) if method.lora else None)


def pull(params: Params, anchor: Params, weight: float, grads: Params) -> tuple[jax.Array, Params]:
  """L2-SP: w/2 ||theta - anchor||^2 over all parameters, and the gradient with its own, w (theta - anchor), added.

  >>> value, grads = pull({"a": jnp.array([3.0, 1.0])}, {"a": jnp.array([1.0, 1.0])}, 0.5, {"a": jnp.ones(2)})
  >>> float(value), grads["a"].tolist()
  (1.0, [2.0, 1.0])
  """
  away = lambda p, a: p - a.astype(p.dtype)
  squares = jax.tree.map(lambda p, a: jnp.sum(jnp.square(away(p, a))), params, anchor)
  return (weight / 2 * sum(jax.tree.leaves(squares)),
          jax.tree.map(lambda g, p, a: g + weight * away(p, a), grads, params, anchor))


def follow(average: Params, params: Params, decay: float) -> Params:
  """The average after a step: decay times the old one, and the rest of the new weights.

  >>> follow({"a": jnp.array(1.0)}, {"a": jnp.array(3.0)}, 0.75)["a"].item()
  1.5
  """
  return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)
