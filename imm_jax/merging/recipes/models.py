"""Reads what a mergekit recipe says of models and of the output's tokenizer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imm_jax.merging.recipes.recipe import Tokens
from imm_jax.merging.recipes.recipe_file import RecipeFile
from imm_jax.model import hub


def read_model(file: RecipeFile, where: str, value: Any) -> str:
  """Returns the name of a model, PATH[@REVISION][+ADAPTER[@REVISION]].

  Args:
    file: the recipe file.
    where: the value's place in it, for messages.
    value: such a name, or a mapping with `model`, and with `lora` for an adapter, each a name or a mapping with `path`
      and `revision`.

  Raises:
    UserError: if it is neither.
  """
  if not isinstance(value, dict):
    return _read_path(file, where, value)
  if "path" in value and "model" not in value:
    value = {"model": value}
  file.check_known(f"{where}.", value, {"model", "lora", "override_architecture"})
  if value.get("override_architecture") is not None:
    file.note(f"{where}.override_architecture has no effect: tensors are matched by their names")
  name = _read_path(file, f"{where}.model", value.get("model"))
  return name if value.get("lora") is None else f"{name}+{_read_path(file, f'{where}.lora', value['lora'])}"


def _read_path(file: RecipeFile, where: str, value: Any) -> str:
  path, revision = value, None
  if isinstance(value, dict):
    file.check_known(f"{where}.", value, {"path", "revision"})
    path, revision, where = value.get("path"), value.get("revision"), f"{where}.path"
  if not isinstance(path, str) or not path:
    file.fail(f"{where}={path!r}: expected a folder or a hub id, as text")
  if revision is not None and not isinstance(revision, str):
    file.fail(f"{where.removesuffix('path')}revision={revision!r}: expected a text")
  if revision:
    return _join_revision(file, where, path, revision)
  if "@" not in path or Path(path).exists():
    return path
  parts = (part.rpartition("@") for part in path.split("+"))
  return "+".join(_join_revision(file, where, part, revision) if at else revision for part, at, revision in parts)


def _join_revision(file: RecipeFile, where: str, path: str, revision: str) -> str:
  if not Path(path).is_dir():
    return f"{path}@{revision}"
  file.note(f"{where}: revision {revision!r} has no effect on a folder")
  return path


class Models:
  """Finds the folders of models; a model may be the result of an earlier document of the file."""

  def __init__(self, file: RecipeFile, earlier: Mapping[str, Path], later: Sequence[str]):
    """Takes the file, name -> folder of the earlier documents, and the names of the later ones."""
    self._file, self._earlier, self._later = file, earlier, later
    # Local folders of BASE+ADAPTER, which are read although no model of the recipe lies in them.
    self.parts: list[Path] = []
    # The folder of a model under its first spelling, so that equal folders are equal paths.
    self._folders: dict[Path, Path] = {}

  def find(self, where: str, value: Any) -> Path:
    """Returns a model's folder; the arguments are those of `read_model`."""
    name = read_model(self._file, where, value)
    if name in self._earlier:
      return self._earlier[name]
    if name in self._later:
      self._file.fail(f"{where}: {name} is the name of a later document; put that before this one")
    if name.partition("+")[0] in self._earlier:
      self._file.fail(f"{where}={name!r}: the result of a document takes no adapter")
    folder = hub.resolve(name)
    self.parts += [Path(part) for part in hub.split_adapter(name) or () if Path(part).exists()]
    return self._folders.setdefault(folder.resolve(), folder)

  def identify(self, name: str) -> Any:
    """Returns what is equal for names of the same model, such as `la`, `./la` and `la/`, without a download."""
    if name in self._earlier or name in self._later:
      return name
    base, *adapter = hub.split_adapter(name) or (name,)
    folder = hub.find_config_folder(base)
    return (base if folder is None else folder.resolve(), *(Path(part).resolve() if Path(part).exists() else part
                                                            for part in adapter))

  def read_tokens(self, raw: Mapping[str, Any]) -> Tokens | None:
    """Reads a document's `tokenizer_source` or `tokenizer`; None if it has neither."""
    file, given = self._file, raw.get("tokenizer")
    if given is None:
      source = raw.get("tokenizer_source")
      return None if source is None else Tokens(self._find_tokenizer("tokenizer_source", source))
    if "tokenizer_source" in raw:
      file.fail("tokenizer_source and tokenizer: give one of them")
    file.read_mapping("tokenizer", given, "a mapping with source")
    file.check_known("tokenizer.", given, {"source", "tokens", "pad_to_multiple_of"})
    multiple = given.get("pad_to_multiple_of")
    if multiple is not None and file.read_integer("tokenizer.pad_to_multiple_of", multiple, "a number of rows") < 1:
      file.fail(f"tokenizer.pad_to_multiple_of={multiple!r}: expected a number of rows, 1 or more")
    entries = given.get("tokens")
    entries = {} if entries is None else file.read_mapping("tokenizer.tokens", entries, "a mapping from tokens to "
                                                            "their source")
    tokens = {str(token): self._read_token(f"tokenizer.tokens.{token}", entry) for token, entry in entries.items()}
    return Tokens(self._find_tokenizer("tokenizer.source", given.get("source", "union")), tokens,
                  multiple if multiple is None else int(multiple))

  def _read_token(self, where: str, entry: Any) -> dict[str, Any]:
    file = self._file
    file.read_mapping(where, entry, "a mapping with source or force")
    file.check_known(f"{where}.", entry, {"source", "force"})
    source, where_source = entry.get("source"), f"{where}.source"
    if isinstance(source, dict) and source.get("kind") == "model_token":
      file.check_known(f"{where_source}.", source, {"kind", "model", "token", "token_id"})
      token, number = source.get("token"), source.get("token_id")
      if (token is None) == (number is None):
        file.fail(f"{where_source}: expected token or token_id")
      if token is not None and not isinstance(token, str):
        file.fail(f"{where_source}.token={token!r}: expected a text")
      if number is not None:
        number = file.read_integer(f"{where_source}.token_id", number, "a number of a row")
      source = {"kind": "model_token", "model": self.find(f"{where_source}.model", source.get("model")),
                "token": token, "token_id": number}
    elif isinstance(source, dict) and source.get("kind") == "zero":
      file.check_known(f"{where_source}.", source, {"kind"})
      source = {"kind": "zero"}
    elif source is not None:
      source = self.find(where_source, source)
    return {"source": source, "force": file.read_flag(f"{where}.force", entry.get("force", False))}

  def _find_tokenizer(self, where: str, source: Any) -> str | Path:
    return source if source in ("union", "base") else self.find(where, source)
