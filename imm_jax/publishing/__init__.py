"""Uploads checkpoints of a run to the Hugging Face hub, after checks that they are what the run wrote."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imm_jax import files, integrity
from imm_jax.errors import ResourceError, UserError, first_line, join_items
from imm_jax.model import checkpoint_folder, hf
from imm_jax.publishing import card
from imm_jax.report.results import Results
from imm_jax.runs import record as run_record

_CARD = "README.md"
# Files of a checkpoint besides its side files: weights in all formats that libraries find by name, their indices, an
# adapter, and the settings of quantized weights.
_CHECKPOINT_FILE = re.compile(
    r"[^/]*\.safetensors(\.index\.json)?|pytorch_model[^/]*\.bin(\.index\.json)?|consolidated[^/]*\.pth|params\.json|"
    r"(tf_model|flax_model)[^/]*\.(h5|msgpack)(\.index\.json)?|adapter_config\.json|adapter_model\.bin|"
    r"(quantize|quant|hf_quant)_config\.json|tokenization_[^/]*\.py|" + checkpoint_folder.TEMPLATES + r"/[^/]*\.jinja")
# HTTP status codes with which the hub says that the same request may succeed later.
_RETRY_STATUS = (408, 429, *range(500, 600))


def push(folder: Path, to: str, *, private: bool = False, revision: str | None = None, overwrite_card: bool = False,
         ) -> str:
  """Uploads a checkpoint of a run with a model card, in one commit.

  Args:
    folder: the checkpoint, such as `RUN/round_2/merged`.
    to: the repository, `ORG/NAME`; created if it does not exist.
    private: whether a new repository is private.
    revision: a branch, created if it does not exist; None for main.
    overwrite_card: whether to replace an existing README.md.

  Returns:
    The address of the commit.

  Raises:
    UserError: when the folder is no complete checkpoint, differs from what its run recorded or from what its config
      would make, or the hub refuses.
    ResourceError: when the hub cannot be reached.
  """
  hf.check_folder(folder)
  root, stage = find_run(folder)
  names = [*checkpoint_folder.list_side_files(folder),
           *[checkpoint_folder.INDEX] * (folder / checkpoint_folder.INDEX).exists(),
           *(path.name for path in checkpoint_folder.weight_files(folder))]
  check_recorded(root, stage, folder, names)
  results = Results.read(root)
  if not results.config or not any(model.kind == "base" for model in results.models):
    raise UserError(f"{root}: config.json or what run.json says of base/eval is missing or damaged "
                    f"({join_items(results.problems)})")
  check_current(root, run_record.read(root), [model.folder for model in card.select_models(results, stage)])
  text = card.format_card(results, stage, to)
  if not card.is_evaluated(results, stage):
    print(f"note: {folder}: has not been evaluated; its card says so, and has only the scores of other models",
          file=sys.stderr)
  import huggingface_hub  # imported here because it is slow to import
  from huggingface_hub import errors

  api = huggingface_hub.HfApi()
  try:
    return _upload(api, huggingface_hub, folder, names, text, to, stage, private, revision, overwrite_card)
  except errors.HFValidationError as e:
    raise UserError(f"--to={to}: is no id that the hub can have ({first_line(e)}); expected ORG/NAME") from e
  except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError) as e:
    status = getattr(getattr(e, "response", None), "status_code", None)
    if status in _RETRY_STATUS:
      raise ResourceError(f"--to={to}: the hub cannot take it now ({first_line(e)}); try again") from e
    advice = "run `hf auth login` with a token that may write there" if status in (401, 403, 404, None) else (
        "see what it says of the name, the branch and the files")
    raise UserError(f"--to={to}: the hub refuses ({first_line(e)}); {advice}") from e
  except _connection_errors() as e:
    raise ResourceError(f"--to={to}: the hub cannot be reached ({first_line(e)}); try again") from e


def _connection_errors() -> tuple[type[BaseException], ...]:
  """Returns the exceptions that mean no connection, of Python and of the HTTP library that huggingface_hub uses."""
  candidates = (("httpx", "TransportError"), ("httpx2", "TransportError"), ("requests", "ConnectionError"),
           ("requests", "Timeout"))
  return (ConnectionError, TimeoutError, *(
      getattr(sys.modules[library], kind) for library, kind in candidates if library in sys.modules))


def _upload(api: Any, library: Any, folder: Path, names: list[str], text: str, to: str, stage: str, private: bool,
            revision: str | None, overwrite_card: bool) -> str:
  exists = api.repo_exists(to)
  if exists and private and not api.model_info(to).private:
    raise UserError(f"--to={to}: is public already, and --private is given; make it private on the hub, or give "
                    "another name")
  api.create_repo(to, private=True if private else None, exist_ok=True)
  if revision:
    api.create_branch(to, branch=revision, exist_ok=True)
  existing = set(api.list_repo_files(to, revision=revision))
  add = lambda name, content: library.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
  operations = [add(name, str(folder / name)) for name in names]
  # Weights or tokenizer files that an earlier model left would be loaded as part of this one.
  old = sorted(name for name in existing - set(names)
               if name in checkpoint_folder.SIDE_FILES or _CHECKPOINT_FILE.fullmatch(name))
  operations += [library.CommitOperationDelete(path_in_repo=name) for name in old]
  if old:
    print(f"note: {to}: deleting {join_items(old)} of an earlier model")
  if _CARD not in existing or overwrite_card:
    operations.append(add(_CARD, text.encode()))
  else:
    print(f"note: {to}: keeping its {_CARD}; --overwrite_card replaces it")
  commit = api.create_commit(to, operations, commit_message=f"{stage} of a run of imm_jax", revision=revision)
  return str(getattr(commit, "commit_url", commit))


def find_run(folder: Path) -> tuple[Path, str]:
  """Returns the run directory that contains a checkpoint, and its path relative to it.

  Raises:
    UserError: when there is none.
  """
  path = folder.resolve()
  for root in path.parents:
    if (root / "run.json").is_file():
      return root, str(path.relative_to(root))
  raise UserError(f"{folder}: lies in no run directory, so its origin is unknown; expected a checkpoint of a run, "
                  "such as RUN/round_2/merged")


def check_recorded(root: Path, stage: str, folder: Path, names: list[str]) -> None:
  """Checks that a checkpoint's files are as the run recorded them, and that its current config made them.

  Args:
    root: the run directory.
    stage: the checkpoint's path in it.
    folder: the checkpoint.
    names: the files to check.

  Raises:
    UserError: when one differs or is missing, or the config made something else.
  """
  record = run_record.read(root)
  stages = record["stages"]
  owner = next((name for name in stages if stage == name or stage.startswith(f"{name}/")), None)
  if owner is None:
    raise UserError(f"{folder}: is no finished stage of the run in {root}; repeat the run's command first")
  subfolder = stage.removeprefix(owner).lstrip("/")
  prefix = f"{subfolder}/" if subfolder else ""
  recorded = stages[owner].get("files") or {}
  digests = files.digest_files(folder)
  differing = [name for name in names if recorded.get(f"{prefix}{name}") != digests.get(name)]
  missing = [name for name in recorded if name.startswith(prefix) and "/" not in name.removeprefix(prefix)
             and not (root / owner / name).exists()]
  if differing or missing:
    raise UserError(f"{folder}: {join_items(sorted({*differing, *missing}))} differs from what the run has recorded; "
                    "remove the folder and repeat the run's command")
  manifest = root / integrity.MANIFEST
  if manifest.exists() and "config.json" in integrity.list_differing(manifest, root):
    raise UserError(f"{root / 'config.json'}: differs from what the run has written, so the settings of {stage} are "
                    "unknown; restore the file, or repeat the run's command")
  check_current(root, record, [owner])


def check_current(root: Path, record: dict[str, Any], stages: Sequence[str]) -> None:
  """Checks that stages, and those that they read, were made with the settings and inputs of the last start.

  Args:
    root: the run directory.
    record: content of run.json.
    stages: names of stages in it.

  Raises:
    UserError: when one was made with others.
  """
  if outdated := _list_outdated(record, stages):
    raise UserError(f"{root}: was started again and has not finished: config.json is not what "
                    f"{join_items(outdated)} {'were' if len(outdated) > 1 else 'was'} made with; repeat the command "
                    "and let it run to its end, which makes these stages again")


def _list_outdated(record: Mapping[str, Any], names: Sequence[str]) -> list[str]:
  """Lists the stages among these, and among those that they read, that the last start would make differently.

  Args:
    record: content of run.json.
    names: names of stages in it.

  Returns:
    The name of each such stage, with what differs.
  """
  stages, external, settings = record["stages"], record.get("external") or {}, record.get("settings") or {}
  changes: dict[str, list[str]] = {}
  queue = [*names]
  while queue:
    name = queue.pop(0)
    if name in changes:
      continue
    inputs = stages[name]["inputs"]
    changes[name] = ["other settings"] if inputs.get("settings") != settings.get(name) else []
    for need in sorted(inputs.keys() - {"settings"}):
      now = external[need] if need in external else stages.get(need, {}).get("output")
      if now != inputs[need]:
        changes[name].append(f"another {need}" if now else f"a {need} that is no longer there")
      queue += [need] * (need in stages)
  return [f"{name} ({', '.join(items)})" for name, items in changes.items() if items]
