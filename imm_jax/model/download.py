"""Downloads models of the Hugging Face hub: config.json first, and if it is supported exactly the files needed."""

import contextlib
import glob
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from imm_jax import files
from imm_jax.errors import ResourceError, UserError, first_line, join_items
from imm_jax.formatting import format_size
from imm_jax.model import checkpoint_folder, tokenizer
from imm_jax.model.checkpoint_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, SIDE_FILES, TEMPLATES, WEIGHTS
from imm_jax.model.config import ModelConfig
from imm_jax.model.lora_config import read_adapter_config

# Seconds to wait for the hub to list a repository's files.
_TIMEOUT = 30


class _Repository(NamedTuple):
  """Describes one commit of a repository of the hub, in the local cache.

  Attributes:
    name: name given by the user.
    id: org/name.
    folder: snapshot folder of the commit.
    sizes: path -> bytes of every file; None if the hub cannot be reached.
    offline_reason: the reason why it cannot.
  """

  name: str
  id: str
  folder: Path
  sizes: Mapping[str, int] | None
  offline_reason: str = ""

  @property
  def commit(self) -> str:
    return self.folder.name


def fetch_model(name: str) -> Path:
  """Downloads a model, `org/name` or `org/name@revision`, to the hub's cache and returns its folder.

  config.json comes first and is checked; then, of the same commit, the weights that the index names, tokenizer and
  templates. Without a network a complete model in the cache is used.

  Raises:
    UserError: if the hub refuses or cannot be reached, or the model is not supported.
  """
  with _translate_errors(name):
    repository = _open_repository(name, "config.json")
    ModelConfig.from_hf(files.read_json(repository.folder / "config.json"), source=f"{name}/config.json")
    sizes = repository.sizes
    if sizes is None:
      return _complete_from_cache(repository)
    checkpoint_folder.check_not_quantized(name, sizes)
    if not any(file in sizes for file in tokenizer.FILES):
      raise UserError(f"{name}: has no tokenizer on the hub; expected {' or '.join(tokenizer.FILES)}; take a model "
                      "that has, or download it, put the tokenizer into its folder, and give that folder")
    if INDEX in sizes:
      _fetch(repository, [INDEX])
      weights = checkpoint_folder.read_index(repository.folder / INDEX)
      if WEIGHTS in sizes and weights != [WEIGHTS]:
        raise UserError(f"{name}: holds both {WEIGHTS} and {INDEX} on the hub, which are two checkpoints; download the "
                        "one that is meant, and give that folder")
      if missing := [file for file in weights if file not in sizes]:
        raise UserError(f"{name}: {INDEX} names {join_items(missing)}, which the hub does not hold; take another "
                        "revision")
    elif WEIGHTS in sizes:
      weights = [WEIGHTS]
    else:
      unread = checkpoint_folder.unread_weights(sizes)
      raise UserError(f"{name}: has no {WEIGHTS} on the hub" + (
          f", only {unread}" if unread else f"; take a model that has it or {INDEX}"))
    _fetch(repository, [file for file in sizes if _is_side_file(file) or file == ADAPTER_CONFIG] + weights)
    return repository.folder


def fetch_adapter(name: str) -> Path:
  """Downloads a LoRA adapter as `fetch_model` does a model: adapter_config.json first, then the other files."""
  with _translate_errors(name):
    repository = _open_repository(name, ADAPTER_CONFIG)
    read_adapter_config(repository.folder, source=name)
    if repository.sizes is None:
      if not (repository.folder / ADAPTER_WEIGHTS).exists():
        raise ConnectionError(f"{repository.offline_reason}; the cache holds only a part of it")
    elif ADAPTER_WEIGHTS not in repository.sizes:
      raise UserError(f"{name}: has no {ADAPTER_WEIGHTS} on the hub (adapter_model.bin is a pickle, which is not read)")
    else:
      side = [file for file in repository.sizes if _is_side_file(file) and file != "config.json"]
      _fetch(repository, [*side, ADAPTER_WEIGHTS])
    return repository.folder


def find_cached_config(name: str) -> Path | None:
  """Finds the cache folder with a model's config.json without asking the hub; None if there is none.

  Raises:
    UserError: for an invalid hub id.
  """
  import huggingface_hub

  repo_id, _, revision = name.partition("@")
  with _translate_errors(name):
    path = huggingface_hub.try_to_load_from_cache(repo_id, "config.json", revision=revision or None)
  return Path(path).parent if isinstance(path, str) else None


def _open_repository(name: str, first: str) -> _Repository:
  """Downloads the file `first`, whose commit all others are taken from, and asks for their sizes."""
  import huggingface_hub  # imported here because most runs use local folders
  from huggingface_hub import errors

  huggingface_hub.utils.logging.disable_propagation()  # else absl prints each line on a retry once more
  repo_id, _, revision = name.partition("@")
  try:
    folder = Path(huggingface_hub.hf_hub_download(repo_id, first, revision=revision or None)).parent
  except errors.EntryNotFoundError as e:
    if isinstance(e, errors.LocalEntryNotFoundError):
      raise
    if first == ADAPTER_CONFIG:
      raise UserError(f"{name}: has no {first} on the hub; expected a LoRA adapter, as the second of BASE+ADAPTER"
                      ) from e
    _check_no_adapter(name, repo_id, revision)
    try:
      unread = checkpoint_folder.unread_weights(_list_files(repo_id, revision or "main"))
    except Exception:  # only the message depends on it
      unread = ""
    raise UserError(f"{name}: has no {first} on the hub" + (
        f", only {unread}" if unread else "; expected a model of transformers")) from e
  try:
    return _Repository(name, repo_id, folder, _list_files(repo_id, folder.name))
  except Exception as e:  # as in `_translate_errors`; the cache may be complete
    return _Repository(name, repo_id, folder, None, first_line(e))


def _list_files(repo_id: str, revision: str) -> dict[str, int]:
  """Returns the size in bytes of every file of a repository by its path."""
  import huggingface_hub

  info = huggingface_hub.HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=_TIMEOUT)
  return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _check_no_adapter(name: str, repo_id: str, revision: str) -> None:
  """Raises UserError if a repository without config.json holds a LoRA adapter."""
  import huggingface_hub

  try:
    path = huggingface_hub.hf_hub_download(repo_id, ADAPTER_CONFIG, revision=revision or None)
  except Exception:  # it is no adapter, or the hub cannot be reached
    return
  raise checkpoint_folder.adapter_error(name, Path(path))


def _fetch(repository: _Repository, names: list[str]) -> None:
  """Downloads the files that are not in the cache; announces their size if weights are among them."""
  import huggingface_hub

  missing = [name for name in names if not (repository.folder / name).exists()]
  if not missing:
    return
  if any(name.endswith(".safetensors") for name in missing):
    total = sum(repository.sizes[name] for name in missing)
    print(f"{repository.name}: fetching {len(missing)} files, {format_size(total)}", file=sys.stderr, flush=True)
  # An interrupted download resumes.
  huggingface_hub.snapshot_download(repository.id, revision=repository.commit,
                                    allow_patterns=[glob.escape(name) for name in missing])


def _complete_from_cache(repository: _Repository) -> Path:
  """Returns the folder in the cache if it has weights and tokenizer; other files cannot be verified offline."""
  try:
    checkpoint_folder.weight_files(repository.folder)
  except UserError as e:
    raise ConnectionError(f"{repository.offline_reason}; the cache holds only a part of it") from e
  if not tokenizer.has_tokenizer(repository.folder):
    raise ConnectionError(f"{repository.offline_reason}; the cache holds its weights, but no tokenizer")
  # Without these files other tokens may end a text, which would change a run's answers.
  if missing := [file for file in ("generation_config.json", "tokenizer_config.json")
                 if not (repository.folder / file).exists()]:
    print(f"note: {repository.name}: the hub cannot be asked, and the cache holds no {join_items(missing)}; the model "
          "may have more files than that", file=sys.stderr)
  return repository.folder


def _is_side_file(name: str) -> bool:
  parent, _, file = name.rpartition("/")
  return name in SIDE_FILES or (parent == TEMPLATES and file.endswith(".jinja"))


@contextlib.contextmanager
def _translate_errors(name: str) -> Iterator[None]:
  """Translates errors of the hub, the network and the disk to a UserError of one line."""
  from huggingface_hub import errors

  repo_id, _, revision = name.partition("@")
  flag = f" --revision={revision}" if revision else ""
  alternative = f"or `hf download {repo_id}{flag} --local-dir=DIR` where there is a network, and give DIR"
  try:
    yield
  except UserError:
    raise
  except errors.GatedRepoError as e:
    raise UserError(f"{name}: is gated; accept its terms at https://huggingface.co/{repo_id}, run `hf auth login`, and "
                    "start again") from e
  except errors.RevisionNotFoundError as e:
    raise UserError(f"{name}: {repo_id} has no revision {revision!r} on the hub; expected a branch, a tag or a commit"
                    ) from e
  except errors.RepositoryNotFoundError as e:
    raise UserError(f"{name}: no such folder, and no such model on the hub that you may read; check the name, or run "
                    "`hf auth login` if it is private") from e
  except errors.HFValidationError as e:
    raise UserError(f"{name}: no such folder, and no id that the hub can have ({first_line(e)})") from e
  except Exception as e:  # errors of the hub, of the system, and of whichever HTTP library is in use
    chain = [e, *filter(None, (e.__cause__, e.__context__))]
    for cause in chain:
      if isinstance(cause, OSError) and (refusal := files.explain_disk_error(f"{name}: the hub's cache", cause)):
        raise refusal from e
    answer = next((cause for cause in chain if isinstance(cause, errors.HfHubHTTPError)), None)
    if answer is not None:
      status = getattr(getattr(answer, "response", None), "status_code", None)
      kind = ResourceError if status in (408, 429, *range(500, 600)) else UserError
      raise kind(f"{name}: the hub refuses ({first_line(answer)}); " + (
          "too much was asked of it: wait, or run `hf auth login` for a higher limit" if status == 429 else
          f"try again, {alternative}")) from e
    raise ResourceError(f"{name}: no such folder, and the hub cannot be reached ({first_line(e)}); try again, "
                    f"{alternative}") from e
