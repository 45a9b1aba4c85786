"""Config files by name or path: `tiny`, `qwen:1.5b`, `configs/tiny.py` and a file of one's own.

This package's lie in `configs/`, beside the package in a clone and in it where it was installed without one. They, and
files of others, import each other with `from configs import common`.
"""

import contextlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import ml_collections

from imm_jax.errors import UserError, suggest

_HERE = Path(__file__).resolve().parent
FOLDER = next((folder for folder in (_HERE / "configs", _HERE.parent / "configs") if folder.is_dir()),
              _HERE / "configs")
_PACKAGE = "configs"
# Not settings of a run, but what the others import.
_SHARED = ("__init__", "arguments", "reasoning")


def list_names() -> list[str]:
  """The config files that come with this package."""
  return sorted(file.stem for file in FOLDER.glob("*.py") if file.stem not in _SHARED)


def find(name: str) -> Path:
  """The file that a name means: what lies at that path, else what comes with this package.

  Raises:
    UserError: when there is neither, with the nearest name.

  >>> find("tiny") == find("no/such/folder/configs/tiny.py")
  True
  """
  path = Path(name).expanduser()
  if path.is_file():
    return path
  bare = path.parent == Path() or path.parent.name == _PACKAGE
  stem = path.name.removesuffix(".py")
  if bare and stem in list_names():
    return FOLDER / f"{stem}.py"
  raise UserError(f"--config={name}: no such file, and no config of this name comes with imm_jax; "
                  f"{suggest(stem, list_names())}")


def load(name: str) -> ml_collections.ConfigDict:
  """The settings of a config file; what follows a colon goes to it: `qwen:1.5b,task=math`.

  Raises:
    UserError: for a file that is not there, cannot be loaded, or gives no settings.

  >>> load("tiny").sft.global_batch, load("qwen:1.5b").model
  (20, 'Qwen/Qwen2.5-1.5B-Instruct')
  """
  path, given, argument = name.partition(":")
  file = find(path)
  with importable(file):
    try:
      settings = runpy.run_path(str(file))["get_config"](*[argument] * bool(given))
    except Exception as e:  # a config file is Python and may raise anything
      raise UserError(f"{file}: cannot be loaded: {type(e).__name__}: {' '.join(str(e).split())}") from e
  if not isinstance(settings, ml_collections.ConfigDict):
    raise UserError(f"{file}: get_config() returns {type(settings).__name__}; expected a ConfigDict")
  return settings


@contextlib.contextmanager
def importable(file: Path | None) -> Iterator[None]:
  """For the length of a block `from configs import NAME` finds this package's config files, whatever the current
  directory is and whichever other package of that name there is.

  Neighbours of `file` are found before them where its folder is called `configs` too; those in another folder FOLDER by
  `from FOLDER import NAME`.
  """
  around = [] if file is None else [str(file.resolve().parent.parent)]
  beside = [file.resolve().parent] if file is not None and file.resolve().parent.name == _PACKAGE else []
  others = {name: sys.modules.pop(name) for name in _loaded()}
  package = ModuleType(_PACKAGE)
  package.__path__ = list(dict.fromkeys(map(str, (*beside, FOLDER))))
  sys.modules[_PACKAGE] = package
  sys.path[:0] = around
  try:
    yield
  finally:
    for name in _loaded():
      del sys.modules[name]
    sys.modules.update(others)
    for path in around:
      sys.path.remove(path)


def _loaded() -> list[str]:
  return [name for name in sys.modules if name == _PACKAGE or name.startswith(f"{_PACKAGE}.")]


def list_keys(settings: ml_collections.ConfigDict, before: str = "") -> list[str]:
  """Returns the names of all settings, those of groups with dots.

  >>> [key for key in list_keys(load("tiny")) if key.startswith("merge.auto.g")]
  ['merge.auto.general', 'merge.auto.groups']
  """
  found = []
  for key in settings:
    value = settings[key]
    found += list_keys(value, f"{before}{key}.") if isinstance(value, ml_collections.ConfigDict) else [f"{before}{key}"]
  return found
