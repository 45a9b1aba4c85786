"""Checkpoints by name: a folder, the embedded model, or a model of the Hugging Face hub."""

import re
from pathlib import Path

from imm_jax.errors import UserError
from imm_jax.model.folder import INDEX, SIDE_FILES

_EMBEDDED = Path(__file__).parent.parent / "assets"
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def resolve(model: str) -> Path:
  """The checkpoint folder that a name means; a model of the hub is downloaded, or taken from the cache.

  Args:
    model: a folder, `tiny` for the embedded model, or a hub id such as `Qwen/Qwen2.5-0.5B-Instruct`. A folder counts
      before a hub id.

  Raises:
    UserError: when there is no such folder, or the hub refuses; with the line to run.
  """
  if not model:
    raise UserError("the model's name is empty; expected an HF checkpoint folder, a hub id such as "
                    "Qwen/Qwen2.5-0.5B-Instruct, or tiny for the embedded model")
  if model == "tiny":
    return _EMBEDDED / model
  return Path(model) if is_local(model) else _download(model)


def config_folder(model: str) -> Path | None:
  """A folder with the model's config.json, without a download: None for a model of the hub that is not in the cache.

  Raises:
    UserError: for an empty name.
  """
  if is_local(model):
    return resolve(model)
  import huggingface_hub

  found = huggingface_hub.try_to_load_from_cache(model, "config.json")
  return Path(found).parent if isinstance(found, str) else None


def is_local(model: str) -> bool:
  """Whether a name means a folder of this machine; what is neither that nor a hub id counts as one, as a file does."""
  return model == "tiny" or Path(model).exists() or not _HUB_ID.fullmatch(model)


def _download(model: str) -> Path:
  import huggingface_hub  # late: most runs have a folder
  from huggingface_hub import errors

  instead = f"or `hf download {model} --local-dir=DIR` where there is a network, and give DIR"
  try:
    # Weights in safetensors only; what broke off goes on where it was.
    folder = Path(huggingface_hub.snapshot_download(model, allow_patterns=[*SIDE_FILES, INDEX, "*.safetensors"]))
  except errors.GatedRepoError as e:
    raise UserError(f"{model}: is gated; accept its terms at https://huggingface.co/{model}, run `hf auth login`, and "
                    "start again") from e
  except errors.RepositoryNotFoundError as e:
    raise UserError(f"{model}: no such folder, and no such model on the hub that you may read; check the name, or run "
                    "`hf auth login` if it is private") from e
  except Exception as e:  # the hub's own, the system's, and those of whichever HTTP library it uses
    cause = str(e).strip().partition("\n")[0]
    raise UserError(f"{model}: no such folder, and the hub cannot be reached ({cause}); try again, {instead}") from e
  if not any(folder.glob("*.safetensors")):
    raise UserError(f"{model}: has no safetensors on the hub (a pickle checkpoint is not read); take a model that has, "
                    "or save it again with save_pretrained(..., safe_serialization=True) and give that folder")
  return folder
