"""Writes a run's metrics to `metrics.jsonl`, to TensorBoard and, if `tracking` is set, to Weights & Biases."""

import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import ml_collections

from imm_jax import files, integrity
from imm_jax.errors import UserError, first_line
from imm_jax.runtime import distributed

# The values of config.tracking.
TRACKING = ("", "wandb")
# The file that names the run of Weights & Biases that a run directory belongs to.
_WANDB = "wandb.json"


class Writer(Protocol):
  """Writes metrics to one destination."""

  def write(self, step: int, values: dict[str, float]) -> None:
    """Writes the values of one step."""

  def close(self) -> None:
    """Writes what is buffered and ends."""


class StageMetrics:
  """Writes the metrics of one stage; use as a context manager.

  A stage that is run again, as after a kill, replaces the steps from `from_step` on that its earlier attempt logged, so
  that each step stands in the file once. Only process 0 writes.
  """

  def __init__(self, root: Path, stage: str, *, from_step: int = 0, tracking: str = ""):
    """Opens the writers.

    Args:
      root: the run directory.
      stage: name of the stage.
      from_step: the first step that will be written.
      tracking: config.tracking.
    """
    self._writers: list[Writer] = []
    if distributed.is_main():
      self._writers = [_JsonlWriter(root, stage, from_step), _TensorBoardWriter(root, stage, from_step)]
      if tracking == "wandb":
        self._writers.append(_WandbWriter(root, stage))

  def write(self, step: int, **values: float) -> None:
    """Writes the values of one step, by name."""
    for writer in self._writers:
      writer.write(step, values)

  def __enter__(self) -> "StageMetrics":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    failed: list[BaseException] = []
    for writer in self._writers:
      try:
        writer.close()
      except BaseException as e:  # the other writers still have to be closed
        failed.append(e)
    if failed and kind is None:  # otherwise the block's own error is the first and is raised
      raise failed[0]
    for e in failed:
      print(f"warning: metrics were not written to the end ({first_line(e)})", file=sys.stderr)


class _JsonlWriter:
  """Writes metrics.jsonl."""

  def __init__(self, root: Path, stage: str, from_step: int):
    self._stage, path = stage, root / "metrics.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    kept = "".join(line + "\n" for line in text.splitlines() if _survives(line, stage, from_step))
    if kept != text:
      integrity.forget(root, path.name)
      files.write_text(path, kept)
    self._file = path.open("a", encoding="utf-8")

  def write(self, step: int, values: dict[str, float]) -> None:
    self._file.write(json.dumps({"stage": self._stage, "step": step, "time": round(time.time(), 3), **values}) + "\n")
    self._file.flush()

  def close(self) -> None:
    self._file.close()


class _TensorBoardWriter:
  """Writes TensorBoard's event files."""

  def __init__(self, root: Path, stage: str, from_step: int):
    folder = root / "tb" / stage.replace("/", "_")
    if not from_step:
      integrity.forget(root, f"tb/{folder.name}")
      files.remove(folder)
    from tensorboardX import SummaryWriter  # imported here because it imports torch if installed, which takes seconds

    self._writer = SummaryWriter(str(folder), purge_step=from_step or None)

  def write(self, step: int, values: dict[str, float]) -> None:
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    self._writer.close()


class _WandbWriter:
  """Resumes the run of Weights & Biases for one stage and writes `round_0/sft/loss` over `round_0/sft/step`.

  Errors are printed as warnings, because metrics are no reason to end a run that takes days.
  """

  def __init__(self, root: Path, stage: str):
    self._stage = stage
    self._run = self._try(lambda: _resume_wandb_run(_import_wandb(), root, {}))
    if self._run:
      self._try(lambda: self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step"))

  def write(self, step: int, values: dict[str, float]) -> None:
    if self._run:
      named = {f"{self._stage}/{name}": value for name, value in {"step": step, **values}.items()}
      self._try(lambda: self._run.log(named))

  def close(self) -> None:
    if self._run:
      self._try(self._run.finish)

  def _try(self, function: Callable[[], Any]) -> Any:
    try:
      return function()
    except Exception as e:  # errors of its own and of the network
      print(f"warning: {self._stage}: Weights & Biases does not take these metrics ({first_line(e)})", file=sys.stderr)
      return None


def check_tracking(config: ml_collections.ConfigDict) -> None:
  """Raises UserError if the package that config.tracking needs is not installed."""
  if config.tracking == "wandb":
    _import_wandb()


def start_tracking(config: ml_collections.ConfigDict, root: Path) -> None:
  """Registers the run and its config with the service that config.tracking names; process 0 does so before any stage.

  Raises:
    UserError: when the service refuses, for example without a login.
  """
  if config.tracking != "wandb" or not distributed.is_main():
    return
  try:
    run = _resume_wandb_run(_import_wandb(), root, config.to_dict())
    address = "" if os.environ.get("WANDB_MODE") == "offline" else run.url
    run.finish()
  except UserError:
    raise
  except Exception as e:
    raise UserError(f"config.tracking=wandb: Weights & Biases refuses ({first_line(e)}); run `wandb login`, or set "
                    "WANDB_MODE=offline and send it later with `wandb sync`") from e
  print(f"note: metrics go to Weights & Biases: {address or f'offline, in {root}/wandb'}", file=sys.stderr)


def _resume_wandb_run(wandb: ModuleType, root: Path, config: dict[str, Any]) -> Any:
  """Resumes, or at the first start creates, the run of Weights & Biases that belongs to this run directory."""
  path = root / _WANDB
  if not path.exists():
    files.write_json(path, {"id": uuid.uuid4().hex[:12], "name": root.resolve().name,
                            "project": os.environ.get("WANDB_PROJECT", "imm_jax")})
  identity = files.read_json(path)
  if wrong := [key for key in ("id", "name", "project") if not (isinstance(identity.get(key), str) and identity[key])]:
    raise UserError(f"{path}: {wrong[0]!r} is missing or no text; put it right, or remove the file to begin another "
                    "run of Weights & Biases")
  return wandb.init(id=identity["id"], name=identity["name"], project=identity["project"], resume="allow",
                    dir=str(root), config=config, settings=wandb.Settings(silent=True))


def _import_wandb() -> ModuleType:
  try:
    import wandb
  except ImportError as e:
    raise UserError("config.tracking=wandb: Weights & Biases is not installed; pip install -e '.[wandb]', or leave "
                    "config.tracking empty") from e
  return wandb


def _survives(line: str, stage: str, from_step: int) -> bool:
  """Returns whether a line of metrics.jsonl is of another stage, or of an earlier step of this one."""
  try:
    record = json.loads(line)
  except ValueError:  # a killed process may leave half a line
    return False
  return isinstance(record, dict) and (record.get("stage") != stage or record.get("step", from_step) < from_step)
