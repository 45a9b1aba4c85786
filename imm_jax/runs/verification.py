"""Checks the files of a run directory against every digest that the run has recorded."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from imm_jax import files, integrity
from imm_jax.errors import UserError
from imm_jax.formatting import format_size

# Folders that no stage's record covers, and why they are not checked.
_OTHERS = {"wandb": "is of Weights & Biases", "cache": "has earlier results, checked when they are used again"}
_UNFINISHED = (".part", ".old", ".sampling")  # suffixes of hidden files and folders that stages write to


class Findings(NamedTuple):
  """Holds what a check of a run directory has found; names are relative to it, those of folders end with a slash.

  Attributes:
    differing: files that differ from what was written, or are missing.
    unchecked: the number of files of the run that nothing covers, or not to their end, by file or folder.
    notes: what else there is to know, such as files that are none of the run.
  """

  differing: list[str]
  unchecked: dict[str, int]
  notes: list[str]


def check_run(root: Path) -> Findings:
  """Recomputes every digest that a run has recorded, also one that was killed; no process should be running in it.

  Raises:
    UserError: when it is no run directory.
  """
  if not (root / "run.json").exists():
    raise UserError(f"{root}: is no run directory (it has no run.json)")
  findings = Findings([], {}, [])
  present = [str(path.relative_to(root)) for path in files.list_files(root)]
  covered = {".lock", integrity.MANIFEST, *_check_manifest(root, findings), *_check_stages(root, present, findings)}
  states = sorted({path for path in root.glob("round_*/*_state") if path.is_dir()})
  for folder in states:
    covered.update(_check_states(root, folder, findings))
  _classify_uncovered(present, covered, findings)
  if state_dir := _read_state_dir(root / "config.json"):
    findings.notes.append(f"training states are in {state_dir}, which is not looked at here")
  return findings


def _check_manifest(root: Path, findings: Findings) -> set[str]:
  """Checks what manifest.json covers, and returns it."""
  path = root / integrity.MANIFEST
  if not path.exists():
    findings.notes.append(f"{integrity.MANIFEST} is missing: nothing covers run.json, config.json, metrics and report")
    return set()
  findings.differing.extend(integrity.list_differing(path, root))
  if integrity.MANIFEST in findings.differing:
    return set()
  digests, sizes = integrity.read_digests(path)
  grown = {name: (root / name).stat().st_size - size for name, size in sizes.items() if (root / name).is_file()}
  for name, more in grown.items():
    if more > 0 and name not in findings.differing:
      findings.unchecked[name] = 1
      findings.notes.append(f"{name}: its last {format_size(more)} were written after its digest was")
  return set(digests)


def _check_stages(root: Path, present: Sequence[str], findings: Findings) -> set[str]:
  """Checks the output of all finished stages, and returns the files that their records cover."""
  try:
    stages = files.read_json(root / "run.json")["stages"].items()
    recorded = [(name, entry["output"], entry.get("files")) for name, entry in stages]
  except (UserError, KeyError, AttributeError, TypeError):
    findings.differing.extend([] if "run.json" in findings.differing else ["run.json"])
    findings.notes.append("without run.json no stage can be checked")
    return set()
  for name, output, digests in recorded:
    if not (root / name).exists():
      findings.differing.append(name)
    elif files.digest(root / name) != output:
      current = files.digest_files(root / name)
      # If no file differs, the record itself does, and the stage is named.
      findings.differing.extend([f"{name}/{file}".removesuffix("/.") for file in sorted({*current, *(digests or {})})
                                 if current.get(file) != digests.get(file)]
                                if digests and current != digests else [name])
  outputs = [name for name, _, _ in recorded]
  return {file for file in present if any(file == name or file.startswith(f"{name}/") for name in outputs)}


def _check_states(root: Path, folder: Path, findings: Findings) -> Iterator[str]:
  """Checks a folder of training states, and yields all files in it."""
  name = str(folder.relative_to(root))
  for child in sorted(folder.iterdir()):
    inside = [str(path.relative_to(root)) for path in files.list_files(child)]
    yield from inside
    state = folder / child.name.removesuffix(integrity.SEAL)
    of_state = f"{name}/{child.name}" + "/" * child.is_dir()
    if "orbax-checkpoint-tmp" in child.name:
      _leave_out(findings, of_state, inside,
                 "a training state that was not written to its end; the next start removes it")
    elif child.name.isdecimal() and child.is_dir():
      seal = child.with_name(child.name + integrity.SEAL)
      if not seal.exists():
        _leave_out(findings, of_state, inside, "has no digests, for its writer ended before it had written them")
        continue
      findings.differing.extend(f"{name}/{file}" for file in integrity.list_differing(seal, folder))
      try:
        known = {f"{name}/{file}" for file in integrity.read_digests(seal).files}
      except UserError:  # it is listed as differing
        _leave_out(findings, of_state, inside, "its digests are damaged")
        continue
      findings.notes.extend(f"{file}: was not there when the training state was written" for file in inside
                            if file not in known)
    elif state != child and state.name.isdecimal():
      if not state.exists():
        _leave_out(findings, of_state, inside, "digests of a training state that was removed")
    else:
      findings.notes.append(f"{of_state}: is no training state, nor a file of the run; not checked")


def _classify_uncovered(present: Sequence[str], covered: set[str], findings: Findings) -> None:
  """Classifies the files that nothing covers as those of the run and others, by folder where possible."""
  others = [file for file in present if file not in covered]
  strays: list[str] = []
  folders: dict[str, list[str]] = {}
  for file in others:
    parts = file.split("/")
    hidden = next((i for i, part in enumerate(parts) if part.startswith(".") and part.endswith(_UNFINISHED)), None)
    if hidden is not None:
      folders.setdefault("/".join(parts[:hidden + 1]) + "/" * (hidden + 1 < len(parts)), []).append(file)
    elif parts[0] in integrity.COVERED:
      findings.unchecked[file] = 1
    elif len(parts) > 1 and parts[0] in _OTHERS:
      folders.setdefault(f"{parts[0]}/", []).append(file)
    else:
      strays.append(file)
  for name, inside in folders.items():
    if reason := _OTHERS.get(name.removesuffix("/")):
      findings.notes.append(f"{name}: {reason}; not checked")
    else:
      _leave_out(findings, name, inside, "unfinished work of a stage")
  for name in _collapse(strays, {*present} - {*strays}):
    findings.notes.append(f"{name}: no finished stage of the run has written it; not checked")


def _collapse(names: Sequence[str], others: set[str]) -> list[str]:
  """Replaces files by the highest folder that holds none of the others.

  >>> _collapse(["a/b/c", "a/b/d/e", "a/f", "g", "h/i/j"], {"a/k", "h/l"})
  ['a/b/', 'a/f', 'g', 'h/i/']
  """
  occupied = {"/".join(name.split("/")[:i]) for name in others for i in range(name.count("/") + 1)}
  folders = lambda name: ("/".join(name.split("/")[:i]) for i in range(1, name.count("/") + 1))
  return list(dict.fromkeys(next((f"{f}/" for f in folders(name) if f not in occupied), name) for name in names))


def _leave_out(findings: Findings, name: str, inside: Sequence[str], reason: str) -> None:
  findings.unchecked[name] = len(inside)
  findings.notes.append(f"{name}: {reason}; not checked")


def _read_state_dir(config: Path) -> str:
  try:
    return files.read_json(config)["sft"]["state_dir"]
  except (UserError, KeyError, TypeError):  # the file is damaged, and so already listed
    return ""
