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
from imm_jax.training.additions import PLAIN, Additions
from imm_jax.training.checkpoints import Checkpoints
from imm_jax.training.input import Input
from imm_jax.training.interventions import Intervention
from imm_jax.training.packing import PackedBatches
from imm_jax.training.step import (
  Frozen,
  TrainState,
  abstract_state,
  init_state,
  make_optimizer,
  make_train_step,
  not_halted,
  own,
)
from imm_jax.training.stopping import KEPT, EarlyStopping

# Called with a step and its values, plain floats by name, for every step in order; and once more with `held_out_loss`
# for one that an epoch ends with.
Report = Callable[..., None]
# Examples that an error names.
_NAMED = 8


class Trained(NamedTuple):
  """What training ends with.

  Attributes:
    params: the parameters; the adapters with `additions.lora`; those of the best epoch with early stopping.
    first_loss: of the first step.
    last_loss: of the last.
    steps: how many there were.
    average: of the weights, where one was kept; of the same moment as `params`.
    held_out: with early stopping the loss of each epoch on what was held out.
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
    config: of the model.
    load_params: gives the parameters to begin with: float32, stacked layers, or adapters; not called where a saved
      state is.
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
    attention: what `attention.choose_backend` gave.
    checkpoints: states are saved there and training goes on from the newest, on whatever mesh it was saved from.
    profile: records some of the steps.
    intervention: what is done differently, such as `interventions.gradient_decay()`.
    lines: of each example in its file, from 1, for errors; by default they are counted.
    additions: what is added to SFT.
    load_frozen: gives the weights that the additions need beside (`step.TrainState`); called in any case, for they are
      not saved.
    held_out: answers for early stopping, packed once (`stopping.EarlyStopping`); None trains to the end.

  Raises:
    UserError: when the loss is not finite (the state before it is saved), or a state cannot be read or written.
    PreemptedError: after SIGTERM, when the state is saved.
  """
  intervention = intervention or Intervention()
  clip = grad_clip if intervention.grad_clip is None else intervention.grad_clip
  optimizer = make_optimizer(schedule, weight_decay=weight_decay, grad_clip=clip, transform=intervention.transform)
  options = {"compute_dtype": compute_dtype, "accumulation": accumulation, "remat": remat, "attention": attention,
             "mesh": mesh}
  measuring = {name: value for name, value in options.items() if name != "remat"}  # it has no backward pass
  stopping = held_out and EarlyStopping(config, held_out, batches.epoch_ends, additions=additions, **measuring)
  saved = checkpoints and checkpoints.latest()
  if saved:
    start, first_loss = saved["step"], saved["first_loss"]
    state = _saved_state(checkpoints, saved, abstract_state(config, optimizer, mesh, additions=additions), load_frozen,
                         stopping)
  else:
    start, first_loss = 0, None
    state = _first_state(config, load_params(), batches, optimizer, intervention, additions, load_frozen, options,
                         label)
  train_step = make_train_step(config, optimizer, additions=additions, **options)
  inputs = Input(batches, mesh, saved and saved["input"])
  meter = throughput.Meter(config, batches, mesh.size)
  learning_rates = np.asarray(jax.vmap(schedule)(jnp.arange(len(batches))))
  done, last_loss = start, saved["last_loss"] if saved else None
  speed: dict[str, float] = {}
  pending: list[tuple[dict[str, Any], dict[str, jax.Array]]] = []

  def save(done: int, position: dict[str, Any]) -> None:
    about = {"held_out": list(stopping.losses)} if stopping else {}
    checkpoints.save(done, _kept(state, stopping), input=position, first_loss=first_loss, last_loss=last_loss, **about)

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
      ends = bool(stopping) and stopping.due(done)
      waits = due or last or ends or len(pending) == log_every
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
            save(i, pending[i - done][0])
            checkpoints.wait()
          kept = checkpoints and checkpoints.step and checkpoints.folder
          raise UserError(_not_finite(label, i, value, batches, kept, lines))
        last_loss = float(value["loss"])
        first_loss = last_loss if first_loss is None else first_loss
        report(i, loss=last_loss, grad_norm=float(value["grad_norm"]), tokens=float(value["tokens"]),
               learning_rate=float(learning_rates[i]), **speed,
               **{name: float(value[name]) for name in ("kl", "l2_sp") if name in value})
      bar.set_postfix(loss=f"{last_loss:.3f}", tokens_per_s=f"{speed.get('tokens_per_s', 0):.0f}", refresh=False)
      bar.update(len(pending))
      pending = []
      if ends:
        report(step, held_out_loss=stopping.measure(state))
        if stopping.over and not last:
          if profile:
            profile.after(step, metrics, last=True)
          break
        meter.start()
      if due or stop:
        save(done, inputs.state)
      if stop:
        checkpoints.wait()
        raise PreemptedError(f"{label}: told to stop, after step {done} of {len(batches)}; its state is saved, and the "
                             "same command goes on from it")
  best = stopping.best if stopping else state
  return Trained(best["params"], first_loss, last_loss, done, best.get("average"),
                 tuple(stopping.losses) if stopping else ())


def _first_state(config: ModelConfig, params: Params, batches: PackedBatches, optimizer: optax.GradientTransformation,
                 intervention: Intervention, additions: Additions, load_frozen: Callable[[], Frozen],
                 options: dict[str, Any], label: str) -> TrainState:
  first = lambda: init_state(params, optimizer, options["mesh"], additions=additions, frozen=load_frozen())
  if intervention.top_p is None:
    return first()
  # Before there are moments: the gradient takes their memory.
  grads = importance.gradient(config, params, batches.one_epoch(), label=f"{label}: importance", **options)
  mask = interventions.important(params, grads, intervention.top_p)
  del grads
  return interventions.set_mask(first(), mask)


def _saved_state(checkpoints: Checkpoints, saved: dict[str, Any], like: TrainState, load_frozen: Callable[[], Frozen],
                 stopping: EarlyStopping | None) -> TrainState:
  """The state that was saved, with what is not; `stopping` goes on from there, too."""
  wanted = _kept(like, None)
  if stopping and saved["held_out"]:
    wanted["best"] = {name: like[name] for name in KEPT if name in like}
  state = checkpoints.restore(saved["step"], wanted)
  if stopping:
    stopping.losses, stopping.best = saved["held_out"], state.pop("best", None)
  frozen = {"frozen": jax.tree.map(own, dict(load_frozen()))} if "frozen" in like else {}
  return like | state | frozen | {"halted": not_halted(next(iter(jax.tree.leaves(like))).sharding.mesh)}


def _kept(state: TrainState, stopping: EarlyStopping | None) -> TrainState:
  """What is saved of a state; whether it was halted is not, nor is what is frozen."""
  kept = {name: state[name] for name in ("params", "opt_state", "average") if name in state}
  return kept | ({"best": stopping.best} if stopping and stopping.best else {})


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
