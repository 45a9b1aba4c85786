"""The run directory: the record of which stages are done.

`run.json` holds for every finished stage a digest of what it read (earlier stages, the base model, its settings) and of
what it wrote. A stage is skipped while that still fits, and otherwise run again, with the reason.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from etils import epath

from imm_jax import distributed, files, resident
from imm_jax.config import HOW, idle
from imm_jax.errors import UserError

# Keys of a config that may change between two starts of one run: they add stages and change none.
_MAY_GROW = ("rounds",)
_TRIES = 10  # at the lock, within half a second


@dataclasses.dataclass(frozen=True)
class Stage:
  """One step of a run.

  Attributes:
    name: the path it writes, relative to the run directory: a file, or a folder.
    needs: names of the stages whose output it reads, and names given to `RunDir.run` as external inputs.
    settings: what else its output depends on; anything that json can write.
    plan: what `--dry_run` says about it.
    make: writes the output to the path it is given and returns facts worth recording (counts, scores); it is also
      given the digests of what it reads.
    everywhere: whether all processes take part, or process 0 alone.
    scratch: a folder, or a bucket's path, that is removed when the stage is done.
  """

  name: str
  needs: tuple[str, ...]
  settings: Mapping[str, Any]
  plan: str
  make: Callable[[Path, Mapping[str, str | None]], dict[str, Any]]
  everywhere: bool = False
  scratch: str = ""


class RunDir:
  """An open run directory; use as a context manager, which also keeps a second process out."""

  def __init__(self, path: str | Path, config: ml_collections.ConfigDict):
    """Opens or creates the directory.

    Raises:
      UserError: when it cannot be written, belongs to another config, or another process runs in it.
    """
    self.path = Path(path)
    self._record: dict[str, Any] = {"stages": {}}
    self._lock = None
    if distributed.is_main():
      changed = check(path, config)
      self._open(path, config)
      for line in changed:
        print(f"note: {line}", file=sys.stderr)

  def _open(self, path: str | Path, config: ml_collections.ConfigDict) -> None:
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self._lock = (self.path / ".lock").open("w")  # closed by __exit__
      self._take()
    except BlockingIOError as e:
      raise UserError(f"{self.path}: another process is running in it; wait for it or use another --workdir") from e
    except OSError as e:
      raise UserError(f"{self.path}: the run directory cannot be written ({e.strerror}); use another --workdir") from e
    try:
      check(path, config)  # again: before the lock another process may have been at it
      files.write_text(self.path / "config.json", json.dumps(_plain(config), indent=1, sort_keys=True) + "\n")
      self._record = read_record(self.path)
    except BaseException:
      self._lock.close()
      raise

  def _take(self) -> None:
    """Takes the lock; who only asks whether somebody has it, as reports do, has it for a moment."""
    for left in reversed(range(_TRIES)):
      try:
        return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        if not left:
          raise
        time.sleep(0.05)

  def __enter__(self) -> "RunDir":
    return self

  def __exit__(self, *_: object) -> None:
    if self._lock:
      self._lock.close()

  @property
  def facts(self) -> dict[str, dict[str, Any]]:
    """What each finished stage recorded, by stage name."""
    return {name: entry["facts"] for name, entry in self._record["stages"].items()}

  def run(self, stage: Stage, external: Mapping[str, str], *, on_host: bool = False) -> bool:
    """Runs a stage unless it is done.

    Args:
      stage: what to do.
      external: digests of inputs that no stage wrote.
      on_host: whether what it computes lies in this process's memory, so that its peak is worth recording.

    Returns:
      Whether it ran.
    """
    reason = why(stage, self._record, self.path, external) if distributed.is_main() else None
    inputs = inputs_of(stage, self._record, external) if distributed.is_main() else {}
    wanted, inputs = distributed.from_main([reason is not None, inputs])
    if not wanted:
      if stage.scratch and distributed.is_main():  # of a start that was killed before it could remove it
        epath.Path(stage.scratch).rmtree(missing_ok=True)
      return False
    target = self.path / stage.name
    if distributed.is_main():
      print(f"{stage.name}: {reason}", flush=True)
      # From here the old output no longer counts, should this process be killed.
      if self._record["stages"].pop(stage.name, None):
        self._save_record()
      started, counts = time.time(), on_host and resident.start_peak()
      with files.committed(target) as out:
        facts = stage.make(out, inputs)
      memory = {"memory_gib": round(resident.peak(), 3)} if counts else {}
      self._record["stages"][stage.name] = {
          "inputs": inputs, "output": files.digest(target), "bytes": files.size_of(target), "facts": facts,
          "seconds": round(time.time() - started, 2), **memory}
      self._save_record()
      if stage.scratch:
        epath.Path(stage.scratch).rmtree(missing_ok=True)
    elif stage.everywhere:
      stage.make(target, inputs)
    resident.release()
    distributed.barrier(stage.name)
    return True

  def note(self, **values: Any) -> None:
    """Records facts about the run as a whole (versions, devices), and says what another start had otherwise."""
    if not distributed.is_main():
      return
    for name, value in values.items():
      before = self._record.get(name, value)
      if before != value:
        print(f"warning: {name} was {before} and is {value} now; the bits of new stages may differ", file=sys.stderr)
    self._record.update(values)
    self._save_record()

  def _save_record(self) -> None:
    files.write_text(self.path / "run.json", json.dumps(self._record, indent=1, sort_keys=True) + "\n")


def check(path: str | Path, config: ml_collections.ConfigDict) -> list[str]:
  """Checks that a run with this config can use the directory, and changes nothing.

  Returns:
    What differs from an earlier start, as it may.

  Raises:
    UserError: when it is no folder, cannot be written, holds something else, or belongs to another config (with every
      key that differs).
  """
  root = Path(path)
  if not str(path) or "://" in str(path):
    raise UserError(f"--workdir={path}: expected a folder on this machine's file systems")
  try:
    if root.exists() and not root.is_dir():
      raise UserError(f"--workdir={path}: is a file; expected a folder, or a name for a new one")
    existing = next(p for p in (root.absolute(), *root.absolute().parents) if p.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
      raise UserError(f"{root}: the run directory cannot be written ({existing} refuses); use another --workdir")
    held = {p.name for p in root.iterdir()} if root.exists() else set()
  except OSError as e:
    raise UserError(f"{root}: the run directory cannot be read ({e.strerror}); use another --workdir") from e
  how: list[str] = []
  if "config.json" in held:
    unused = idle(config)  # a key that is newer than the run is none of its config
    changed = [(key, old, new) for key, old, new in _differences(files.read_json(root / "config.json"), _plain(config))
               if not (old is None and key in unused)]
    how = [f"config.{key} was {old!r} and is {new!r} now" for key, old, new in changed if _only_how(key)]
    different = [f"{key} is {old} there, {new} here" for key, old, new in changed if not _only_how(key)
                 and (key not in _MAY_GROW or not isinstance(old, int) or new < old)]
    if different:
      raise UserError(f"{root}: made with another config ({'; '.join(different)}); use another --workdir, or "
                      "the values it was made with")
  elif "run.json" in held:
    raise UserError(f"{root / 'config.json'}: missing, so nobody can say whether this run has the same config; use "
                    "another --workdir")
  elif held - {".lock", ".config.json.part"}:
    raise UserError(f"{root}: is not empty and no run directory (it has no config.json); use another --workdir")
  return how


def why(stage: Stage, record: Mapping[str, Any], root: Path, external: Mapping[str, str]) -> str | None:
  """Why a stage must run, or None when it is done."""
  done = record["stages"].get(stage.name)
  if done is None:
    return "run"
  inputs = inputs_of(stage, record, external)
  changed = sorted(k for k in inputs.keys() | done["inputs"].keys() if inputs.get(k) != done["inputs"].get(k))
  if changed:
    return f"run again, because of a change in: {', '.join(changed)}"
  if not (root / stage.name).exists():
    return "run again, because its output is missing"
  if files.size_of(root / stage.name) != done["bytes"]:
    return "run again, because its output has another size than when it was written"
  return None


def inputs_of(stage: Stage, record: Mapping[str, Any], external: Mapping[str, str]) -> dict[str, str | None]:
  """Digests of everything a stage reads; None for a stage that is not done."""
  inputs = {need: external[need] if need in external else record["stages"].get(need, {}).get("output")
            for need in stage.needs}
  settings = json.dumps(stage.settings, sort_keys=True).encode()
  return {**inputs, "settings": hashlib.sha256(settings).hexdigest()[:16]}


def read_record(root: Path) -> dict[str, Any]:
  """run.json of a run directory, or an empty record."""
  path = root / "run.json"
  if not path.exists():
    return {"stages": {}}
  record = files.read_json(path)
  stages = record.get("stages")
  kinds = {"inputs": dict, "output": str, "bytes": int, "facts": dict}
  if not isinstance(stages, dict) or not all(
      isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
      for entry in stages.values()):
    raise UserError(f"{path}: damaged; remove it to run every stage again, or use another --workdir")
  return record


def _differences(old: dict, new: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
  for key in sorted(old.keys() | new.keys()):
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      yield from _differences(a, b, f"{prefix}{key}.")
    elif a != b:
      yield f"{prefix}{key}", a, b


def _only_how(key: str) -> bool:
  return any(key == how or key.startswith(f"{how}.") for how in HOW)


def _plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """As json reads it back: tuples are lists."""
  return json.loads(json.dumps(config.to_dict()))
