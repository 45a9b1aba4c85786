"""Reports of a training: the metrics and the speed of its steps, and the first step that is not finite."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from imm_jax.methods import ANCHORS
from imm_jax.runtime import distributed, progress
from imm_jax.training.packing import PackedBatches
from imm_jax.training.throughput import Meter, Profile

# Called for every step in order with its number and its metrics, floats by name; and once more with `held_out_loss` for
# the last step of an epoch.
Report = Callable[..., None]
# Number of examples that an error message lists.
_MAX_LISTED = 8


class Reporting(NamedTuple):
  """Holds what a training reports, and how often.

  Attributes:
    report: receives the metrics of each step.
    label: text of the progress bar, and of errors.
    log_every: steps between reports; the host waits for the device only then, and to save.
    lines: line of each example in its file, from 1, for error messages; by default 1, 2, 3, ...
    profile: profiles some of the steps.
  """

  report: Report
  label: str
  log_every: int
  lines: Sequence[int] | None = None
  profile: Profile | None = None


class NotFinite(NamedTuple):
  """Holds a step whose loss or gradient is not finite: its number, its metrics, and the input's position before it."""

  step: int
  metrics: dict[str, Any]
  position: dict[str, Any]


class StepLog:
  """Reads the metrics of steps from the device, several at a time, and reports them; a context that shows a bar.

  Attributes:
    start: number of steps that were done before the training resumed.
    done: number of steps that are done, these included.
    total: number of steps of the whole training.
    first_loss: loss of its first step, or None before that was read.
    last_loss: loss of the last step that was read, or None.
    meter: measures the speed.
    profile: profiles some of the steps, or none.
  """

  def __init__(self, reporting: Reporting, batches: PackedBatches, learning_rates: np.ndarray, meter: Meter,
               saved: dict[str, Any] | None):
    """Begins before the first step, or after those of a saved state, whose metadata are `saved`."""
    self._reporting, self._batches, self._learning_rates = reporting, batches, learning_rates
    self.start = self.done = saved["step"] if saved else 0
    self.total, self.meter, self.profile = len(batches), meter, reporting.profile or Profile("", Path())
    self.first_loss: float | None = saved["first_loss"] if saved else None
    self.last_loss: float | None = saved["last_loss"] if saved else None
    self._pending: list[tuple[dict[str, Any], dict[str, jax.Array]]] = []
    self._speed: dict[str, float] = {}

  def __enter__(self) -> Self:
    if self.start and distributed.is_main():
      print(f"{self._reporting.label}: resumes after step {self.start} of {self.total}, from a saved state", flush=True)
    self._bar = progress.make_bar(self.total, self._reporting.label, "step", initial=self.start)
    return self

  def __exit__(self, *_: object) -> None:
    self._bar.close()

  @property
  def full(self) -> bool:
    """Returns whether `log_every` steps have been added since the last report."""
    return len(self._pending) == self._reporting.log_every

  def add(self, metrics: dict[str, jax.Array], position: dict[str, Any]) -> None:
    """Adds the metrics of the next step, before which the input had this position; waits only for the first step."""
    self._pending.append((position, metrics))
    self.done += 1
    if self.done == self.start + 1:
      jax.block_until_ready(metrics)
      self.meter.start()  # the first step compiled, and is not timed

  def report_steps(self) -> NotFinite | None:
    """Reports the steps added since the last report, up to the first that is not finite, which is returned."""
    first = self.done - len(self._pending)
    values = jax.device_get([metrics for _, metrics in self._pending])
    timed = len(values) - (first == self.start)
    self._speed = self.meter.read(timed) if timed else self._speed
    for step, metrics in enumerate(values, first):
      if not np.isfinite([metrics["loss"], metrics["grad_norm"]]).all():
        return NotFinite(step, metrics, self._pending[step - first][0])
      self._report_step(step, metrics)
    self._bar.set_postfix(loss=f"{self.last_loss:.3f}", tokens_per_s=f"{self._speed.get('tokens_per_s', 0):.0f}",
                          refresh=False)
    self._bar.update(len(values))
    self._pending = []
    return None

  def _report_step(self, step: int, metrics: dict[str, Any]) -> None:
    self.last_loss = float(metrics["loss"])
    self.first_loss = self.last_loss if self.first_loss is None else self.first_loss
    self._reporting.report(
        step, loss=self.last_loss, grad_norm=float(metrics["grad_norm"]), tokens=float(metrics["tokens"]),
        learning_rate=float(self._learning_rates[step]), **self._speed,
        **{name: float(metrics[name]) for name in ANCHORS if name in metrics})

  def report_held_out(self, loss: float) -> None:
    """Reports the held-out loss after the last step; the time since that step's report does not count."""
    self._reporting.report(self.done - 1, held_out_loss=loss)
    self.meter.start()

  def explain(self, failure: NotFinite, folder: Any) -> str:
    """Returns the error message for a step that is not finite; `folder` keeps the state before it, if not None."""
    step, metrics, lines = failure.step, failure.metrics, self._reporting.lines
    members = [lines[i] if lines else i + 1 for i in self._batches.members(step)]
    more = f" and {len(members) - _MAX_LISTED} more" if len(members) > _MAX_LISTED else ""
    where = ", ".join(map(str, members[:_MAX_LISTED])) + more
    advice = ("lower the learning rate or raise warmup_ratio, in a new --workdir" if step else
              "look for weights of the model that are not finite")
    kept = f"; the state before that step is kept in {folder}" if folder else ""
    return (f"{self._reporting.label}: the loss is {metrics['loss']} at step {step} (gradient norm "
            f"{metrics['grad_norm']}), on lines {where} of train.jsonl; {advice}{kept}")

  def explain_stop(self) -> str:
    """Returns the error message after a SIGTERM."""
    return (f"{self._reporting.label}: terminated by SIGTERM after step {self.done} of {self.total}; its state is "
            "saved; repeat the command to resume")
