"""Uploads a checkpoint of a run to the Hugging Face hub, with a model card of the run's settings and scores.

    python -m imm_jax.push RUN/round_2/merged ORG/NAME
    python -m imm_jax.push RUN/round_2/merged ORG/NAME --private --revision=v1

The repository is made where it is not there. All files go in one commit, and only where each is what the run has
written. A README.md that the repository has already stays, unless --overwrite_card is given.
"""

from pathlib import Path
from typing import Any

from absl import flags

from imm_jax import card, cli, files, rundir
from imm_jax.errors import UserError, first_line, listed
from imm_jax.model import folder as checkpoint, hf
from imm_jax.report.results import Results

_FOLDER = flags.DEFINE_string("folder", None, "The checkpoint, in its run directory; or the first argument.")
_TO = flags.DEFINE_string("to", None, "The repository, ORG/NAME; or the second argument.")
_PRIVATE = flags.DEFINE_bool("private", False, "Make the repository private; one that is public already is refused.")
_REVISION = flags.DEFINE_string("revision", None, "A branch of it, made where it is not there; by default main.")
_OVERWRITE_CARD = flags.DEFINE_bool("overwrite_card", False, "Replace a README.md that the repository has.")
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
  hf.check(folder)
  root, stage = find_run(folder)
  names = [*checkpoint.side_files(folder), *[checkpoint.INDEX] * (folder / checkpoint.INDEX).exists(),
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


def main() -> None:
  """Reads the flags and does what they say."""
  for name, value in (("folder", _FOLDER.value), ("to", _TO.value)):
    if not value:
      raise UserError(f"{name.upper()} is missing; expected: RUN/round_2/merged ORG/NAME")
  if _TO.value.count("/") != 1 or not all(_TO.value.split("/")):
    raise UserError(f"--to={_TO.value}: expected ORG/NAME")
  address = push(Path(_FOLDER.value), _TO.value, private=_PRIVATE.value, revision=_REVISION.value,
                 overwrite_card=_OVERWRITE_CARD.value)
  print(f"{_TO.value}: {address}")


if __name__ == "__main__":
  cli.run(main, positional=("folder", "to"))
