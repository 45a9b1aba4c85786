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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from etils import epath

from imm_jax import files, integrity
from imm_jax.config import HOW, idle
from imm_jax.errors import UserError, join_items
from imm_jax.runs import runlog
from imm_jax.runtime import distributed, resident

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
    costly: whether its output is not thrown away for a change of the config unless the user asks for it.
    summarise: what a user is told of its facts when it is done.
  """

  name: str
  needs: tuple[str, ...]
  settings: Mapping[str, Any]
  plan: str
  make: Callable[[Path, Mapping[str, str | None]], dict[str, Any]]
  everywhere: bool = False
  scratch: str = ""
  costly: bool = False
  summarise: Callable[[dict[str, Any]], str] = lambda facts: ""


class RunDir:
  """An open run directory; use as a context manager, which also keeps a second process out."""

  def __init__(self, path: str | Path, config: ml_collections.ConfigDict):
    """Opens or creates the directory.

    Raises:
      UserError: when it cannot be written, or another process runs in it.
    """
    self.path = Path(path)
    self._config, self._begun = config, False
    self._record: dict[str, Any] = {"stages": {}}
    self._lock = None
    if distributed.is_main():
      check(path)
      self._open(path)

  def _open(self, path: str | Path) -> None:
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self._lock = (self.path / ".lock").open("w")  # closed by __exit__
      self._take()
    except BlockingIOError as e:
      raise UserError(f"{self.path}: another process is running in it; wait for it or use another --workdir") from e
    except OSError as e:
      raise UserError(f"{self.path}: the run directory cannot be written ({e.strerror}); use another --workdir") from e
    try:
      check(path)  # again: before the lock another process may have been at it
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
      try:
        if self._begun:
          self.seal()
      except (OSError, UserError) as e:  # a full disk, say: what ends the run is not to be hidden by it
        print(f"warning: {self.path / integrity.MANIFEST} was not written ({e})", file=sys.stderr)
      finally:
        self._lock.close()

  def seal(self) -> None:
    """Writes the digests of what no stage's record covers: records, metrics, report."""
    outputs = [self.path / name for name in self._record["stages"]]
    covered = [p for p in files.list_files(self.path) if p.name not in (".lock", integrity.MANIFEST, runlog.FILE)
               and not any(p == out or out in p.parents for out in outputs)
               and not any(part == "wandb" or part.endswith(("_state", ".sampling"))
                           for part in p.relative_to(self.path).parts)]
    integrity.write_digests(self.path / integrity.MANIFEST, self.path, covered)

  @property
  def facts(self) -> dict[str, dict[str, Any]]:
    """What each finished stage recorded, by stage name."""
    return {name: entry["facts"] for name, entry in self._record["stages"].items()}

  def begin(self, stages: Sequence[Stage], external: Mapping[str, str], *, rerun: bool) -> None:
    """Takes the config over, to be called before the first stage: what it changes since an earlier start is said.

    Args:
      stages: all of the run.
      external: digests of inputs that no stage wrote.
      rerun: whether costly stages may be thrown away.

    Raises:
      UserError: when the config would throw away costly stages that are done, and `rerun` does not allow it.
    """
    if not distributed.is_main():
      return
    changed = list_changes(self.path, self._config)
    how = [line for key, line in changed if _only_how(key)]
    what = [line for key, line in changed if not _only_how(key)]
    # What was read may be another under the same name, and that throws work away just as well.
    made, back = ("another config", "the values") if what else ("other inputs", "what")
    what = what or [f"{name} is not what it was" for name in _replaced(self._record, external)]
    settings = {stage.name: digest_settings(stage.settings) for stage in stages}
    # With the same config it is the package that counts others; what an older package did not note is not asked for.
    if not what and any(self._record.get("settings", {}).get(name, now) != now for name, now in settings.items()):
      made, back = "another version of imm_jax", "the version"
      what = ["this one counts other settings among those of a stage"]
    if what:
      again = list_stale(stages, self._record, self.path, external)
      gone = sorted(self._record["stages"].keys() - {stage.name for stage in stages})
      lost = [stage.name for stage in stages if stage.costly and stage.name in again]
      lost += [name for name in gone if self._record["stages"][name].get("costly")]
      if lost and not rerun:
        verb = "run finished work again" if set(lost) & set(again) else "drop finished work from the run"
        raise UserError(f"{self.path}: made with {made} ({'; '.join(what)}), which would {verb}: "
                        f"{join_items(lost)}; give --rerun to have that, or use another --workdir, or {back} it was "
                        "made with")
      effect = f"{join_items(again)} will be run again" if again else "nothing is run again for it"
      how += [f"{'; '.join(what)}: {effect}"]
      for name in gone:
        del self._record["stages"][name]
      how += [f"no longer a part of the run: {join_items(gone)}"] * bool(gone)
    self._record |= {"external": dict(external), "settings": settings}
    self._save_record()
    self._begun = True
    (self.path / integrity.MANIFEST).unlink(missing_ok=True)  # written again when this start ends
    files.write_text(self.path / "config.json", json.dumps(_plain(self._config), indent=1, sort_keys=True) + "\n")
    for line in how:
      print(f"note: {line}", file=sys.stderr)

  def run(self, stage: Stage, external: Mapping[str, str], *, on_host: bool = False) -> bool:
    """Runs a stage unless it is done.

    Args:
      stage: what to do.
      external: digests of inputs that no stage wrote.
      on_host: whether what it computes lies in this process's memory, so that its peak is worth recording.

    Returns:
      Whether it ran.
    """
    reason = stale_reason(stage, self._record, self.path, external) if distributed.is_main() else None
    inputs = collect_inputs(stage, self._record, external) if distributed.is_main() else {}
    wanted, inputs = distributed.broadcast([reason is not None, inputs])
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
      started, counts = time.time(), on_host and resident.reset_peak()
      with files.committed(target) as out:
        facts = stage.make(out, inputs)
      memory = {"memory_gib": round(resident.read_peak(), 3)} if counts else {}
      written = files.digest_files(target)
      self._record["stages"][stage.name] = {
          "inputs": inputs, "output": files.combine_digests(written), "files": written,
          "bytes": files.count_bytes(target), "facts": facts, "seconds": round(time.time() - started, 2), **memory,
          **({"costly": True} if stage.costly else {})}
      self._save_record()
      runlog.log_line(f"{stage.name}: done in {self._record['stages'][stage.name]['seconds']} s")
      if text := stage.summarise(facts):
        print(f"{stage.name}: {text}", flush=True)
      if stage.scratch:
        epath.Path(stage.scratch).rmtree(missing_ok=True)
    elif stage.everywhere:
      stage.make(target, inputs)
    resident.release_freed()
    distributed.barrier(stage.name)
    return True

  def record_facts(self, **values: Any) -> None:
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


def check(path: str | Path) -> None:
  """Checks that a run can use the directory, and changes nothing.

  Raises:
    UserError: when it is no folder, cannot be written, or holds something else.
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
  if "config.json" in held:
    files.read_json(root / "config.json")
  elif "run.json" in held:
    raise UserError(f"{root / 'config.json'}: missing, so nobody can say whether this run has the same config; use "
                    "another --workdir")
  elif held - {".lock", ".config.json.part"}:
    raise UserError(f"{root}: is not empty and no run directory (it has no config.json); use another --workdir")


def list_changes(root: Path, config: ml_collections.ConfigDict) -> list[tuple[str, str]]:
  """What a config has otherwise than an earlier start in the directory had: each key, and a line on it.

  A run may be continued with more rounds, which changes nothing.
  """
  if not (root / "config.json").exists():
    return []
  found = _differences(files.read_json(root / "config.json"), _plain(config))
  unused = idle(config)  # a key that is newer than the run is none of its config
  return [(key, f"config.{key} was {old!r} and is {new!r} now") for key, old, new in found
          if not (old is None and key in unused) and (key != "rounds" or not isinstance(old, int) or new < old)]


def list_stale(stages: Sequence[Stage], record: Mapping[str, Any], root: Path, external: Mapping[str, str],
               ) -> list[str]:
  """The stages that are done and will be run again, or may be, since they read what another of them writes."""
  found: list[str] = []
  for stage in stages:
    reason = stale_reason(stage, record, root, external)
    if stage.name in record["stages"] and (reason or set(found).intersection(stage.needs)):
      found.append(stage.name)
  return found


def stale_reason(stage: Stage, record: Mapping[str, Any], root: Path, external: Mapping[str, str]) -> str | None:
  """Why a stage must run, or None when it is done."""
  done = record["stages"].get(stage.name)
  if done is None:
    return "run"
  inputs = collect_inputs(stage, record, external)
  changed = sorted(k for k in inputs.keys() | done["inputs"].keys() if inputs.get(k) != done["inputs"].get(k))
  if changed:
    return f"run again, because of a change in: {', '.join(changed)}"
  if not (root / stage.name).exists():
    return "run again, because its output is missing"
  if files.count_bytes(root / stage.name) != done["bytes"]:
    return "run again, because its output has another size than when it was written"
  return None


def collect_inputs(stage: Stage, record: Mapping[str, Any], external: Mapping[str, str]) -> dict[str, str | None]:
  """Digests of everything a stage reads; None for a stage that is not done."""
  inputs = {need: external[need] if need in external else record["stages"].get(need, {}).get("output")
            for need in stage.needs}
  return {**inputs, "settings": digest_settings(stage.settings)}


def digest_settings(settings: Mapping[str, Any]) -> str:
  """A short digest of a stage's settings."""
  return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


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


def _replaced(record: Mapping[str, Any], external: Mapping[str, str]) -> list[str]:
  """The inputs that no stage wrote, and that are others than at the start before."""
  known = record.get("external")
  if not isinstance(known, dict):  # an older run, whose stages say what they read
    known = {name: digest for entry in record["stages"].values() for name, digest in entry["inputs"].items()}
  return sorted(name for name, digest in external.items() if known.get(name, digest) != digest)


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
