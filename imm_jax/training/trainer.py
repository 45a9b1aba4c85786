"""The training loop: runs steps over packed batches, saves states, and reports metrics."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from imm_jax.errors import PreemptedError, UserError
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params
from imm_jax.training import gradients, interventions, preemption
from imm_jax.training.computation import Computation
from imm_jax.training.input import Input
from imm_jax.training.optimization import Optimization
from imm_jax.training.packing import PackedBatches
from imm_jax.training.reporting import Reporting, StepLog
from imm_jax.training.states import Checkpoints
from imm_jax.training.step import (
  Frozen,
  Metrics,
  Step,
  TrainState,
  abstract_state,
  halt_flag,
  init_state,
  make_train_step,
  place,
)
from imm_jax.training.stopping import BEST_KEYS, EarlyStopping
from imm_jax.training.throughput import Meter


class Trained(NamedTuple):
  """Holds the result of a training.

  Attributes:
    params: the trained parameters, or adapters with `additions.lora`; with early stopping those of the best epoch.
    first_loss: loss of the first step.
    last_loss: loss of the last step.
    steps: number of steps.
    average: moving average of the weights at the same step as `params`, or None without `additions.ema`.
    held_out: held-out loss of each epoch, with early stopping.
    best_epoch: number of the epoch that `params` are from, from 1, with early stopping; 0 without.
  """

  params: Params
  first_loss: float
  last_loss: float
  steps: int
  average: Params | None = None
  held_out: tuple[float, ...] = ()
  best_epoch: int = 0


def train(config: ModelConfig, load_params: Callable[[], Params], batches: PackedBatches, optimization: Optimization,
          computation: Computation, reporting: Reporting, *, load_frozen: Callable[[], Frozen] = dict,
          held_out: PackedBatches | None = None, checkpoints: Checkpoints | None = None) -> Trained:
  """Trains float32 parameters over all batches.

  Args:
    config: model config.
    load_params: returns the initial parameters (float32, stacked layers) or adapters; not called if training resumes
      from a saved state.
    batches: the batch of each step.
    optimization: what is minimized, and how.
    computation: how the steps are computed.
    reporting: what is reported, and how often.
    load_frozen: returns the frozen weights that the additions need (see `step.TrainState`); also called when training
      resumes, because they are not saved.
    held_out: answers for early stopping, packed with `epochs=1`; None trains to the end.
    checkpoints: where states are saved; training resumes from the newest, whatever mesh it was saved on.

  Raises:
    UserError: when the loss is not finite (the state before that step is saved), or a state cannot be read or written.
    PreemptedError: after SIGTERM, once the state is saved.
  """
  optimizer, additions, mesh = optimization.make_optimizer(), optimization.additions, computation.mesh
  stopping = held_out and EarlyStopping(config, held_out, batches.epoch_ends, computation, additions=additions)
  saved = checkpoints and checkpoints.latest()
  if saved:
    like = abstract_state(config, optimizer, mesh, additions=additions)
    state = _saved_state(checkpoints, saved, like, load_frozen, stopping)
  else:
    state = _first_state(config, load_params(), batches, optimization, computation, load_frozen, reporting.label)
  train_step = make_train_step(config, optimizer, computation, additions=additions)
  inputs = Input(batches, mesh, saved and saved["input"])
  meter = Meter(config, batches, mesh.size)
  rates = optimization.compute_learning_rates(len(batches))
  with StepLog(reporting, batches, rates, meter, saved) as log:
    state = _run_steps(train_step, state, inputs, rates, log, stopping, checkpoints)
  best = stopping.best if stopping else state
  return Trained(best["params"], log.first_loss, log.last_loss, log.done, best.get("average"),
                 *((tuple(stopping.losses), stopping.best_epoch) if stopping else ()))


def _run_steps(train_step: Step, state: TrainState, inputs: Input, learning_rates: np.ndarray, log: StepLog,
               stopping: EarlyStopping | None, checkpoints: Checkpoints | None) -> TrainState:
  """Runs the steps to the last, or to the end of an epoch that is worse than the best; returns the state after them."""
  watch = preemption.watch() if checkpoints else contextlib.nullcontext(threading.Event())
  with watch as stop_requested:
    for step in range(log.done, log.total):
      log.profile.maybe_start(step)
      position = inputs.state
      with log.meter.waiting():
        batch = next(inputs)
      state, metrics = train_step(state, batch, learning_rates[step])
      log.add(metrics, position)
      last = log.done == log.total
      save_due = bool(checkpoints) and checkpoints.due(log.done) and not last
      epoch_ends = bool(stopping) and stopping.due(log.done)
      sync = save_due or last or epoch_ends or log.full
      stop = _must_stop(stop_requested, metrics, sync)
      log.profile.maybe_stop(step, metrics, last=last or stop)
      if not (sync or stop):
        continue
      if failure := log.report_steps():
        if checkpoints and failure.step > log.start:
          _save(checkpoints, failure.step, failure.position, state, log, stopping)
          checkpoints.wait()
        raise UserError(log.explain(failure, checkpoints and checkpoints.step and checkpoints.folder))
      if epoch_ends:
        log.report_held_out(stopping.measure(state))
        if stopping.should_stop and not last:
          log.profile.maybe_stop(step, metrics, last=True)
          break
      if save_due or stop:
        _save(checkpoints, log.done, inputs.state, state, log, stopping)
      if stop:
        checkpoints.wait()
        raise PreemptedError(log.explain_stop())
  return state


def _must_stop(requested: threading.Event, metrics: Metrics, sync: bool) -> bool:
  """Returns whether a process has received SIGTERM; `sync` is whether the host waits for this step in any case.

  Several processes agree on stopping only where they wait anyway, and while no step is running: its collectives and
  this one could otherwise run in different orders on different hosts.
  """
  if jax.process_count() > 1:
    if not sync:
      return False
    jax.block_until_ready(metrics)
  return preemption.any_process_stops(requested)


def _save(checkpoints: Checkpoints, done: int, position: dict[str, Any], state: TrainState, log: StepLog,
          stopping: EarlyStopping | None) -> None:
  """Saves the state after `done` steps, from which training resumes with the input at `position`."""
  about = {"held_out": list(stopping.losses)} if stopping else {}
  checkpoints.save(done, _entries(state, stopping), input=position, first_loss=log.first_loss, last_loss=log.last_loss,
                   **about)


def _first_state(config: ModelConfig, params: Params, batches: PackedBatches, optimization: Optimization,
                 computation: Computation, load_frozen: Callable[[], Frozen], label: str) -> TrainState:
  """Returns the state before the first step; takes ownership of `params`."""
  make_state = lambda: init_state(params, optimization.make_optimizer(), computation.mesh,
                                  additions=optimization.additions, frozen=load_frozen())
  top_p = optimization.intervention.top_p
  if top_p is None:
    return make_state()
  # The gradient is computed before the moments are allocated, because it takes as much memory.
  grads = gradients.gradient(config, params, batches.to_single_epoch(), computation, label=f"{label}: importance")
  mask = interventions.importance_mask(params, grads, top_p)
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
  mesh = next(iter(jax.tree.leaves(like))).sharding.mesh
  if "frozen" in like:
    state["frozen"] = {role: place(weights, mesh) for role, weights in load_frozen().items()}
  return like | state | {"halted": halt_flag(mesh)}


def _entries(state: TrainState, stopping: EarlyStopping | None) -> TrainState:
  """Returns the entries of a state to save: all but `halted` and `frozen`, and the best epoch's weights."""
  entries = {name: state[name] for name in ("params", "opt_state", "average") if name in state}
  return entries | ({"best": stopping.best} if stopping and stopping.best else {})
