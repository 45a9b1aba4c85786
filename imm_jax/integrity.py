"""Records digests of the files of a run, and checks files against them."""

from collections.abc import Iterable
from pathlib import Path

from imm_jax import files
from imm_jax.errors import UserError

# The file with digests of what no stage's record covers.
MANIFEST = "manifest.json"
# Suffix, after a training state's name, of the file with its digests.
SEAL = ".digest.json"


def write_digests(path: Path, root: Path, covered: Iterable[Path]) -> None:
  """Writes the digests of the `covered` files below `root`, and one over all of them, to the file `path`."""
  digests = {str(file.relative_to(root)): files.digest_files(file)["."] for file in sorted(covered)}
  files.write_json(path, {"files": digests, "digest": files.combine_digests(digests)})


def update_digests(path: Path, root: Path, folder: Path) -> None:
  """Replaces the digests of the files below `folder` in the file `path` of `write_digests`, if that exists."""
  if path.exists() and root in folder.parents:
    prefix = str(folder.relative_to(root))
    digests = {name: digest for name, digest in files.read_json(path).get("files", {}).items()
               if not name.startswith(f"{prefix}/")}
    digests |= {f"{prefix}/{name}": digest for name, digest in files.digest_files(folder).items()}
    files.write_json(path, {"files": digests, "digest": files.combine_digests(digests)})


def list_differing(path: Path, root: Path) -> list[str]:
  """Lists the files, relative to `root`, that differ from the digests in `path`; only `path` if that is damaged."""
  try:
    content = files.read_json(path)
    digests, combined = content["files"], content["digest"]
  except (UserError, KeyError):
    return [str(path.relative_to(root))]
  if not isinstance(digests, dict) or files.combine_digests(digests) != combined:
    return [str(path.relative_to(root))]
  return [name for name, digest in digests.items()
          if not (root / name).is_file() or files.digest_files(root / name)["."] != digest]


def check_run(root: Path) -> tuple[list[str], list[str]]:
  """Recomputes every digest that a run has recorded.

  Args:
    root: the run directory; no process should be running in it.

  Returns:
    The files and stages that differ, relative to it, and notes about what could not be checked.

  Raises:
    UserError: when it is no run directory.
  """
  if not (root / "run.json").exists():
    raise UserError(f"{root}: is no run directory (it has no run.json)")
  differing, notes = [], []
  manifest = root / MANIFEST
  if manifest.exists():
    differing += list_differing(manifest, root)
  else:
    notes.append(f"{MANIFEST} is missing (a start has not ended, was killed, or is older): run.json, config.json, "
                 "metrics and report cannot be checked")
  try:
    stages = files.read_json(root / "run.json")["stages"].items()
    recorded = [(name, entry["output"], entry.get("files")) for name, entry in stages]
  except (UserError, KeyError, AttributeError, TypeError):
    damaged = [] if "run.json" in differing else ["run.json"]
    return [*differing, *damaged], [*notes, "without run.json no stage can be checked"]
  for name, output, digests in recorded:
    if not (root / name).exists():
      differing.append(name)
    elif files.digest(root / name) != output:
      current = files.digest_files(root / name)
      # If no file differs, the record itself does, and the stage is named.
      differing += [f"{name}/{file}".removesuffix("/.") for file in sorted({*current, *(digests or {})})
                    if current.get(file) != digests.get(file)] if digests and current != digests else [name]
  for state in sorted(path for path in root.glob("round_*/*_state/*") if path.name.isdecimal()):
    seal = state.with_name(state.name + SEAL)
    if seal.exists():
      differing += [f"{seal.parent.relative_to(root)}/{name}" for name in list_differing(seal, seal.parent)]
    else:
      notes.append(f"{state.relative_to(root)}: has no digests (its writer was killed), and cannot be checked")
  if state_dir := _read_state_dir(root / "config.json"):
    notes.append(f"training states are in {state_dir}, which is not looked at here")
  return differing, notes


def _read_state_dir(config: Path) -> str:
  try:
    return files.read_json(config)["sft"]["state_dir"]
  except (UserError, KeyError, TypeError):  # the file is damaged, and so already listed
    return ""
