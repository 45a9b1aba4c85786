"""Resolves names of checkpoints: folders, the embedded model, models of the Hugging Face hub, and LoRA adapters."""

import re
from pathlib import Path
from types import ModuleType

from imm_jax.errors import UserError, print_once
from imm_jax.model import checkpoint_folder

_EMBEDDED = Path(__file__).parent.parent / "assets"
# org/name with an optional @revision: a branch, a tag, a commit, or refs/pr/1.
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?")
# Addresses that users give in place of an id: a page of the hub, a file or a branch on it.
_ADDRESS = re.compile(r"(?:https?://|hf://)?(?:www\.)?(?:(?:huggingface|hf)\.co/)?(.*?)"
                      r"(?:(?:/tree/|:)([^/]*)|/blob/.*|/resolve/.*)?")


def resolve(model: str) -> Path:
  """Returns the checkpoint folder for a name; a model of the hub is downloaded unless it is in the cache.

  Args:
    model: a folder; `tiny` for the embedded model; a hub id such as `Qwen/Qwen2.5-0.5B-Instruct`, with a revision
      `Qwen/Qwen2.5-0.5B-Instruct@main`; or BASE+ADAPTER, each a folder or a hub id, where ADAPTER is a LoRA adapter of
      peft, which is merged into its base once and then taken from a cache (`lora.materialize`). Existing folders take
      precedence.

  Raises:
    UserError: if there is no such folder, or the hub refuses; says what to run. Also as `lora.merge` does.
  """
  if not model:
    raise UserError("the model's name is empty; expected an HF checkpoint folder, a hub id such as "
                    "Qwen/Qwen2.5-0.5B-Instruct, or tiny for the embedded model")
  if pair := split_adapter(model):
    from imm_jax.model import lora  # imported here because most runs have no adapter

    return lora.materialize(*resolve_pair(model), name="+".join(_label(part) for part in pair))
  resolved = (_EMBEDDED / model if model == "tiny" else _resolve_folder(model) if is_local(model)
              else _download().fetch_model(model))
  if (resolved / checkpoint_folder.ADAPTER_CONFIG).exists() and checkpoint_folder.has_weights(resolved):
    print_once(f"note: {model}: holds a whole model and a LoRA adapter; the adapter is ignored")
  return resolved


def resolve_pair(model: str) -> tuple[Path, Path]:
  """Returns the folders of base and adapter of BASE+ADAPTER; downloads the adapter, which is small, first."""
  base, adapter = split_adapter(model) or (model, "")
  local_path = lambda name: _EMBEDDED / name if name == "tiny" else Path(name)
  is_adapter = lambda name: (local_path(name) / checkpoint_folder.ADAPTER_CONFIG).exists()
  if is_adapter(base) and not checkpoint_folder.has_weights(local_path(base)) and not is_adapter(adapter) and (
      checkpoint_folder.has_weights(local_path(adapter)) or not is_local(adapter)):
    raise UserError(f"{model}: {base} is a LoRA adapter and {adapter} a model; give {adapter}+{base}")
  adapter_folder = local_path(adapter) if is_local(adapter) else _download().fetch_adapter(adapter)
  return resolve(base), adapter_folder


def split_adapter(model: str) -> tuple[str, str] | None:
  """Splits a name of the form BASE+ADAPTER; returns None for all others.

  Raises:
    UserError: if only one side of a + is a model.

  >>> split_adapter("Qwen/Qwen2.5-0.5B+someone/adapter@v2")
  ('Qwen/Qwen2.5-0.5B', 'someone/adapter@v2')
  """
  if "+" not in model or Path(model).exists():
    return None
  splits = [(model[:i], model[i + 1:]) for i, letter in enumerate(model) if letter == "+"]
  exists = lambda name: name == "tiny" or bool(name and Path(name).is_dir())
  plausible = lambda name: exists(name) or _HUB_ID.fullmatch(name) is not None
  for predicate in (exists, plausible):
    if pair := next((pair for pair in splits if all(map(predicate, pair))), None):
      return pair
  for base, adapter in splits:
    if plausible(base) or exists(adapter):
      missing, role = (adapter, "adapter") if plausible(base) else (base, "base model")
      raise UserError(f"{model}: no such {role} folder, and no hub id: {missing!r}; expected BASE+ADAPTER, each a "
                      "folder or a hub id")
  return None


def strip_adapter(model: str) -> str:
  """Returns BASE of BASE+ADAPTER, and any other name unchanged."""
  return (split_adapter(model) or (model,))[0]


def find_config_folder(model: str) -> Path | None:
  """Finds a folder with the model's config.json without a download; None for a hub model that is not in the cache.

  For a model with an adapter it is the base's.

  Raises:
    UserError: for an empty name, a missing folder, or an invalid hub id.
  """
  model = strip_adapter(model)
  return resolve(model) if is_local(model) else _download().find_cached_config(model)


def _download() -> ModuleType:
  """Imports the module that accesses the hub, which runs on local folders do not need."""
  from imm_jax.model import download

  return download


def is_local(model: str) -> bool:
  """Returns whether a name refers to this machine: an existing path, or anything that is not a hub id or BASE+ADAPTER.
  """
  return model == "tiny" or Path(model).exists() or not (_HUB_ID.fullmatch(model) or split_adapter(model))


def _resolve_folder(model: str) -> Path:
  """Returns the folder of this name; raises UserError with a suggestion if there is none."""
  if Path(model).exists():
    return Path(model)
  address, branch = _ADDRESS.fullmatch(model.strip()).groups()
  suggestion = address.rstrip("/@") + (f"@{branch}" if branch else "")
  suggestion = str(Path(model).expanduser()) if model.startswith("~") else suggestion if (
      _HUB_ID.fullmatch(suggestion) or Path(suggestion).is_dir()) else ""
  raise UserError(f"{model}: no such checkpoint folder; expected a folder with config.json and "
                  f"{checkpoint_folder.WEIGHTS}, or a hub id, org/name or org/name@revision"
                  + (f"; did you mean {suggestion!r}?" if suggestion and suggestion != model else ""))


def _label(name: str) -> str:
  """Returns the last component of a folder's path or a hub id, made safe for file names."""
  return re.sub(r"[^\w.-]", "_", Path(name).absolute().name)[:60]
