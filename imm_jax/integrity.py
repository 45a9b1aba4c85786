"""Whether files are still what was written: digests of each, and what differs from them."""

import json
from collections.abc import Iterable
from pathlib import Path

from imm_jax import files
from imm_jax.errors import UserError

# Of what a run has written and no stage's record covers.
MANIFEST = "manifest.json"
# Behind a training state's name: its digests.
SEAL = ".digest.json"


def write_digests(path: Path, root: Path, covered: Iterable[Path]) -> None:
  """Writes the digests of some files below `root`, and one over these, to the file `path`."""
  found = {str(file.relative_to(root)): files.digest_files(file)["."] for file in sorted(covered)}
  files.write_text(path, json.dumps({"files": found, "digest": files.combine_digests(found)}, indent=1) + "\n")


def update_digests(path: Path, root: Path, folder: Path) -> None:
  """Renews the digests of the files below `folder` in what `write_digests` has written to `path`, if it has."""
  if path.exists() and root in folder.parents:
    here = str(folder.relative_to(root))
    found = {name: digest for name, digest in files.read_json(path).get("files", {}).items()
             if not name.startswith(f"{here}/")}
    found |= {f"{here}/{name}": digest for name, digest in files.digest_files(folder).items()}
    files.write_text(path, json.dumps({"files": found, "digest": files.combine_digests(found)}, indent=1) + "\n")


def list_differing(path: Path, root: Path) -> list[str]:
  """The files that are not what `write_digests` has found, relative to `root`, or `path` itself where it is damaged."""
  try:
    recorded = files.read_json(path)
    found, over = recorded["files"], recorded["digest"]
  except (UserError, KeyError):
    return [_name(path, root)]
  if not isinstance(found, dict) or files.combine_digests(found) != over:
    return [_name(path, root)]
  return [name for name, digest in found.items()
          if not (root / name).is_file() or files.digest_files(root / name)["."] != digest]


def check_run(root: Path) -> tuple[list[str], list[str]]:
  """Recomputes every digest that a run has recorded.

  Args:
    root: a run directory, in which nothing runs.

  Returns:
    The files and stages that differ, relative to it, and notes on what could not be looked at.

  Raises:
    UserError: when it is no run directory.
  """
  if not (root / "run.json").exists():
    raise UserError(f"{root}: is no run directory (it has no run.json)")
  wrong, notes = [], []
  manifest = root / MANIFEST
  if manifest.exists():
    wrong += list_differing(manifest, root)
  else:
    notes.append(f"{MANIFEST} is missing (a start has not ended, was killed, or is older): run.json, config.json, "
                 "metrics and report cannot be checked")
  try:
    stages = files.read_json(root / "run.json")["stages"].items()
    recorded = [(name, entry["output"], entry.get("files")) for name, entry in stages]
  except (UserError, KeyError, AttributeError, TypeError):
    damaged = [] if "run.json" in wrong else ["run.json"]
    return [*wrong, *damaged], [*notes, "without run.json no stage can be checked"]
  for name, output, each in recorded:
    if not (root / name).exists():
      wrong.append(name)
    elif files.digest(root / name) != output:
      found = files.digest_files(root / name)
      # Where each file is what it was, the record itself is not.
      wrong += [f"{name}/{file}".removesuffix("/.") for file in sorted({*found, *(each or {})})
                if found.get(file) != each.get(file)] if each and found != each else [name]
  for state in sorted(path for path in root.glob("round_*/*_state/*") if path.name.isdecimal()):
    seal = state.with_name(state.name + SEAL)
    if seal.exists():
      wrong += [f"{seal.parent.relative_to(root)}/{name}" for name in list_differing(seal, seal.parent)]
    else:
      notes.append(f"{_name(state, root)}: has no digests (its writer was killed), and cannot be checked")
  if elsewhere := _states_elsewhere(root / "config.json"):
    notes.append(f"training states are in {elsewhere}, which is not looked at here")
  return wrong, notes


def _states_elsewhere(config: Path) -> str:
  try:
    return files.read_json(config)["sft"]["state_dir"]
  except (UserError, KeyError, TypeError):  # damaged, which has been said
    return ""


def _name(path: Path, root: Path) -> str:
  return str(path.relative_to(root))
