"""The run directory: locks it, runs the stages that are not done, and records what they wrote."""

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from etils import epath

from imm_jax import files, integrity
from imm_jax.errors import UserError, join_items
from imm_jax.runs import record as run_record, runlog
from imm_jax.runs.run import RUNTIME_KEYS, Stage, list_unused_keys
from imm_jax.runtime import distributed, resident_memory
from imm_jax.training import states

# Recorded facts on which the bits of a stage depend.
_BITS_DEPEND_ON = ("versions", "devices", "threads")
_LOCK_ATTEMPTS = 10  # one every 0.05 s


class RunDir:
  """Holds a run directory open, so that no other process can open it; use as a context manager."""

  def __init__(self, path: str | Path, config: ml_collections.ConfigDict):
    """Opens the directory, or creates it.

    Raises:
      UserError: when it cannot be written, or another process has it open.
    """
    self.path = Path(path)
    self._config, self._begun = config, False
    self._record: dict[str, Any] = {"stages": {}}
    self._lock = None
    if distributed.is_main():
      check_workdir(path)
      self._open(path)

  def _open(self, path: str | Path) -> None:
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self._lock = (self.path / ".lock").open("w")  # __exit__ closes it
      self._acquire_lock()
    except BlockingIOError as e:
      raise UserError(f"{self.path}: another process is running in it; wait for it or use another --workdir") from e
    except OSError as e:
      raise UserError(f"{self.path}: the run directory cannot be written ({e.strerror}); use another --workdir") from e
    try:
      check_workdir(path)  # again, because another process may have changed it before the lock was acquired
      self._record = run_record.read(self.path)
    except BaseException:
      self._lock.close()
      raise

  def _acquire_lock(self) -> None:
    """Acquires the lock; tries again because `status.is_running`, as in reports, holds it for a moment."""
    for attempts_left in reversed(range(_LOCK_ATTEMPTS)):
      try:
        return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        if not attempts_left:
          raise
        time.sleep(0.05)

  def __enter__(self) -> "RunDir":
    return self

  def __exit__(self, *_: object) -> None:
    if self._lock:
      try:
        if self._begun:
          integrity.seal(self.path, *integrity.GROWING, "profile", "status.json", "wandb.json")
      except (OSError, UserError) as e:  # such as a full disk; it must not hide the error that ended the run
        print(f"warning: {self.path / integrity.MANIFEST} was not written ({e})", file=sys.stderr)
      finally:
        self._lock.close()

  @property
  def facts(self) -> dict[str, dict[str, Any]]:
    """Returns the facts that each finished stage recorded, by stage name."""
    return {name: entry["facts"] for name, entry in self._record["stages"].items()}

  def begin(self, stages: Sequence[Stage], external: Mapping[str, str], *, rerun: bool) -> None:
    """Writes the config and prints how it differs from that of an earlier start; call it before the first stage.

    Args:
      stages: all stages of the run.
      external: digests of the inputs that no stage writes, by name.
      rerun: whether the output of finished costly stages, and states of a training that is half done, may be discarded.

    Raises:
      UserError: when any of that would be discarded, and `rerun` does not allow it.
    """
    if not distributed.is_main():
      return
    run_record.accept_former_settings(self._record, stages)
    consequences = find_consequences(self.path, self._config, self._record, stages, external)
    if consequences.refusal and not rerun:
      raise UserError(consequences.refusal)
    for name in consequences.dropped:
      del self._record["stages"][name]
    settings = {stage.name: run_record.digest_settings(stage.settings) for stage in stages}
    # Before the record of the change, so that a start that is killed in between finds what is left of them again.
    for folder in consequences.half_trained.values():
      states.remove(folder)
    self._record |= {"external": dict(external), "settings": settings,
                     "outdated": run_record.list_stale(stages, self._record, self.path, external)}
    self._save_record()
    self._begun = True
    integrity.seal(self.path, "run.json", create=True)
    integrity.forget(self.path, "status.json")  # which is written all the time; __exit__ records its digest
    with integrity.rewritten(self.path, "config.json"):
      files.write_json(self.path / "config.json", _to_json(self._config), sort_keys=True)
    for line in consequences.notes:
      print(f"note: {line}", file=sys.stderr)

  def run(self, stage: Stage, external: Mapping[str, str], *, on_host: bool = False) -> bool:
    """Runs a stage unless it is done.

    Args:
      stage: the stage.
      external: digests of the inputs that no stage writes, by name.
      on_host: whether the stage computes in this process's memory, whose peak is then recorded.

    Returns:
      Whether it ran.
    """
    reason = run_record.stale_reason(stage, self._record, self.path, external) if distributed.is_main() else None
    inputs = run_record.collect_inputs(stage, self._record, external) if distributed.is_main() else {}
    is_stale, inputs = distributed.broadcast([reason is not None, inputs])
    if not is_stale:
      if stage.scratch and distributed.is_main():  # left by a start that was killed before it removed the folder
        epath.Path(stage.scratch).rmtree(missing_ok=True)
      self._mark_current(stage.name)
      return False
    target = self.path / stage.name
    if distributed.is_main():
      print(f"{stage.name}: {reason}", flush=True)
      # Should this process be killed from here on, the old output must not count as done.
      if self._record["stages"].pop(stage.name, None):
        self._mark_current(stage.name)
        self._save_record()
      started, has_peak = time.time(), on_host and resident_memory.reset_peak()
      with files.write_atomically(target) as out:
        facts = stage.make(out, inputs)
      memory = {"memory_gib": round(resident_memory.read_peak(), 3)} if has_peak else {}
      digests = files.digest_files(target)
      self._record["stages"][stage.name] = {
          "inputs": inputs, "output": files.combine_digests(digests), "files": digests,
          "bytes": files.count_bytes(target), "facts": facts, "seconds": round(time.time() - started, 2), **memory,
          **({"costly": True} if stage.costly else {})}
      self._save_record()
      integrity.seal(self.path, *integrity.GROWING, "profile", "wandb.json")
      runlog.log_line(f"{stage.name}: done in {self._record['stages'][stage.name]['seconds']} s")
      if text := stage.summarize(facts):
        print(f"{stage.name}: {text}", flush=True)
      if stage.scratch:
        epath.Path(stage.scratch).rmtree(missing_ok=True)
    elif stage.everywhere:
      stage.make(target, inputs)
    resident_memory.release_freed()
    distributed.barrier(stage.name)
    return True

  def _mark_current(self, name: str) -> None:
    """Takes a stage out of the list of those whose output is of other settings or inputs than the run's last start."""
    if name in self._record.get("outdated", ()):
      self._record["outdated"].remove(name)
      self._save_record()

  def record_facts(self, **values: Any) -> None:
    """Sets facts about the whole run; warns if an earlier start had others on which the bits of stages depend.

    They are written with the record, by `begin` or after the next stage: a start that is refused writes nothing.
    """
    if not distributed.is_main():
      return
    for name, value in values.items():
      before = self._record.get(name, value)
      if before != value and name in _BITS_DEPEND_ON:
        print(f"warning: {name} was {before} and is {value} now; the bits of new stages may differ", file=sys.stderr)
    self._record.update(values)

  def _save_record(self) -> None:
    with integrity.rewritten(self.path, "run.json"):
      files.write_json(self.path / "run.json", self._record, sort_keys=True)


def check_workdir(path: str | Path) -> None:
  """Checks that a run can use the directory; changes nothing.

  Raises:
    UserError: when it is no folder, cannot be written, or holds something else than a run.
  """
  root = Path(path)
  if not str(path) or "://" in str(path):
    raise UserError(f"--workdir={path}: expected a folder on this machine's file systems")
  try:
    if root.exists() and not root.is_dir():
      raise UserError(f"--workdir={path}: is a file; expected a folder, or a name for a new one")
    existing = files.find_existing_parent(root)
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
      raise UserError(f"{root}: the run directory cannot be written ({existing} refuses); use another --workdir")
    names = {p.name for p in root.iterdir()} if root.exists() else set()
  except OSError as e:
    raise UserError(f"{root}: the run directory cannot be read ({e.strerror}); use another --workdir") from e
  if "config.json" in names:
    files.read_json(root / "config.json")
  elif "run.json" in names:
    raise UserError(f"{root / 'config.json'}: missing, so the config of the run in it is unknown; use another "
                    "--workdir")
  elif names - {".lock", ".config.json.part"}:
    raise UserError(f"{root}: is not empty and no run directory (it has no config.json); use another --workdir")


class Consequences(NamedTuple):
  """Holds what a start of a run with another config, or with other inputs, brings about.

  Attributes:
    notes: lines about it for the user.
    dropped: finished stages that are no longer a part of the run.
    half_trained: folders of training states that it cannot go on from, by their names for the user.
    refusal: why it is refused without `--rerun`; empty if it is not.
  """

  notes: list[str]
  dropped: list[str]
  half_trained: dict[str, str]
  refusal: str


def find_consequences(root: Path, config: ml_collections.ConfigDict, record: Mapping[str, Any],
                      stages: Sequence[Stage], external: Mapping[str, str]) -> Consequences:
  """Finds what a start brings about; see `RunDir.begin` for the arguments."""
  changed = list_changes(root, config)
  notes = [f"{line}, for the stages that are still to run" for key, line in changed if _is_runtime_key(key)]
  causes = [line for key, line in changed if not _is_runtime_key(key)]
  # An input that was replaced under the same name discards work just as a changed config does.
  origin, restored = ("another config", "the values") if causes else ("other inputs", "what")
  causes = causes or [f"{name} is not what it was" for name in run_record.list_replaced(record, external)]
  # With the same config, other settings come from another version of the package, or from the code of the user's own
  # merging method. Records of older versions lack these digests, so that there is nothing to compare with.
  known = record.get("settings", {})
  if not causes and any(known.get(stage.name, now := run_record.digest_settings(stage.settings)) != now
                        for stage in stages):
    origin, restored = "other code", "the code"
    causes = ["imm_jax, or the file of an own merging method, was another version"]
  lost_states = _list_lost_states(stages, record, root, external)
  if lost_states and not causes:
    origin, restored, causes = "other settings or inputs", "what", ["those of what is half trained"]
  if not causes:
    return Consequences(notes, [], {}, "")
  stale = run_record.list_stale(stages, record, root, external)
  dropped = sorted(record["stages"].keys() - {stage.name for stage in stages})
  lost = [stage.name for stage in stages if stage.costly and stage.name in stale]
  lost += [name for name in dropped if record["stages"][name].get("costly")]
  verb = "run finished work again" if set(lost) & set(stale) else "drop finished work from the run"
  effects = [f"{verb}: {join_items(lost)}"] * bool(lost)
  effects += [f"lose what is half trained: {join_items(list(lost_states))}"] * bool(lost_states)
  hint, weight = "", config.merge.base_weight
  if weight != "auto" and [key for key, _ in changed if not _is_runtime_key(key)] == ["merge.base_weight"]:
    hint = f", or --config.merge.sweep=\"({weight},)\" with the weight of before to evaluate this one, too"
  refusal = (f"{root}: made with {origin} ({'; '.join(causes)}), which would {', and '.join(effects)}; give --rerun to "
             "allow that (in a copy of the folder, if both shall stay), or use another --workdir, or "
             f"{restored} it was made with{hint}") if effects else ""
  notes += [f"removed, since it was half trained with others: {join_items(list(lost_states))}"] * bool(lost_states)
  effect = f"{join_items(stale)} will be run again" if stale else "nothing is run again for it"
  notes += [f"{'; '.join(causes)}: {effect}"]
  notes += [f"no longer a part of the run: {join_items(dropped)}"] * bool(dropped)
  return Consequences(notes, dropped, lost_states, refusal)


def _list_lost_states(stages: Sequence[Stage], record: Mapping[str, Any], root: Path, external: Mapping[str, str],
                      ) -> dict[str, str]:
  """Lists the training states that were begun with other settings or inputs, or whose inputs will be made anew.

  Returns the folder of each, by a name for the user.
  """
  changed, lost = {*run_record.list_replaced(record, external)}, {}
  for stage in stages:
    inputs, entry = run_record.collect_inputs(stage, record, external), record["stages"].get(stage.name)
    known = entry["inputs"] if entry else {"settings": record.get("settings", {}).get(stage.name)}
    if changed.intersection(stage.needs) or _differ(known, inputs):
      changed.add(stage.name)
    saved = states.find_saved(stage.scratch) if stage.scratch else None
    if saved and (stage.name in changed or _differ(saved.identity, inputs)):
      folder = stage.scratch.removeprefix(f"{root}/")
      lost[f"{folder} (step {saved.step} of {stage.name})"] = stage.scratch
  return lost


def _differ(known: Mapping[str, str | None], inputs: Mapping[str, str | None]) -> bool:
  """Returns whether an input is known to be another; what is not known (None) may still turn out the same."""
  return any(None not in (value, inputs.get(name)) and inputs[name] != value for name, value in known.items())


def list_changes(root: Path, config: ml_collections.ConfigDict) -> list[tuple[str, str]]:
  """Lists how a config differs from that of an earlier start: (key, a line for the user) for each changed key.

  More rounds than before are not listed, since they only continue the run.
  """
  if not (root / "config.json").exists():
    return []
  differences = _differences(files.read_json(root / "config.json"), _to_json(config))
  unused = list_unused_keys(config)  # may be keys that did not exist when the run was started
  return [(key, f"config.{key} was {old!r} and is {new!r} now") for key, old, new in differences
          if not (old is None and key in unused) and (key != "rounds" or not isinstance(old, int) or new < old)]


def _differences(old: dict, new: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
  for key in sorted(old.keys() | new.keys()):
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      yield from _differences(a, b, f"{prefix}{key}.")
    elif a != b:
      yield f"{prefix}{key}", a, b


def _is_runtime_key(key: str) -> bool:
  return any(key == runtime_key or key.startswith(f"{runtime_key}.") for runtime_key in RUNTIME_KEYS)


def _to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns a config as JSON would read it back, with lists for tuples."""
  return json.loads(json.dumps(config.to_dict()))
