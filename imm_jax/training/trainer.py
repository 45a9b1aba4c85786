"""Runs training steps over packed batches and reports how they go."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from imm_jax import progress
from imm_jax.errors import UserError
from imm_jax.model import sharding
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params
from imm_jax.training.packing import PackedBatches
from imm_jax.training.step import init_state, make_optimizer, make_train_step

# Called with (step, values) for every step; values are plain floats.
Report = Callable[[int, dict[str, float]], None]


def train(config: ModelConfig, params: Params, batches: PackedBatches, *, schedule: optax.Schedule,
          weight_decay: float, grad_clip: float, compute_dtype: jnp.dtype, accumulation: int, remat: str, mesh: Mesh,
          log_every: int, report: Report, label: str) -> Params:
  """Trains float32 parameters over all batches and returns them.

  Args:
    config: of the model.
    params: float32, stacked layers; donated.
    batches: one for each step.
    schedule: learning rate by step.
    weight_decay: AdamW's.
    grad_clip: largest global norm of the gradient; 0 does not clip.
    compute_dtype: dtype of activations.
    accumulation: parts that a batch is run in.
    remat: one of `decoder.REMAT`.
    mesh: devices; parameters are placed by `sharding.RULES`.
    log_every: steps between reports; the host waits for the device only then.
    report: takes the metrics of each step.
    label: what the progress bar says.

  Raises:
    UserError: when the loss is not finite.
  """
  optimizer = make_optimizer(schedule, weight_decay=weight_decay, grad_clip=grad_clip)
  state = init_state(params, optimizer, mesh)
  del params
  train_step = make_train_step(config, optimizer, compute_dtype=compute_dtype, accumulation=accumulation, remat=remat,
                               mesh=mesh)
  batch_sharding = NamedSharding(mesh, sharding.BATCH)
  learning_rates = np.asarray(jax.vmap(schedule)(jnp.arange(len(batches))))
  pending: list[dict[str, Any]] = []
  started = time.monotonic()
  with progress.bar(len(batches), label, "step") as bar:
    for step in range(len(batches)):
      state, metrics = train_step(state, jax.device_put(batches[step], batch_sharding))
      pending.append(metrics)
      if len(pending) == log_every or step == len(batches) - 1:
        values = jax.device_get(pending)
        seconds, started = time.monotonic() - started, time.monotonic()
        rate = sum(float(v["tokens"]) for v in values) / seconds
        for i, value in enumerate(values, step + 1 - len(values)):
          if not np.isfinite([value["loss"], value["grad_norm"]]).all():
            raise UserError(f"{label}: the loss is {value['loss']} at step {i} (gradient norm {value['grad_norm']}); "
                            "lower the learning rate or raise warmup_ratio (nothing was saved from this stage)")
          report(i, {"loss": float(value["loss"]), "grad_norm": float(value["grad_norm"]),
                     "learning_rate": float(learning_rates[i]), "tokens": float(value["tokens"]), "tokens_per_s": rate})
        bar.set_postfix(loss=f"{value['loss']:.3f}", tokens_per_s=f"{rate:.0f}", refresh=False)
        bar.update(len(pending))
        pending = []
  return state["params"]
