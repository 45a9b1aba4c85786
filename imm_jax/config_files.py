"""Finds and loads config files by name or path: `tiny`, `qwen:1.5b`, `configs/tiny.py` or the user's own file.

The package's config files are in `configs/`: beside the package in a clone, in the package otherwise. Config files
import each other with `from configs import common`.
"""

import contextlib
import inspect
import re
import runpy
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import ml_collections

from imm_jax.errors import UserError, suggest

_ROOT = Path(__file__).resolve().parent
FOLDER = next((folder for folder in (_ROOT / "configs", _ROOT.parent / "configs") if folder.is_dir()),
              _ROOT / "configs")
_PACKAGE = "configs"
# Modules that config files import, and the recipe of `imm_jax.pretrain`: no configs of runs.
_NO_CONFIGS = ("__init__", "arguments", "reasoning", "tiny_pretrain")


def list_names() -> list[str]:
  """Lists the names of the config files that come with this package."""
  return sorted(file.stem for file in FOLDER.glob("*.py") if file.stem not in _NO_CONFIGS)


def find(name: str) -> Path:
  """Returns the file at the path `name`; for `NAME` and `configs/NAME.py` else the file that comes with this package.

  Raises:
    UserError: when there is neither.

  >>> find("tiny").name
  'tiny.py'
  """
  path = Path(name).expanduser()
  if path.is_file():
    return path
  stem = path.name.removesuffix(".py")
  if path.parent in (Path(), Path(_PACKAGE)) and stem in list_names():
    return FOLDER / f"{stem}.py"
  raise UserError(f"--config={name}: no such file, and no config of this name comes with imm_jax; "
                  f"{suggest(stem, list_names())}")


def load(name: str) -> ml_collections.ConfigDict:
  """Loads a config file by name or path; text after a colon is its argument: `qwen:1.5b,task=math`.

  Raises:
    UserError: when there is no such file, it cannot be loaded, or its `get_config` returns no ConfigDict.

  >>> load("tiny").sft.global_batch, load("qwen:1.5b").model
  (20, 'Qwen/Qwen2.5-1.5B-Instruct')
  """
  path, colon, argument = name.partition(":")
  file = find(path)
  with importable(file):
    try:
      get_config = runpy.run_path(str(file))["get_config"]
      is_refused = colon and not inspect.signature(get_config).parameters
      settings = None if is_refused else get_config(*[argument] * bool(colon))
    except Exception as e:  # a config file is Python and may raise anything
      raise UserError(describe_failure(file, e)) from e
  if is_refused:
    raise UserError(f"--config={name}: {path} takes no argument after a colon")
  if not isinstance(settings, ml_collections.ConfigDict):
    raise UserError(f"{file}: get_config() returns {type(settings).__name__}; expected a ConfigDict")
  return settings


def is_raised_in(file: Path, error: Exception) -> bool:
  """Returns whether an error comes from a config file's own lines, or what they call."""
  return any(frame.filename == str(file) for frame in traceback.extract_tb(error.__traceback__))


def describe_failure(file: Path, error: Exception, text: str = "") -> str:
  """Describes in one line why a config file cannot be loaded: the file, the line in it, and the error.

  Args:
    file: the config file.
    error: what it raised.
    text: the printed traceback of the error, if that is all that is known of it.
  """
  from imm_jax.config_keys import explain  # imported here because it imports this module
  if isinstance(error, AttributeError | KeyError) and "get_config" in str(error):
    return f"{file}: cannot be loaded: it defines no get_config()"
  if text:
    lines = re.findall(rf'File "{re.escape(str(file))}", line (\d+)', text)
    reason = explain(Exception(text)) or text.strip().splitlines()[-1]
  else:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    reason = explain(error) or f"{type(error).__name__}: {' '.join(str(error).split())}"
  return f"{file}{f':{lines[-1]}' if lines else ''}: cannot be loaded: {reason}"


@contextlib.contextmanager
def importable(file: Path | None) -> Iterator[None]:
  """Makes `from configs import NAME` import this package's config files for the length of a block.

  It works in any current directory, and even if another package is called `configs`. If the folder of `file` is called
  `configs`, its files take precedence; files in another folder FOLDER can be imported with `from FOLDER import NAME`
  or `import NAME`.
  """
  parents = [] if file is None else [str(file.resolve().parent.parent)]
  configs = [file.resolve().parent] if file is not None and file.resolve().parent.name == _PACKAGE else []
  hidden = {name: sys.modules.pop(name) for name in _list_loaded()}
  package = ModuleType(_PACKAGE)
  package.__path__ = list(dict.fromkeys(map(str, (*configs, FOLDER))))
  sys.modules[_PACKAGE] = package
  beside = [path for path in ([str(file.resolve().parent)] if file is not None else []) if path not in sys.path]
  sys.path[:] = [*parents, *sys.path, *beside]  # last, so that they hide nothing
  try:
    yield
  finally:
    for name in _list_loaded():
      del sys.modules[name]
    sys.modules.update(hidden)
    for path in (*parents, *beside):
      sys.path.remove(path)


def _list_loaded() -> list[str]:
  return [name for name in sys.modules if name == _PACKAGE or name.startswith(f"{_PACKAGE}.")]


def list_keys(settings: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
  """Lists the keys of all settings, with dots in those of groups.

  >>> [key for key in list_keys(load("tiny")) if key.startswith("merge.auto.g")]
  ['merge.auto.general', 'merge.auto.groups']
  """
  keys = []
  for key in settings:
    name, value = f"{prefix}{key}", settings[key]
    keys += list_keys(value, f"{name}.") if isinstance(value, ml_collections.ConfigDict) else [name]
  return keys
