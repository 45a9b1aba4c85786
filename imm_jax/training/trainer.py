"""Runs training steps over packed batches, saves their state, and reports how they go."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from imm_jax import progress
from imm_jax.analysis import importance
from imm_jax.errors import PreemptedError, UserError
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params
from imm_jax.training import interventions, preemption, throughput
from imm_jax.training.checkpoints import Checkpoints
from imm_jax.training.input import Input
from imm_jax.training.interventions import Intervention
from imm_jax.training.packing import PackedBatches
from imm_jax.training.step import TrainState, abstract_state, init_state, make_optimizer, make_train_step, not_halted

# Called with a step and its values, plain floats by name, for every step in order.
Report = Callable[..., None]
# Examples that an error names.
_NAMED = 8


class Trained(NamedTuple):
  """The parameters that training ends with, and the losses of its first and last step."""

  params: Params
  first_loss: float
  last_loss: float


def train(config: ModelConfig, load_params: Callable[[], Params], batches: PackedBatches, *, schedule: optax.Schedule,
          weight_decay: float, grad_clip: float, compute_dtype: jnp.dtype, accumulation: int, remat: str, mesh: Mesh,
          log_every: int, report: Report, label: str, attention: str = "xla", checkpoints: Checkpoints | None = None,
          profile: throughput.Profile | None = None, intervention: Intervention | None = None,
          lines: Sequence[int] | None = None) -> Trained:
  """Trains float32 parameters over all batches.

  Args:
    config: of the model.
    load_params: gives the parameters to begin with: float32, stacked layers; not called where a saved state is.
    batches: one for each step.
    schedule: learning rate by step.
    weight_decay: AdamW's.
    grad_clip: largest global norm of the gradient; 0 does not clip.
    compute_dtype: dtype of activations.
    accumulation: parts that a batch is run in.
    remat: one of `decoder.REMAT`.
    mesh: devices; parameters are placed by `sharding.RULES`.
    log_every: steps between reports; the host waits for the device only then, and to save.
    report: takes the metrics of each step.
    label: what the progress bar says.
    attention: what `attention.choose` gave.
    checkpoints: states are saved there and training goes on from the newest, on whatever mesh it was saved from.
    profile: records some of the steps.
    intervention: what is done differently, such as `interventions.gradient_decay()`.
    lines: of each example in its file, from 1, for errors; by default they are counted.

  Raises:
    UserError: when the loss is not finite (the state before it is saved), or a state cannot be read or written.
    PreemptedError: after SIGTERM, when the state is saved.
  """
  intervention = intervention or Intervention()
  clip = grad_clip if intervention.grad_clip is None else intervention.grad_clip
  optimizer = make_optimizer(schedule, weight_decay=weight_decay, grad_clip=clip, transform=intervention.transform)
  options = {"compute_dtype": compute_dtype, "accumulation": accumulation, "remat": remat, "attention": attention,
             "mesh": mesh}
  saved = checkpoints and checkpoints.latest()
  if saved:
    start, first_loss = saved["step"], saved["first_loss"]
    like = abstract_state(config, optimizer, mesh)
    state = like | checkpoints.restore(start, _kept(like)) | {"halted": not_halted(mesh)}
  else:
    start, first_loss = 0, None
    state = _first_state(config, load_params(), batches, optimizer, intervention, options, label)
  train_step = make_train_step(config, optimizer, **options)
  inputs = Input(batches, mesh, saved and saved["input"])
  meter = throughput.Meter(config, batches, mesh.size)
  learning_rates = np.asarray(jax.vmap(schedule)(jnp.arange(len(batches))))
  last_loss = saved["last_loss"] if saved else None
  speed: dict[str, float] = {}
  pending: list[tuple[dict[str, Any], dict[str, jax.Array]]] = []
  watch = preemption.watch() if checkpoints else contextlib.nullcontext(threading.Event())
  with watch as told, progress.bar(len(batches), label, "step", initial=start) as bar:
    for step in range(start, len(batches)):
      if profile:
        profile.before(step)
      position = inputs.state
      with meter.waiting():
        batch = next(inputs)
      state, metrics = train_step(state, batch)
      pending.append((position, metrics))
      if step == start:
        jax.block_until_ready(metrics)
        meter.start()  # the first step has compiled, and is not timed
      done = step + 1
      last = done == len(batches)
      due = bool(checkpoints) and checkpoints.due(done) and not last
      waits = due or last or len(pending) == log_every
      # Several processes ask each other only where they wait anyway, and when no step is under way: its collectives and
      # these could meet in another order on another host.
      if waits and jax.process_count() > 1:
        jax.block_until_ready(metrics)
      stop = preemption.agreed(told) if jax.process_count() == 1 or waits else False
      if profile:
        profile.after(step, metrics, last=last or stop)
      if not (waits or stop):
        continue
      values = jax.device_get([metrics for _, metrics in pending])
      timed = len(pending) - (done - len(pending) == start)
      speed = meter.read(timed) if timed else speed
      for i, value in enumerate(values, done - len(pending)):
        if not np.isfinite([value["loss"], value["grad_norm"]]).all():
          if checkpoints and i > start:
            checkpoints.save(i, _kept(state), input=pending[i - done][0], first_loss=first_loss, last_loss=last_loss)
            checkpoints.wait()
          kept = checkpoints and checkpoints.step and checkpoints.folder
          raise UserError(_not_finite(label, i, value, batches, kept, lines))
        last_loss = float(value["loss"])
        first_loss = last_loss if first_loss is None else first_loss
        report(i, loss=last_loss, grad_norm=float(value["grad_norm"]), tokens=float(value["tokens"]),
               learning_rate=float(learning_rates[i]), **speed)
      bar.set_postfix(loss=f"{last_loss:.3f}", tokens_per_s=f"{speed.get('tokens_per_s', 0):.0f}", refresh=False)
      bar.update(len(pending))
      pending = []
      if due or stop:
        checkpoints.save(done, _kept(state), input=inputs.state, first_loss=first_loss, last_loss=last_loss)
      if stop:
        checkpoints.wait()
        raise PreemptedError(f"{label}: told to stop, after step {done} of {len(batches)}; its state is saved, and the "
                             "same command goes on from it")
  return Trained(state["params"], first_loss, last_loss)


def _first_state(config: ModelConfig, params: Params, batches: PackedBatches, optimizer: optax.GradientTransformation,
                 intervention: Intervention, options: dict[str, Any], label: str) -> TrainState:
  if intervention.top_p is None:
    return init_state(params, optimizer, options["mesh"])
  # Before there are moments: the gradient takes their memory.
  grads = importance.gradient(config, params, batches.one_epoch(), label=f"{label}: importance", **options)
  mask = interventions.important(params, grads, intervention.top_p)
  del grads
  return interventions.set_mask(init_state(params, optimizer, options["mesh"]), mask)


def _kept(state: TrainState) -> TrainState:
  """What is saved of a state; whether it was halted is not."""
  return {name: state[name] for name in ("params", "opt_state")}


def _not_finite(label: str, step: int, value: dict[str, Any], batches: PackedBatches, folder: Any,
                lines: Sequence[int] | None) -> str:
  members = [lines[i] if lines else i + 1 for i in batches.members(step)]
  more = f" and {len(members) - _NAMED} more" if len(members) > _NAMED else ""
  where = ", ".join(map(str, members[:_NAMED])) + more
  advice = ("lower the learning rate or raise warmup_ratio, in a new --workdir" if step else
            "look for weights of the model that are not finite")
  kept = f"; the state before that step is kept in {folder}" if folder else ""
  return (f"{label}: the loss is {value['loss']} at step {step} (gradient norm {value['grad_norm']}), on lines {where} "
          f"of train.jsonl; {advice}{kept}")
