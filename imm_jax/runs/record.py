"""run.json, the record of a run's finished stages, and which stages have to run according to it.

The record holds for every finished stage digests of its inputs (outputs of earlier stages, external inputs such as the
base model, and its settings) and of its output. A stage is skipped as long as these are unchanged.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imm_jax import files
from imm_jax.errors import UserError
from imm_jax.runs.run import Stage


def read(root: Path) -> dict[str, Any]:
  """Reads run.json of a run directory; returns an empty record if there is none.

  Raises:
    UserError: when the file is damaged.
  """
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


def accept_former_settings(record: Mapping[str, Any], stages: Sequence[Stage]) -> None:
  """Replaces in a record the digests of settings as earlier versions counted them by those of today."""
  for stage in stages:
    if stage.former_settings is not None:
      former, current = digest_settings(stage.former_settings), digest_settings(stage.settings)
      inputs, known = record["stages"].get(stage.name, {}).get("inputs", {}), record.get("settings", {})
      for digests, name in ((inputs, "settings"), (known, stage.name)):
        if digests.get(name) == former:
          digests[name] = current


def stale_reason(stage: Stage, record: Mapping[str, Any], root: Path, external: Mapping[str, str]) -> str | None:
  """Returns the reason why a stage has to run, as the user reads it, or None if it is done.

  Args:
    stage: the stage.
    record: content of run.json.
    root: the run directory.
    external: digests of the inputs that no stage writes, by name.
  """
  entry = record["stages"].get(stage.name)
  if entry is None:
    return "run"
  inputs = collect_inputs(stage, record, external)
  changed = sorted(k for k in inputs.keys() | entry["inputs"].keys() if inputs.get(k) != entry["inputs"].get(k))
  if changed:
    rest = "; what is unchanged in it is taken over" if stage.takes_over else ""
    return f"run again, because of a change in: {', '.join(changed)}{rest}"
  if not (root / stage.name).exists():
    return "run again, because its output is missing"
  if files.count_bytes(root / stage.name) != entry["bytes"]:
    return "run again, because its output has another size than when it was written"
  return None


def list_stale(stages: Sequence[Stage], record: Mapping[str, Any], root: Path, external: Mapping[str, str],
               ) -> list[str]:
  """Lists the finished stages that have to run again, and those that may have to because they read the former."""
  names: list[str] = []
  for stage in stages:
    reason = stale_reason(stage, record, root, external)
    if stage.name in record["stages"] and (reason or set(names).intersection(stage.needs)):
      names.append(stage.name)
  return names


def collect_inputs(stage: Stage, record: Mapping[str, Any], external: Mapping[str, str]) -> dict[str, str | None]:
  """Returns the digests of a stage's inputs and settings, by name; None for a stage that is not done."""
  inputs = {need: external[need] if need in external else record["stages"].get(need, {}).get("output")
            for need in stage.needs}
  return {**inputs, "settings": digest_settings(stage.settings)}


def digest_settings(settings: Mapping[str, Any]) -> str:
  """Returns the first 16 hex digits of the SHA-256 of a stage's settings."""
  return files.digest_json(settings, digits=16)


def list_replaced(record: Mapping[str, Any], external: Mapping[str, str]) -> list[str]:
  """Lists the external inputs whose digest differs from that of the previous start."""
  known = record.get("external")
  if not isinstance(known, dict):  # runs of older versions only have the inputs of each stage
    known = {name: digest for entry in record["stages"].values() for name, digest in entry["inputs"].items()}
  return sorted(name for name, digest in external.items() if known.get(name, digest) != digest)
