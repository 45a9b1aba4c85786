"""The training loop: runs steps over packed batches, saves states, and reports metrics."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from imm_jax.analysis import importance
from imm_jax.errors import PreemptedError, UserError
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params
from imm_jax.runtime import progress
from imm_jax.training import interventions, preemption, throughput
from imm_jax.training.additions import PLAIN, Additions
from imm_jax.training.computation import Computation
from imm_jax.training.input import Input
from imm_jax.training.interventions import Intervention
from imm_jax.training.optimization import make_optimizer
from imm_jax.training.packing import PackedBatches
from imm_jax.training.states import Checkpoints
from imm_jax.training.step import (
  Frozen,
  TrainState,
  abstract_state,
  halt_flag,
  init_state,
  make_train_step,
  to_xla_memory,
)
from imm_jax.training.stopping import BEST_KEYS, EarlyStopping

# Called for every step in order with its number and its metrics, floats by name; and once more with `held_out_loss` for
# the last step of an epoch.
Report = Callable[..., None]
# Number of examples that an error message lists.
_MAX_LISTED = 8


class Trained(NamedTuple):
  """Holds the result of a training.

  Attributes:
    params: the trained parameters, or adapters with `additions.lora`; with early stopping those of the best epoch.
    first_loss: loss of the first step.
    last_loss: loss of the last step.
    steps: number of steps.
    average: moving average of the weights at the same step as `params`, or None without `additions.ema`.
    held_out: held-out loss of each epoch, with early stopping.
  """

  params: Params
  first_loss: float
  last_loss: float
  steps: int
  average: Params | None = None
  held_out: tuple[float, ...] = ()


def train(config: ModelConfig, load_params: Callable[[], Params], batches: PackedBatches, *, schedule: optax.Schedule,
          weight_decay: float, grad_clip: float, compute_dtype: jnp.dtype, accumulation: int, remat: str, mesh: Mesh,
          log_every: int, report: Report, label: str, attention: str = "xla", checkpoints: Checkpoints | None = None,
          profile: throughput.Profile | None = None, intervention: Intervention | None = None,
          lines: Sequence[int] | None = None, additions: Additions = PLAIN,
          load_frozen: Callable[[], Frozen] = dict, held_out: PackedBatches | None = None) -> Trained:
  """Trains float32 parameters over all batches.

  Args:
    config: model config.
    load_params: returns the initial parameters (float32, stacked layers) or adapters; not called if training resumes
      from a saved state.
    batches: the batch of each step.
    schedule: learning rate by step.
    weight_decay: weight decay of AdamW.
    grad_clip: global norm at which the gradient is clipped; 0 disables clipping.
    compute_dtype: dtype of activations.
    accumulation: number of parts that a batch is split into.
    remat: one of `decoder.REMAT`.
    mesh: devices; parameters are sharded by `sharding.RULES`.
    log_every: steps between reports; the host waits for the device only then, and to save.
    report: receives the metrics of each step.
    label: text of the progress bar.
    attention: backend, from `attention.choose_backend`.
    checkpoints: where states are saved; training resumes from the newest, whatever mesh it was saved on.
    profile: profiles some of the steps.
    intervention: change to the training, such as `interventions.gradient_decay()`.
    lines: line of each example in its file, from 1, for error messages; by default 1, 2, 3, ...
    additions: additions to SFT.
    load_frozen: returns the frozen weights that the additions need (see `step.TrainState`); also called when training
      resumes, because they are not saved.
    held_out: answers for early stopping, packed with `epochs=1`; None trains to the end.

  Raises:
    UserError: when the loss is not finite (the state before that step is saved), or a state cannot be read or written.
    PreemptedError: after SIGTERM, once the state is saved.
  """
  intervention = intervention or Intervention()
  clip = grad_clip if intervention.grad_clip is None else intervention.grad_clip
  optimizer = make_optimizer(schedule, weight_decay=weight_decay, grad_clip=clip, transform=intervention.transform)
  computation = Computation(mesh, compute_dtype, accumulation, remat, attention)
  stopping = held_out and EarlyStopping(config, held_out, batches.epoch_ends, computation, additions=additions)
  saved = checkpoints and checkpoints.latest()
  if saved:
    start, first_loss = saved["step"], saved["first_loss"]
    state = _saved_state(checkpoints, saved, abstract_state(config, optimizer, mesh, additions=additions), load_frozen,
                         stopping)
  else:
    start, first_loss = 0, None
    state = _first_state(config, load_params(), batches, optimizer, intervention, additions, load_frozen,
                         computation, label)
  train_step = make_train_step(config, optimizer, computation, additions=additions)
  inputs = Input(batches, mesh, saved and saved["input"])
  meter = throughput.Meter(config, batches, mesh.size)
  learning_rates = np.asarray(jax.vmap(schedule)(jnp.arange(len(batches))))
  done, last_loss = start, saved["last_loss"] if saved else None
  speed: dict[str, float] = {}
  pending: list[tuple[dict[str, Any], dict[str, jax.Array]]] = []

  def save(done: int, position: dict[str, Any]) -> None:
    about = {"held_out": list(stopping.losses)} if stopping else {}
    checkpoints.save(done, _entries(state, stopping), input=position, first_loss=first_loss, last_loss=last_loss,
                     **about)

  watch = preemption.watch() if checkpoints else contextlib.nullcontext(threading.Event())
  with watch as stop_requested, progress.make_bar(len(batches), label, "step", initial=start) as bar:
    for step in range(start, len(batches)):
      if profile:
        profile.maybe_start(step)
      position = inputs.state
      with meter.waiting():
        batch = next(inputs)
      state, metrics = train_step(state, batch)
      pending.append((position, metrics))
      if step == start:
        jax.block_until_ready(metrics)
        meter.start()  # the first step compiled, and is not timed
      done = step + 1
      last = done == len(batches)
      due = bool(checkpoints) and checkpoints.due(done) and not last
      epoch_ends = bool(stopping) and stopping.due(done)
      sync = due or last or epoch_ends or len(pending) == log_every
      # Several processes agree on stopping only where they wait anyway, and while no step is running: its collectives
      # and this one could otherwise run in different orders on different hosts.
      if sync and jax.process_count() > 1:
        jax.block_until_ready(metrics)
      stop = preemption.any_process_stops(stop_requested) if jax.process_count() == 1 or sync else False
      if profile:
        profile.maybe_stop(step, metrics, last=last or stop)
      if not (sync or stop):
        continue
      values = jax.device_get([metrics for _, metrics in pending])
      timed = len(pending) - (done - len(pending) == start)
      speed = meter.read(timed) if timed else speed
      for i, value in enumerate(values, done - len(pending)):
        if not np.isfinite([value["loss"], value["grad_norm"]]).all():
          if checkpoints and i > start:
            save(i, pending[i - done][0])
            checkpoints.wait()
          folder = checkpoints and checkpoints.step and checkpoints.folder
          raise UserError(_not_finite(label, i, value, batches, folder, lines))
        last_loss = float(value["loss"])
        first_loss = last_loss if first_loss is None else first_loss
        report(i, loss=last_loss, grad_norm=float(value["grad_norm"]), tokens=float(value["tokens"]),
               learning_rate=float(learning_rates[i]), **speed,
               **{name: float(value[name]) for name in ("kl", "l2_sp") if name in value})
      bar.set_postfix(loss=f"{last_loss:.3f}", tokens_per_s=f"{speed.get('tokens_per_s', 0):.0f}", refresh=False)
      bar.update(len(pending))
      pending = []
      if epoch_ends:
        report(step, held_out_loss=stopping.measure(state))
        if stopping.should_stop and not last:
          if profile:
            profile.maybe_stop(step, metrics, last=True)
          break
        meter.start()
      if due or stop:
        save(done, inputs.state)
      if stop:
        checkpoints.wait()
        raise PreemptedError(f"{label}: told to stop, after step {done} of {len(batches)}; its state is saved; repeat "
                             "the command to resume")
  best = stopping.best if stopping else state
  return Trained(best["params"], first_loss, last_loss, done, best.get("average"),
                 tuple(stopping.losses) if stopping else ())


def _first_state(config: ModelConfig, params: Params, batches: PackedBatches, optimizer: optax.GradientTransformation,
                 intervention: Intervention, additions: Additions, load_frozen: Callable[[], Frozen],
                 computation: Computation, label: str) -> TrainState:
  make_state = lambda: init_state(params, optimizer, computation.mesh, additions=additions, frozen=load_frozen())
  if intervention.top_p is None:
    return make_state()
  # The gradient is computed before the moments are allocated, because it takes as much memory.
  grads = importance.gradient(config, params, batches.to_single_epoch(), computation, label=f"{label}: importance")
  mask = interventions.importance_mask(params, grads, intervention.top_p)
  del grads
  return interventions.set_mask(make_state(), mask)


def _saved_state(checkpoints: Checkpoints, saved: dict[str, Any], like: TrainState, load_frozen: Callable[[], Frozen],
                 stopping: EarlyStopping | None) -> TrainState:
  """Restores a state, adds the entries that are not saved, and restores `stopping`."""
  wanted = _entries(like, None)
  if stopping and saved["held_out"]:
    wanted["best"] = {name: like[name] for name in BEST_KEYS if name in like}
  state = checkpoints.restore(saved["step"], wanted)
  if stopping:
    stopping.losses, stopping.best = saved["held_out"], state.pop("best", None)
  frozen = {"frozen": jax.tree.map(to_xla_memory, dict(load_frozen()))} if "frozen" in like else {}
  return like | state | frozen | {"halted": halt_flag(next(iter(jax.tree.leaves(like))).sharding.mesh)}


def _entries(state: TrainState, stopping: EarlyStopping | None) -> TrainState:
  """Returns the entries of a state to save: all but `halted` and `frozen`, and the best epoch's weights."""
  entries = {name: state[name] for name in ("params", "opt_state", "average") if name in state}
  return entries | ({"best": stopping.best} if stopping and stopping.best else {})


def _not_finite(label: str, step: int, value: dict[str, Any], batches: PackedBatches, folder: Any,
                lines: Sequence[int] | None) -> str:
  members = [lines[i] if lines else i + 1 for i in batches.members(step)]
  more = f" and {len(members) - _MAX_LISTED} more" if len(members) > _MAX_LISTED else ""
  where = ", ".join(map(str, members[:_MAX_LISTED])) + more
  advice = ("lower the learning rate or raise warmup_ratio, in a new --workdir" if step else
            "look for weights of the model that are not finite")
  kept = f"; the state before that step is kept in {folder}" if folder else ""
  return (f"{label}: the loss is {value['loss']} at step {step} (gradient norm {value['grad_norm']}), on lines {where} "
          f"of train.jsonl; {advice}{kept}")
