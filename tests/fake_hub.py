"""A hub of a few repositories in memory, in place of huggingface_hub's functions; it writes the cache as that does."""

import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors


def http_error(kind: type[Exception], text: str = "refused\nmore", status: int | None = None) -> Exception:
  """Such an error, with no more of the response that it was made from than a status."""
  error = kind.__new__(kind)
  Exception.__init__(error, text)
  error.response = SimpleNamespace(status_code=status)
  return error


class Hub:
  """Repositories by id, revisions of each by name: path -> contents.

  Attributes:
    fetched: what was downloaded, in order, as "path" or "path@commit" where a commit was asked for.
    offline: whether every question fails.
  """

  def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
    self.root, self.fetched, self.offline = root, [], False
    self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
    self.raises: Exception | None = None
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", self._download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", self._snapshot)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self._cached)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=self._info))

  def add(self, model: str, files: dict[str, bytes], revision: str = "main") -> None:
    self.repositories.setdefault(model, {})[revision] = files

  def folder(self, model: str, revision: str = "main") -> Path:
    """Where the cache keeps a revision: it is its own commit, with a c before it."""
    return self.root / model / "snapshots" / f"c{revision.removeprefix('c')}"

  def _files(self, model: str, revision: str | None) -> dict[str, bytes]:
    if self.raises:
      raise self.raises
    if model not in self.repositories:
      raise http_error(errors.RepositoryNotFoundError)
    revisions = self.repositories[model]
    name = revision or "main"
    name = name if name in revisions else name.removeprefix("c")
    if name not in revisions:
      raise http_error(errors.RevisionNotFoundError)
    return revisions[name]

  def _cached(self, model: str, filename: str, revision: str | None = None, **_: Any) -> str | None:
    path = self.folder(model, revision or "main") / filename
    return str(path) if path.exists() else None

  def _download(self, model: str, filename: str, *, revision: str | None = None) -> str:
    path = self.folder(model, revision or "main") / filename
    if self.offline:
      if path.exists():
        return str(path)
      raise errors.LocalEntryNotFoundError("no network\nmore")
    files = self._files(model, revision)
    if filename not in files:
      raise http_error(errors.RemoteEntryNotFoundError)
    if not path.exists():
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(files[filename])
      self.fetched.append(filename if revision is None or not revision.startswith("c") else f"{filename}@{revision}")
    return str(path)

  def _snapshot(self, model: str, *, revision: str, allow_patterns: list[str]) -> str:
    for name in self._files(model, revision):
      if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
        self._download(model, name, revision=revision)
    return str(self.folder(model, revision))

  def _info(self, model: str, *, revision: str, files_metadata: bool, timeout: float) -> SimpleNamespace:
    assert files_metadata
    assert timeout
    if self.offline:
      raise ConnectionError("offline\nmore")
    return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=len(content))
                                     for name, content in self._files(model, revision).items()])
