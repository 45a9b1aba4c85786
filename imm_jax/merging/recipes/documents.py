"""Merges the documents of a recipe one after the other; later ones may take the results of earlier ones for models.

All documents are checked before the first one is merged: an earlier result is then a folder that has its config and the
headers of its weights, but not their bytes.
"""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from imm_jax.errors import UserError
from imm_jax.merging.recipes import command, mergekit
from imm_jax.merging.recipes.recipe import Recipe
from imm_jax.model import checkpoint_folder, safetensors


@dataclasses.dataclass(frozen=True)
class Documents:
  """Holds the documents of a recipe file.

  Attributes:
    path: the file.
    names: the name of each document; None for a last one without.
    dtype: dtype to write in place of the file's.
  """

  path: Path
  names: Sequence[str | None]
  dtype: str | None = None

  def read(self, number: int, earlier: dict[str, Path]) -> Recipe:
    """Reads one document; `earlier` are the folders of earlier results by their names."""
    recipe = mergekit.read(self.path, number, earlier)
    return dataclasses.replace(recipe, dtype=self.dtype or recipe.dtype)

  def check(self, out: Path) -> dict[str, Path]:
    """Checks all documents and the space on the disk of `out`; returns the folders that are read, by names in messages.

    Raises:
      UserError: as `command.merge` does, as far as that can be told without reading tensors.
    """
    inputs: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as name:
      root, earlier, needed = Path(name), {}, 0
      for i, document in enumerate(self.names):
        recipe = self.read(i, earlier)
        with self._naming(i, root):
          tensors, aligned = command.check_recipe(recipe)
          if document is not None:
            earlier[document] = root / document
            _write_headers(earlier[document], recipe, tensors, aligned)
        needed += sum(map(command.count_bytes, tensors))
        inputs |= {f"{label} of document {i + 1}": path for label, path in recipe.inputs.items()
                   if root not in path.parents}
      command.check_space(needed, out)
    return inputs

  @contextlib.contextmanager
  def _naming(self, number: int, root: Path) -> Iterator[None]:
    """Puts file and document in front of errors, and names results of earlier documents without their folder."""
    try:
      yield
    except UserError as e:
      raise type(e)(f"{self.path}: document {number + 1}: {str(e).replace(f'{root}/', '')}") from e

  def merge(self, out: Path, final: Path, options: command.OutputOptions) -> int:
    """Merges all documents into the folder `out`, which is moved to `final` later; returns the number of merges.

    If the last document has no name, its output is `out` and the others are temporary; otherwise each has its own
    folder in `out`.
    """
    if self.names[-1] is not None:
      earlier: dict[str, Path] = {}
      for i, name in enumerate(self.names):
        origins = {folder: {"path": str(final / other)} for other, folder in earlier.items()}
        recipe = self.read(i, earlier)
        with self._naming(i, out):
          command.merge({out / name: recipe}, options, origins)
        earlier[name] = out / name
      return len(self.names)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix=".documents.", dir=out) as scratch:
      earlier, origins = {}, {}
      for i, name in enumerate(self.names):
        folder = out if name is None else Path(scratch) / name
        recipe = self.read(i, earlier)
        with self._naming(i, Path(scratch)):
          command.merge({folder: recipe}, options, origins)
        if name is not None:
          earlier[name] = folder
          origins[folder] = {"path": name, "made_by": json.loads((folder / command.RECORD).read_text(encoding="utf-8"))}
    return len(self.names)


def _write_headers(folder: Path, recipe: Recipe, tensors: Sequence[command.Tensor], aligned: command.Aligned | None,
                   ) -> None:
  """Writes what later documents are checked with: all of a recipe's output but the bytes of its weights."""
  folder.mkdir(parents=True)
  command.write_companions([folder], recipe, tensors, aligned)
  header, _ = safetensors.make_header(tensors)
  with (folder / checkpoint_folder.WEIGHTS).open("wb") as file:
    file.write(header)
    file.truncate(len(header) + sum(map(command.count_bytes, tensors)))  # takes no space: a hole
