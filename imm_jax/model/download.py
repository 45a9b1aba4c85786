"""Models of the Hugging Face hub: config.json first, and where that can be read, exactly the files that are needed."""

import contextlib
import glob
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from imm_jax import files
from imm_jax.errors import UserError, listed
from imm_jax.model import folder as checkpoint, tokenizer
from imm_jax.model.config import ModelConfig
from imm_jax.model.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, SIDE_FILES, TEMPLATES, WEIGHTS
from imm_jax.model.lora_config import read_settings

# Seconds that the hub has to list a repository's files.
_PATIENCE = 30


class _Repository(NamedTuple):
  """One commit of a repository of the hub, in the cache of this machine.

  Attributes:
    name: what the user gave.
    id: org/name.
    folder: the snapshot of the commit.
    sizes: bytes of every file by its path; None where the hub cannot be asked.
    why: it cannot.
  """

  name: str
  id: str
  folder: Path
  sizes: Mapping[str, int] | None
  why: str = ""

  @property
  def commit(self) -> str:
    return self.folder.name


def model(name: str) -> Path:
  """Brings a model, `org/name` or `org/name@revision`, into the hub's cache: its folder there.

  config.json comes first and is judged; then, all of the commit that it is of, the weights that the index names,
  tokenizer and templates. Without a network, what is whole in the cache will do.

  Raises:
    UserError: when the hub refuses or cannot be reached, or the model is none that can be read.
  """
  with _refusals(name):
    repository = _open(name, "config.json")
    ModelConfig.from_hf(files.read_json(repository.folder / "config.json"), source=f"{name}/config.json")
    sizes = repository.sizes
    if sizes is None:
      return _whole(repository)
    checkpoint.check_quantised(name, sizes)
    if not any(file in sizes for file in tokenizer.FILES):
      raise UserError(f"{name}: has no tokenizer on the hub; expected {' or '.join(tokenizer.FILES)}; take a model "
                      "that has, or download it, put the tokenizer beside it, and give that folder")
    if INDEX in sizes:
      _fetch(repository, [INDEX])
      weights = checkpoint.shards(repository.folder / INDEX)
      if WEIGHTS in sizes and weights != [WEIGHTS]:
        raise UserError(f"{name}: holds both {WEIGHTS} and {INDEX} on the hub, which are two checkpoints; download the "
                        "one that is meant, and give that folder")
      if missing := [file for file in weights if file not in sizes]:
        raise UserError(f"{name}: {INDEX} names {listed(missing)}, which the hub does not hold; take another revision")
    elif WEIGHTS in sizes:
      weights = [WEIGHTS]
    else:
      unread = checkpoint.unread_weights(sizes)
      raise UserError(f"{name}: has no {WEIGHTS} on the hub" + (
          f", only {unread}" if unread else f"; take a model that has it or {INDEX}"))
    _fetch(repository, [file for file in sizes if _is_side(file) or file == ADAPTER_CONFIG] + weights)
    return repository.folder


def adapter(name: str) -> Path:
  """Brings a LoRA adapter of the hub into its cache as `model` does: adapter_config.json, then what is beside it."""
  with _refusals(name):
    repository = _open(name, ADAPTER_CONFIG)
    read_settings(repository.folder, source=name)
    if repository.sizes is None:
      if not (repository.folder / ADAPTER_WEIGHTS).exists():
        raise ConnectionError(f"{repository.why}; the cache holds only a part of it")
    elif ADAPTER_WEIGHTS not in repository.sizes:
      raise UserError(f"{name}: has no {ADAPTER_WEIGHTS} on the hub (adapter_model.bin is a pickle, which is not read)")
    else:
      side = [file for file in repository.sizes if _is_side(file) and file != "config.json"]
      _fetch(repository, [*side, ADAPTER_WEIGHTS])
    return repository.folder


def cached_config(name: str) -> Path | None:
  """The folder in the cache with a model's config.json, without asking the hub; None where there is none.

  Raises:
    UserError: for an id that the hub cannot have.
  """
  import huggingface_hub

  id_, _, revision = name.partition("@")
  with _refusals(name):
    found = huggingface_hub.try_to_load_from_cache(id_, "config.json", revision=revision or None)
  return Path(found).parent if isinstance(found, str) else None


def _open(name: str, first: str) -> _Repository:
  """Fetches the first file, whose commit all others are taken of, and asks for their sizes."""
  import huggingface_hub  # late: most runs have a folder
  from huggingface_hub import errors

  id_, _, revision = name.partition("@")
  try:
    folder = Path(huggingface_hub.hf_hub_download(id_, first, revision=revision or None)).parent
  except errors.EntryNotFoundError as e:
    if isinstance(e, errors.LocalEntryNotFoundError):
      raise
    if first == ADAPTER_CONFIG:
      raise UserError(f"{name}: has no {first} on the hub; expected a LoRA adapter, as the second of BASE+ADAPTER"
                      ) from e
    _refuse_adapter(name, id_, revision)
    try:
      unread = checkpoint.unread_weights(_list(id_, revision or "main"))
    except Exception:  # it is for the message alone
      unread = ""
    raise UserError(f"{name}: has no {first} on the hub" + (
        f", only {unread}" if unread else "; expected a model of transformers")) from e
  try:
    return _Repository(name, id_, folder, _list(id_, folder.name))
  except Exception as e:  # as in `_refusals`; the cache may have all
    return _Repository(name, id_, folder, None, _first_line(e))


def _list(id_: str, revision: str) -> dict[str, int]:
  """The bytes of every file of a repository by its path."""
  import huggingface_hub

  info = huggingface_hub.HfApi().model_info(id_, revision=revision, files_metadata=True, timeout=_PATIENCE)
  return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _refuse_adapter(name: str, id_: str, revision: str) -> None:
  """Raises UserError where a repository without config.json holds a LoRA adapter."""
  import huggingface_hub

  try:
    path = huggingface_hub.hf_hub_download(id_, ADAPTER_CONFIG, revision=revision or None)
  except Exception:  # it is none, or cannot be told
    return
  raise checkpoint.no_model(name, Path(path))


def _fetch(repository: _Repository, names: list[str]) -> None:
  """Downloads those that are not in the cache, after a line on how much that is where weights are among them."""
  import huggingface_hub

  missing = [name for name in names if not (repository.folder / name).exists()]
  if not missing:
    return
  if any(name.endswith(".safetensors") for name in missing):
    total = sum(repository.sizes[name] for name in missing)
    print(f"{repository.name}: fetching {len(missing)} files, {_readable(total)}", file=sys.stderr, flush=True)
  # What broke off goes on where it was.
  huggingface_hub.snapshot_download(repository.id, revision=repository.commit,
                                    allow_patterns=[glob.escape(name) for name in missing])


def _whole(repository: _Repository) -> Path:
  """The folder in the cache, where weights and tokenizer are there; the hub cannot say what else there is."""
  try:
    checkpoint.weight_files(repository.folder)
  except UserError as e:
    raise ConnectionError(f"{repository.why}; the cache holds only a part of it") from e
  if not tokenizer.has_tokenizer(repository.folder):
    raise ConnectionError(f"{repository.why}; the cache holds its weights, but no tokenizer")
  # Without them other tokens may end a text, so a run would give other answers.
  if missing := [file for file in ("generation_config.json", "tokenizer_config.json")
                 if not (repository.folder / file).exists()]:
    print(f"note: {repository.name}: the hub cannot be asked, and the cache holds no {listed(missing)}; the model may "
          "have more files than that", file=sys.stderr)
  return repository.folder


def _is_side(name: str) -> bool:
  parent, _, file = name.rpartition("/")
  return name in SIDE_FILES or (parent == TEMPLATES and file.endswith(".jinja"))


def _readable(size: int) -> str:
  return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _first_line(error: Exception) -> str:
  return str(error).strip().partition("\n")[0]


@contextlib.contextmanager
def _refusals(name: str) -> Iterator[None]:
  """Makes one line of what the hub, the network and the disk refuse."""
  from huggingface_hub import errors

  id_, _, revision = name.partition("@")
  instead = (f"or `hf download {id_}{f' --revision={revision}' if revision else ''} --local-dir=DIR` where there is a "
             "network, and give DIR")
  try:
    yield
  except UserError:
    raise
  except errors.GatedRepoError as e:
    raise UserError(f"{name}: is gated; accept its terms at https://huggingface.co/{id_}, run `hf auth login`, and "
                    "start again") from e
  except errors.RevisionNotFoundError as e:
    raise UserError(f"{name}: {id_} has no revision {revision!r} on the hub; expected a branch, a tag or a commit"
                    ) from e
  except errors.RepositoryNotFoundError as e:
    raise UserError(f"{name}: no such folder, and no such model on the hub that you may read; check the name, or run "
                    "`hf auth login` if it is private") from e
  except errors.HFValidationError as e:
    raise UserError(f"{name}: no such folder, and no id that the hub can have ({_first_line(e)})") from e
  except Exception as e:  # the hub's own, the system's, and those of whichever HTTP library it uses
    chain = [e, *filter(None, (e.__cause__, e.__context__))]
    for cause in chain:
      if isinstance(cause, OSError) and (refusal := files.refusal(f"{name}: the hub's cache", cause)):
        raise refusal from e
    answer = next((cause for cause in chain if isinstance(cause, errors.HfHubHTTPError)), None)
    if answer is not None:
      status = getattr(getattr(answer, "response", None), "status_code", None)
      raise UserError(f"{name}: the hub refuses ({_first_line(answer)}); " + (
          "too much was asked of it: wait, or run `hf auth login` for a higher limit" if status == 429 else
          f"try again, {instead}")) from e
    raise UserError(f"{name}: no such folder, and the hub cannot be reached ({_first_line(e)}); try again, {instead}"
                    ) from e
