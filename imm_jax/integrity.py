"""Records digests of the files of a run in manifest.json.

A finished stage's record in run.json has the digests of what it wrote, and a training state has a file of its own with
them. manifest.json has those of a run's other files. Whoever replaces one of these removes its digest first and records
the new one afterwards (`rewritten`), and of files that grow the digest of their first bytes is recorded: so a process
that is killed at any moment leaves no digest that is wrong.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from imm_jax import files
from imm_jax.errors import UserError

# The file with digests of what no stage's record covers.
MANIFEST = "manifest.json"
# Suffix, after a training state's name, of the file with its digests.
SEAL = ".digest.json"
# The files, and folders of files, that a run writes besides the output of its stages; those that only grow come first.
GROWING = ("log.txt", "metrics.jsonl", "tb")
COVERED = (*GROWING, "config.json", "profile", "report", "run.json", "status.json", "wandb.json")


class Digests(NamedTuple):
  """Holds the content of a file of digests.

  Attributes:
    files: SHA-256 of each file, by its path relative to a folder.
    sizes: bytes that the digest covers, of files that have grown since then.
  """

  files: dict[str, str]
  sizes: dict[str, int]

  def combine(self) -> str:
    """Returns one digest over all."""
    return files.combine_digests(self.files | {f"{name}: size": str(size) for name, size in self.sizes.items()})


def write_digests(path: Path, root: Path, covered: Iterable[Path]) -> None:
  """Writes the digests of the `covered` files below `root`, and one over all of them, to the file `path`."""
  _write(path, Digests({str(file.relative_to(root)): files.digest_files(file)["."] for file in sorted(covered)}, {}))


def read_digests(path: Path) -> Digests:
  """Reads a file of digests.

  Raises:
    UserError: when it is missing or damaged.
  """
  content = files.read_json(path)
  digests, sizes = content.get("files"), content.get("sizes", {})
  if not (isinstance(digests, dict) and isinstance(sizes, dict) and content.keys() <= {"files", "sizes", "digest"}
          and Digests(digests, sizes).combine() == content.get("digest")):
    raise UserError(f"{path}: damaged")
  return Digests(digests, sizes)


def list_differing(path: Path, root: Path) -> list[str]:
  """Lists the files, relative to `root`, that differ from the digests in `path`; only `path` if that is damaged."""
  try:
    digests, sizes = read_digests(path)
  except UserError:
    return [str(path.relative_to(root))]
  return [name for name, digest in digests.items()
          if not (root / name).is_file() or _digest_start(root / name, sizes.get(name)) != digest]


def seal(root: Path, *names: str, create: bool = False) -> None:
  """Records the current digests of these of a run's files and folders; keeps those of others.

  Does nothing without manifest.json, unless it is to be created.
  """
  path = root / MANIFEST
  if not (create or path.exists()):
    return
  digests, sizes = _read_others(path, names)
  for file in (file for name in names if (root / name).exists() for file in files.list_files(root / name)):
    name = str(file.relative_to(root))
    size = file.stat().st_size if name.split("/")[0] in GROWING else None
    digests[name] = _digest_start(file, size)
    sizes |= {} if size is None else {name: size}
  _write(path, Digests(dict(sorted(digests.items())), sizes))


def forget(root: Path, *names: str) -> None:
  """Removes the digests of these of a run's files and folders, because they are about to be replaced."""
  path = root / MANIFEST
  if path.exists():
    _write(path, _read_others(path, names))


@contextlib.contextmanager
def rewritten(root: Path, *names: str) -> Iterator[None]:
  """Forgets the digests of these of a run's files and folders, and records the new ones when the block has ended."""
  forget(root, *names)
  yield
  seal(root, *names)


def _read_others(path: Path, names: Iterable[str]) -> Digests:
  """Reads the digests of the covered files other than these; a damaged file counts as empty."""
  try:
    digests, sizes = read_digests(path)
  except UserError:
    return Digests({}, {})
  # Runs of older versions also have the files of stages here that left the run.
  others = {name: digest for name, digest in digests.items() if name.split("/")[0] in COVERED
            and not any(name == other or name.startswith(f"{other}/") for other in names)}
  return Digests(others, {name: size for name, size in sizes.items() if name in others})


def _write(path: Path, digests: Digests) -> None:
  sizes = {"sizes": digests.sizes} if digests.sizes else {}
  files.write_json(path, {"files": digests.files, **sizes, "digest": digests.combine()})


def _digest_start(file: Path, size: int | None) -> str:
  """Returns the SHA-256 of the first bytes of a file, or of all."""
  if size is None:
    return files.digest_files(file)["."]
  result = hashlib.sha256()
  with file.open("rb") as f:
    while chunk := f.read(min(size, 1 << 20)):
      result.update(chunk)
      size -= len(chunk)
  return result.hexdigest()
