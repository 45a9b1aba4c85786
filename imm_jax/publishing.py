"""Checkpoints of a run on the Hugging Face hub: what is uploaded, and what is refused."""

from pathlib import Path
from typing import Any

from imm_jax import card, files, rundir
from imm_jax.errors import UserError, first_line, listed
from imm_jax.model import folder as checkpoint, hf
from imm_jax.report.results import Results

_CARD = "README.md"


def push(folder: Path, to: str, *, private: bool = False, revision: str | None = None, overwrite_card: bool = False,
         ) -> str:
  """Uploads a checkpoint.

  Args:
    folder: of a run, such as `RUN/round_2/merged`.
    to: the repository, `ORG/NAME`.
    private: whether it is made private.
    revision: a branch; None for main.
    overwrite_card: whether a README.md that is there is replaced.

  Returns:
    The address of the commit.

  Raises:
    UserError: for a folder that is no whole checkpoint or is not what its run has written, or where the hub refuses.
  """
  hf.check_folder(folder)
  root, stage = find_run(folder)
  names = [*checkpoint.list_side_files(folder), *[checkpoint.INDEX] * (folder / checkpoint.INDEX).exists(),
           *(path.name for path in checkpoint.weight_files(folder))]
  check_recorded(root, stage, folder, names)
  results = Results.of(root)
  if not results.config or "base/eval" not in results.stages:
    raise UserError(f"{root}: config.json or what run.json says of base/eval is missing or damaged "
                    f"({listed(results.problems)})")
  text = card.write(results, stage, to)
  import huggingface_hub  # late: it takes its time
  from huggingface_hub import errors

  api = huggingface_hub.HfApi()
  try:
    return _upload(api, huggingface_hub, folder, names, text, to, stage, private, revision, overwrite_card)
  except UserError:
    raise
  except errors.HFValidationError as e:
    raise UserError(f"--to={to}: is no id that the hub can have ({first_line(e)}); expected ORG/NAME") from e
  except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError) as e:
    status = getattr(getattr(e, "response", None), "status_code", None)
    advice = "run `hf auth login` with a token that may write there" if status in (401, 403, 404, None) else "try again"
    raise UserError(f"--to={to}: the hub refuses ({first_line(e)}); {advice}") from e
  except Exception as e:  # of whichever HTTP library it uses
    raise UserError(f"--to={to}: the hub cannot be reached ({first_line(e)}); try again") from e


def _upload(api: Any, library: Any, folder: Path, names: list[str], text: str, to: str, stage: str, private: bool,
            revision: str | None, overwrite_card: bool) -> str:
  exists = api.repo_exists(to)
  if exists and private and not api.model_info(to).private:
    raise UserError(f"--to={to}: is public already, and --private is given; make it private on the hub, or give "
                    "another name")
  api.create_repo(to, private=True if private else None, exist_ok=True)
  if revision:
    api.create_branch(to, branch=revision, exist_ok=True)
  there = set(api.list_repo_files(to, revision=revision))
  add = lambda name, content: library.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
  operations = [add(name, str(folder / name)) for name in names]
  # Weights of an earlier model of more or fewer shards would make two checkpoints of one.
  old = sorted(name for name in there - set(names)
               if "/" not in name and (name.endswith(".safetensors") or name == checkpoint.INDEX))
  operations += [library.CommitOperationDelete(path_in_repo=name) for name in old]
  if old:
    print(f"note: {to}: {listed(old)}, of an earlier model, goes")
  if _CARD not in there or overwrite_card:
    operations.append(add(_CARD, text.encode()))
  else:
    print(f"note: {to}: has a {_CARD}, which stays; --overwrite_card replaces it")
  done = api.create_commit(to, operations, commit_message=f"{stage} of a run of imm_jax", revision=revision)
  return str(getattr(done, "commit_url", done))


def find_run(folder: Path) -> tuple[Path, str]:
  """The run directory that a checkpoint lies in, and its path there; raises UserError where it is in none."""
  here = folder.resolve()
  for root in here.parents:
    if (root / "run.json").is_file():
      return root, str(here.relative_to(root))
  raise UserError(f"{folder}: lies in no run directory, so nobody can say what it is; expected a checkpoint of a run, "
                  "such as RUN/round_2/merged")


def check_recorded(root: Path, stage: str, folder: Path, names: list[str]) -> None:
  """Raises UserError unless the files are those that the run has recorded for this checkpoint."""
  entry, below = rundir.read_record(root)["stages"], ""
  owner = next((name for name in entry if stage == name or stage.startswith(f"{name}/")), None)
  if owner is None:
    raise UserError(f"{folder}: is no finished stage of the run in {root}; give the run's command again first")
  below = stage.removeprefix(owner).lstrip("/")
  recorded = entry[owner].get("files") or {}
  key = lambda name: f"{below}/{name}" if below else name
  found = files.digests(folder)
  wrong = [name for name in names if recorded.get(key(name)) != found.get(name)]
  lost = [name for name in recorded if name.startswith(f"{below}/" if below else "") and
          "/" not in name.removeprefix(f"{below}/" if below else "") and not (root / owner / name).exists()]
  if wrong or lost:
    raise UserError(f"{folder}: {listed(sorted({*wrong, *lost}))} differs from what the run has recorded; remove the "
                    "folder and give the run's command again")
