"""Keeps results by what they depend on, so that a stage that is made again computes only what is new.

Beside its results a folder has keys.json: for each the digest of all that determines it (its key), facts, and a digest
of these and of the content. What a new folder does not have any more is kept in the run directory, in cache/KEY.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from imm_jax import files
from imm_jax.errors import UserError
from imm_jax.files import Row
from imm_jax.runtime import distributed

KEYS = "keys.json"
FOLDER = "cache"


class ResultCache(NamedTuple):
  """Knows where an evaluation writes its results, and where earlier ones are.

  Attributes:
    out: the folder to write.
    former: the folder that it replaces, which need not exist; None to take nothing over and to record no keys.
    store: the folder with what `out` folders do not have any more, by key.
  """

  out: Path
  former: Path | None = None
  store: Path | None = None

  def obtain(self, name: str, settings: Mapping[str, Any], compute: Callable[[], tuple[list[Row], dict[str, Any]]], *,
             label: str) -> tuple[list[Row], dict[str, Any]]:
    """Takes over a file of rows if its key is unchanged; computes and writes it otherwise. Every process calls it.

    Args:
      name: name of the file without .jsonl.
      settings: everything that its rows depend on, in JSON types; used on process 0.
      compute: returns the rows, which only process 0 has to know, and facts about them that do not follow from them.
      label: name of the evaluation in messages.
    """
    file, key = f"{name}.jsonl", digest_key(settings) if distributed.is_main() else ""
    cached = distributed.broadcast(self._take(file, key) if distributed.is_main() else None)
    if cached:
      rows, facts = cached
      if distributed.is_main():
        print(f"{label}: {name} is taken over", flush=True)
    else:
      rows, facts = compute()
      if distributed.is_main():
        files.write_jsonl(self.out / file, rows)
    if self.former and distributed.is_main():
      record(self.out, {file: key}, facts)
    return rows, facts

  def finish(self) -> None:
    """Moves to the store what the former folder has and the new one has not; call it last, on process 0."""
    if not (self.former and self.store):
      return
    current = _read(self.out)
    for name, entry in _read(self.former).items():
      if entry["key"] != current.get(name, {}).get("key") and (self.former / name).exists():
        folder = self.store / entry["key"]
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(self.former / name, folder / name)
        files.write_json(folder / KEYS, {name: entry}, sort_keys=True)

  def _take(self, name: str, key: str) -> list[Any] | None:
    for folder in (self.former, self.store and self.store / key):
      if folder and (entry := _find(folder, name, key)):
        shutil.copyfile(folder / name, self.out / name)
        return [files.read_jsonl(self.out / name, {}), entry["facts"]]
    return None


def digest_key(settings: Mapping[str, Any]) -> str:
  """Returns the key of a result that depends on settings in JSON types."""
  return files.digest_json(settings, digits=32)


def record(out: Path, keys: Mapping[str, str], facts: Mapping[str, Any]) -> None:
  """Records the keys of files or folders in `out`, by name, and facts about them."""
  entries = {name: {"key": key, "facts": dict(facts), "digest": _digest(out / name, key, facts)}
             for name, key in keys.items()}
  files.write_json(out / KEYS, _read(out) | entries, sort_keys=True)


def take_folder(former: Path, out: Path, key: str) -> bool:
  """Takes over a folder if its key is `key`; its files are linked where the file system can do that.

  Args:
    former: the folder; the one that holds it has the keys.
    out: the folder to write.
    key: the key that it should have.

  Returns:
    Whether it was taken over.
  """
  if not _find(former.parent, former.name, key):
    return False
  shutil.copytree(former, out, copy_function=_link)
  return True


def _find(folder: Path, name: str, key: str) -> dict[str, Any] | None:
  """Returns the record of a result if it has that key and is unchanged."""
  entry = _read(folder).get(name)
  is_whole = entry and entry["key"] == key and (folder / name).exists() and (
      entry["digest"] == _digest(folder / name, key, entry["facts"]))
  return entry if is_whole else None


def _read(folder: Path) -> dict[str, dict[str, Any]]:
  """Reads the keys of a folder; those of a damaged file count as missing, as its results can be computed again."""
  try:
    entries = files.read_json(folder / KEYS) if (folder / KEYS).exists() else {}
  except UserError:
    return {}
  return {name: entry for name, entry in entries.items() if isinstance(entry, dict) and isinstance(
      entry.get("key"), str) and isinstance(entry.get("facts"), dict) and "digest" in entry}


def _digest(path: Path, key: str, facts: Mapping[str, Any]) -> str:
  return files.combine_digests({"content": files.digest(path), "key": key, "facts": json.dumps(facts, sort_keys=True)})


def _link(source: str, target: str) -> None:
  try:
    os.link(source, target)
  except OSError:  # not all file systems have links
    shutil.copyfile(source, target)
