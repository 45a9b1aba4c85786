"""What a training minimizes and how: the schedule of the learning rate, and the optimizer, AdamW after clipping.

The learning rate is an argument of each step. As a part of the program it would be compiled anew for every number of
steps, which is another one in each round.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from imm_jax.model.decoder import Params
from imm_jax.training.additions import PLAIN, Additions
from imm_jax.training.interventions import Intervention

# Name of a schedule -> function (peak, steps) that makes the part of it after the warm-up.
SCHEDULES: Mapping[str, Callable[[float, int], optax.Schedule]] = {
    "cosine": optax.cosine_decay_schedule, "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
    "constant": lambda peak, steps: optax.constant_schedule(peak)}


class Optimization(NamedTuple):
  """Holds what a training minimizes, and how.

  Attributes:
    schedule: learning rate by step.
    weight_decay: weight decay of AdamW.
    grad_clip: global norm at which the gradient is clipped; 0 disables clipping.
    intervention: change to the training, such as `interventions.gradient_decay()`.
    additions: additions to SFT.
  """

  schedule: optax.Schedule
  weight_decay: float
  grad_clip: float
  intervention: Intervention = Intervention()
  additions: Additions = PLAIN

  def compute_learning_rates(self, steps: int) -> np.ndarray:
    """Computes the learning rate of each step, float32 [steps]."""
    return np.asarray(jax.vmap(self.schedule)(jnp.arange(steps)))

  def make_optimizer(self) -> optax.GradientTransformation:
    """Makes the optimizer, with the changes of the intervention."""
    intervention = self.intervention
    clip = self.grad_clip if intervention.grad_clip is None else intervention.grad_clip
    return make_optimizer(weight_decay=self.weight_decay, grad_clip=clip, transform=intervention.transform)


def make_schedule(kind: str, *, peak: float, total_steps: int, warmup_ratio: float) -> optax.Schedule:
  """Returns a schedule with linear warm-up from 0, then `cosine` or `linear` decay to 0, or a `constant` rate.

  The warm-up leaves at least one step at the peak, so that even a training of one step trains.

  >>> schedule = make_schedule("cosine", peak=1.0, total_steps=100, warmup_ratio=0.1)
  >>> float(schedule(5)), float(schedule(10)), round(float(schedule(55)), 3)
  (0.5, 1.0, 0.5)
  """
  warmup = min(max(1, round(total_steps * warmup_ratio)), total_steps - 1) if warmup_ratio > 0 else 0
  decay = SCHEDULES[kind](peak, max(1, total_steps - warmup))
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup]) if warmup else decay


def make_optimizer(*, weight_decay: float, grad_clip: float, transform: optax.GradientTransformation | None = None,
                   ) -> optax.GradientTransformationExtraArgs:
  """Returns AdamW (b1 0.9, b2 0.999, eps 1e-8) after clipping by global norm; `grad_clip` 0 disables clipping.

  Its `update` takes `learning_rate`, a float32 scalar, and `halted`, see `_adamw`. `transform` is applied to AdamW's
  updates, which include weight decay and learning rate.
  """
  clip = _clip(grad_clip) if grad_clip else optax.identity()
  return optax.chain(clip, _adamw(weight_decay), *([transform] if transform else []))


def _clip(max_norm: float) -> optax.GradientTransformation:
  """Clips as `optax.clip_by_global_norm` does, whose elementwise division makes XLA keep a second gradient."""

  def clip(grads: Params, _: Params | None) -> Params:
    norm = optax.tree.norm(grads)
    scale = jnp.where(norm < max_norm, 1.0, max_norm / norm)
    return jax.tree.map(lambda g: g * scale, grads)

  return optax.stateless(clip)


def _adamw(weight_decay: float, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
           ) -> optax.GradientTransformationExtraArgs:
  """Updates as `optax.adamw` does at a `learning_rate`, but in place; `update(..., halted=True)` keeps the state.

  A barrier completes the moments before the update reads them. Otherwise XLA computes them twice, once for the update,
  and keeps copies of both old moments, which on CPU costs twice the memory of the parameters.
  """
  moments = optax.scale_by_adam(b1, b2, eps)

  def update(grads: Params, state: optax.ScaleByAdamState, params: Params, *, learning_rate: jax.Array,
             halted: jax.Array | bool = False) -> tuple[Params, optax.ScaleByAdamState]:
    new = jax.tree.map(lambda old, new: jnp.where(halted, old, new), state, moments.update(grads, state)[1])
    new = jax.lax.optimization_barrier(new)
    means = (optax.tree.bias_correction(m, b, new.count) for m, b in ((new.mu, b1), (new.nu, b2)))
    change = lambda m, v, p: -learning_rate * (m / (jnp.sqrt(v) + eps) + weight_decay * p)
    return jax.tree.map(change, *means, params), new

  return optax.GradientTransformationExtraArgs(moments.init, update)
