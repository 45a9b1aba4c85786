"""Training state on disk: parameters, moments, step and input position, written in the background by orbax.

    FOLDER/<step>/state/   float32 parameters, moments and optax's counters, in shards of each host
    FOLDER/<step>/about/   JSON: the input position, the identity of model, data and settings, and the first loss

A step's folder appears atomically. It can be restored onto any mesh and any number of processes.
"""

import json
import logging as std_logging
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from imm_jax import files, integrity
from imm_jax.errors import ResourceError, UserError
from imm_jax.runtime import distributed

# Errors that a disk, a bucket or tensorstore raises when a write fails.
_WRITE_ERRORS = (OSError, ValueError, RuntimeError, ImportError)  # ImportError: the bucket's client is not installed
_POLL_S = 0.2
# Matches states, their digests, states that are being written, and orbax's own files.
_OWN_FILES = re.compile(r"\d+(\..*)?|.*orbax.*|_\w+|\.\w+")


def check_folder(folder: str) -> None:
  """Creates a folder (or bucket path) for training states and checks that it is writable.

  Raises:
    UserError: when it cannot be created or written to.
  """
  try:
    path = epath.Path(os.path.expanduser(folder))
    path.mkdir(parents=True, exist_ok=True)
    probe = path / f".writable-{os.getpid()}"
    probe.write_text("")
    probe.unlink()
  except (*_WRITE_ERRORS, KeyError) as e:  # KeyError: an unknown URL scheme
    raise _unwritable(folder, e) from e


class Saved(NamedTuple):
  """Holds what a folder's newest state says of itself: its step and its identity, empty if that cannot be read."""

  step: int
  identity: dict[str, Any]


def find_saved(folder: str) -> Saved | None:
  """Finds the newest state in a folder, or a bucket's path; returns None if there is none."""
  path = epath.Path(folder)
  children = path.iterdir() if path.is_dir() else ()
  steps = [int(child.name) for child in children if child.name.isdecimal() and (child / "about").is_dir()]
  if not steps:
    return None
  try:
    identity = json.loads((path / str(max(steps)) / "about" / "metadata").read_text())["identity"]
  except (*_WRITE_ERRORS, KeyError, TypeError):  # Checkpoints.latest will say what is wrong with it
    identity = {}
  return Saved(max(steps), identity if isinstance(identity, dict) else {})


def remove(folder: str) -> None:
  """Removes a folder of states.

  Raises:
    UserError: when it holds something else as well.
  """
  path = epath.Path(folder)
  _check_foreign(folder, path)
  path.rmtree()


def _check_foreign(folder: str | Path, path: epath.Path) -> None:
  if foreign := sorted(child.name for child in path.iterdir() if not _OWN_FILES.fullmatch(child.name)):
    raise UserError(f"{folder}: holds {foreign[0]}, which is no training state; keep states elsewhere "
                    "(config.sft.state_dir)")


class Checkpoints:
  """Saves and restores the states of one fine-tuning; as a context manager it waits for pending writes on exit."""

  def __init__(self, folder: str | Path, *, save_interval: int, max_to_keep: int, identity: dict[str, Any]):
    """Opens the folder, or creates it.

    Args:
      folder: a folder, or a bucket's path (`gs://...`).
      save_interval: steps between saves.
      max_to_keep: number of states to keep; older ones are removed.
      identity: JSON that identifies the model, data and settings; states with another identity are refused.

    Raises:
      UserError: when the folder cannot be written, or holds files that are no training states.
    """
    self.folder = epath.Path(folder)
    self.save_interval = save_interval
    self._identity = identity
    self._closed, self._sealing = threading.Event(), threading.Lock()
    options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, cleanup_tmp_directories=True)
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      _check_foreign(folder, self.folder)  # the whole folder is removed when training is done
      self._manager = ocp.CheckpointManager(
          self.folder if "://" in str(folder) else Path(folder).absolute(), options=options,
          item_handlers={"state": ocp.StandardCheckpointHandler(), "about": ocp.JsonCheckpointHandler()})
    except _WRITE_ERRORS as e:
      raise _unwritable(folder, e) from e

  @property
  def step(self) -> int:
    """Returns the step of the newest state; 0 if there is none."""
    return self._manager.latest_step() or 0

  def latest(self) -> dict[str, Any] | None:
    """Returns the metadata of the newest state (`step`, `input`, `first_loss`), or None if there is no state.

    Raises:
      UserError: when the state is damaged, or belongs to another model, other data or other settings.
    """
    step = distributed.broadcast(self._manager.latest_step())  # it may become visible later on some hosts
    if step is None:
      return None
    self._check_seal(step)
    about = self._read(step, "about", ocp.args.JsonRestore())
    if about.get("step") != step or about.get("input", {}).get("next_index") != step:
      raise self._unreadable(step, f"about: step {about.get('step')}, input {about.get('input')}")
    stored = about.get("identity", {})
    keys = sorted(key for key in stored.keys() | self._identity.keys() if stored.get(key) != self._identity.get(key))
    if keys:
      raise UserError(f"{self.folder}: holds the training state of something else ({', '.join(keys)} differ); remove "
                      "it to begin this training from its first step, or keep states elsewhere (config.sft.state_dir)")
    return about

  def restore(self, step: int, like: Any) -> Any:
    """Restores the state of a step with the shapes, dtypes and shardings of the ShapeDtypeStructs in `like`.

    Raises:
      UserError: when it is damaged, or belongs to another model or version.
    """
    # Shapes are compared before anything is read: an aborted restore leaves threads and coroutines behind.
    shapes = lambda tree: sorted(tuple(leaf.shape) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape"))
    try:
      stored = shapes(self._manager.item_metadata(step)["state"])
    except Exception as e:  # orbax may raise anything for a damaged state
      raise self._unreadable(step, _describe(e)) from e
    if len(stored) != len(shapes(like)):
      raise UserError(f"{self.folder / str(step)}: this training state cannot be read (another version of imm_jax has "
                      f"written it); remove {self.folder} to start this training over")
    if stored != shapes(like):
      raise self._unreadable(step, "its tensors have other shapes than this model's")
    return self._read(step, "state", ocp.args.StandardRestore(like))

  def due(self, step: int) -> bool:
    """Returns whether the state after `step` steps is to be saved."""
    return step % self.save_interval == 0

  def save(self, step: int, state: Any, **about: Any) -> None:
    """Saves the state after `step` steps in the background; does nothing if that step is already saved.

    Raises:
      UserError: when this save or the previous one fails; older states are kept. ResourceError for want of space, or
        in a bucket.
    """
    if step == self._manager.latest_step():
      return
    items = ocp.args.Composite(state=ocp.args.StandardSave(state),
                               about=ocp.args.JsonSave({"step": step, "identity": self._identity, **about}))
    self._run_write(lambda: self._manager.save(step, args=items, force=True))
    if distributed.is_main() and "://" not in str(self.folder):
      threading.Thread(target=self._seal_when_written, args=(step,), daemon=True).start()

  def _seal_when_written(self, step: int) -> None:
    """Waits in the background until a state has been written, then records its digests."""
    state = Path(self.folder) / str(step)
    while not state.exists():
      if self._closed.wait(_POLL_S):
        return
    self._seal(state)

  def _seal(self, state: Path) -> None:
    seal = state.with_name(state.name + integrity.SEAL)
    with self._sealing:
      try:
        if not seal.exists():
          integrity.write_digests(seal, state.parent, files.list_files(state))
        for other in state.parent.glob(f"*{integrity.SEAL}"):
          if not other.with_name(other.name.removesuffix(integrity.SEAL)).exists():
            other.unlink(missing_ok=True)
      except (OSError, UserError) as e:
        if state.exists():  # else it was removed in favor of a newer one
          print(f"warning: {state}: its digests were not written ({e})", file=sys.stderr)

  def _check_seal(self, step: int) -> None:
    """Raises UserError if a state differs from its digests; accepts one without digests (its writer was killed)."""
    seal, wrong = Path(self.folder) / f"{step}{integrity.SEAL}", []
    if distributed.is_main() and "://" not in str(self.folder) and seal.exists():
      wrong = integrity.list_differing(seal, seal.parent)
    wrong = distributed.broadcast(wrong)
    if wrong:
      raise self._unreadable(step, f"{wrong[0]} differs from what was written")

  def wait(self) -> None:
    """Blocks until all writes are finished; raises as `save` does."""
    self._run_write(self._manager.wait_until_finished)
    self._run_write(self._manager.check_for_errors)
    if distributed.is_main() and "://" not in str(self.folder):
      for step in self._manager.all_steps():
        self._seal(Path(self.folder) / str(step))

  def __enter__(self) -> "Checkpoints":
    self._hook = ignore_closed_loops()
    logging.get_absl_logger().addFilter(_no_traceback)
    # This filter stays: orphaned tasks are garbage-collected at an arbitrary later time.
    std_logging.getLogger("asyncio").addFilter(_no_orphan)
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    self._closed.set()
    try:
      self._manager.close()
    except _WRITE_ERRORS as e:
      # Only a warning: after an error that error matters more, and after a finished training no state is needed.
      if kind is None and jax.process_index() == 0:
        print(f"warning: {self.folder}: the last training state was not written ({_describe(e)})", file=sys.stderr)
    finally:
      sys.unraisablehook = self._hook
      logging.get_absl_logger().removeFilter(_no_traceback)

  def _run_write(self, work: Any) -> None:
    try:
      work()
    except _WRITE_ERRORS as e:
      lacks = files.is_disk_full(_get_errno(e)) or ("://" in str(self.folder) and not isinstance(e, ImportError))
      kind, advice = (ResourceError, "make room") if lacks else (UserError, "make it writable")
      raise kind(f"{self.folder}: the training state cannot be written ({_describe(e)}); the last one that was written "
                 f"is kept; {advice}, then give the same command again") from e

  def _read(self, step: int, item: str, args: Any) -> Any:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
    except Exception as e:  # see restore
      raise self._unreadable(step, _describe(e)) from e

  def _unreadable(self, step: int, cause: str) -> UserError:
    return UserError(f"{self.folder / str(step)}: this training state cannot be read ({cause}); remove that folder to "
                     "resume from the previous state, or to start over")


def ignore_closed_loops() -> Callable[[Any], Any]:
  """Silences "Event loop is closed" from tensorstore's threads; returns the previous `sys.unraisablehook`.

  After a failed read or write, which raises anyway, these threads call back into an event loop that orbax has closed.
  """
  previous_hook = sys.unraisablehook

  def hook(event: Any) -> None:
    if "Event loop is closed" not in str(event.exc_value):
      previous_hook(event)

  sys.unraisablehook = hook
  return previous_hook


def _no_orphan(record: Any) -> bool:
  """Filters out asyncio's complaints about orbax's other writes after one has failed and raised."""
  return not ("never retrieved" in record.getMessage() and "orbax" in record.getMessage())


def _unwritable(folder: str | Path, error: BaseException) -> UserError:
  return UserError(f"{folder}: training states cannot be written there ({_describe(error)})")


def _no_traceback(record: Any) -> bool:
  """Filters out the tracebacks that orbax's threads log for errors that are raised as well."""
  return not (record.exc_info and "orbax" in record.pathname)


def _get_errno(error: BaseException) -> int | None:
  """Returns the system's number of an error of orbax, tensorstore or the system; None if it has none."""
  system = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore puts it at the end of a long line
  return int(system[1]) if system else error.errno if isinstance(error, OSError) else None


def _describe(error: BaseException) -> str:
  """Returns one line that says why orbax, tensorstore or the system failed."""
  if code := _get_errno(error):
    return os.strerror(code)
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return (lines or [type(error).__name__])[0][:200]
