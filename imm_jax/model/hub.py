"""Checkpoints by name: a folder, the embedded model, a model of the Hugging Face hub, and each with a LoRA adapter."""

import re
from pathlib import Path
from types import ModuleType

from imm_jax.errors import UserError, say_once
from imm_jax.model import folder as checkpoint

_EMBEDDED = Path(__file__).parent.parent / "assets"
# org/name, and a revision: a branch, a tag, a commit, or refs/pr/1.
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?")
# What people put around an id: a page of the hub, and the file or the branch that it shows.
_ADDRESS = re.compile(r"(?:https?://|hf://)?(?:www\.)?(?:(?:huggingface|hf)\.co/)?(.*?)"
                      r"(?:(?:/tree/|:)([^/]*)|/blob/.*|/resolve/.*)?")


def resolve(model: str) -> Path:
  """The checkpoint folder that a name means; a model of the hub is downloaded, or taken from the cache.

  Args:
    model: a folder, `tiny` for the embedded model, a hub id such as `Qwen/Qwen2.5-0.5B-Instruct` or, of a revision,
      `Qwen/Qwen2.5-0.5B-Instruct@main`; or BASE+ADAPTER, each a folder or a hub id: a LoRA adapter of peft, which is
      merged into its base once and then taken from a cache (`lora.materialise`). A folder counts before the others.

  Raises:
    UserError: when there is no such folder, or the hub refuses, with the line to run; or as `lora.merge` does.
  """
  if not model:
    raise UserError("the model's name is empty; expected an HF checkpoint folder, a hub id such as "
                    "Qwen/Qwen2.5-0.5B-Instruct, or tiny for the embedded model")
  if pair := split_adapter(model):
    from imm_jax.model import lora  # late: most runs have none

    return lora.materialise(*parts(model), name="+".join(_label(part) for part in pair))
  found = _EMBEDDED / model if model == "tiny" else _folder(model) if is_local(model) else _download().model(model)
  if (found / checkpoint.ADAPTER_CONFIG).exists() and checkpoint.has_weights(found):
    say_once(f"note: {model}: holds a whole model and a LoRA adapter; the adapter is ignored")
  return found


def parts(model: str) -> tuple[Path, Path]:
  """The folders of base and adapter of BASE+ADAPTER; downloads as `resolve` does, the adapter first, which is small."""
  base, adapter = split_adapter(model) or (model, "")
  here = lambda name: _EMBEDDED / name if name == "tiny" else Path(name)
  is_adapter = lambda name: (here(name) / checkpoint.ADAPTER_CONFIG).exists()
  if is_adapter(base) and not checkpoint.has_weights(here(base)) and not is_adapter(adapter) and (
      checkpoint.has_weights(here(adapter)) or not is_local(adapter)):
    raise UserError(f"{model}: {base} is a LoRA adapter and {adapter} a model; give {adapter}+{base}")
  found = here(adapter) if is_local(adapter) else _download().adapter(adapter)
  return resolve(base), found


def split_adapter(model: str) -> tuple[str, str] | None:
  """BASE and ADAPTER of a name that means a model with an adapter; None for all others.

  Raises:
    UserError: where one side of a + is a model and the other is none.

  >>> split_adapter("Qwen/Qwen2.5-0.5B+someone/adapter@v2")
  ('Qwen/Qwen2.5-0.5B', 'someone/adapter@v2')
  """
  if "+" not in model or Path(model).exists():
    return None
  splits = [(model[:i], model[i + 1:]) for i, letter in enumerate(model) if letter == "+"]
  exists = lambda name: name == "tiny" or bool(name and Path(name).is_dir())
  known = lambda name: exists(name) or _HUB_ID.fullmatch(name) is not None
  for judge in (exists, known):
    if found := next((pair for pair in splits if all(map(judge, pair))), None):
      return found
  for base, adapter in splits:
    if known(base) or exists(adapter):
      missing, what = (adapter, "adapter") if known(base) else (base, "base model")
      raise UserError(f"{model}: no such {what} folder, and no hub id: {missing!r}; expected BASE+ADAPTER, each a "
                      "folder or a hub id")
  return None


def base_of(model: str) -> str:
  """BASE of BASE+ADAPTER, and every other name itself."""
  return (split_adapter(model) or (model,))[0]


def config_folder(model: str) -> Path | None:
  """A folder with the model's config.json, without a download: None for a model of the hub that is not in the cache.

  Of a model with an adapter it is the base's.

  Raises:
    UserError: for an empty name, a folder that is not there, or an id that the hub cannot have.
  """
  model = base_of(model)
  return resolve(model) if is_local(model) else _download().cached_config(model)


def _download() -> ModuleType:
  """The module that asks the hub: late, for most runs have folders."""
  from imm_jax.model import download

  return download


def is_local(model: str) -> bool:
  """Whether a name means a folder of this machine; what is neither that nor a hub id counts as one, as a file does.

  A model with an adapter is none before `resolve` has merged them.
  """
  return model == "tiny" or Path(model).exists() or not (_HUB_ID.fullmatch(model) or split_adapter(model))


def _folder(model: str) -> Path:
  """The folder of this name; raises UserError where there is none, with what may have been meant."""
  if Path(model).exists():
    return Path(model)
  address, branch = _ADDRESS.fullmatch(model.strip()).groups()
  meant = address.rstrip("/@") + (f"@{branch}" if branch else "")
  meant = str(Path(model).expanduser()) if model.startswith("~") else meant if (
      _HUB_ID.fullmatch(meant) or Path(meant).is_dir()) else ""
  raise UserError(f"{model}: no such checkpoint folder; expected a folder with config.json and "
                  f"{checkpoint.WEIGHTS}, or a hub id, org/name or org/name@revision"
                  + (f"; did you mean {meant!r}?" if meant and meant != model else ""))


def _label(name: str) -> str:
  """The last part of a folder's name or a hub id, as part of a file's name."""
  return re.sub(r"[^\w.-]", "_", Path(name).absolute().name)[:60]
