"""Uploads a checkpoint of a run to the Hugging Face hub, with a model card of the run's settings and scores.

    imm push RUN/round_2/merged ORG/NAME
    imm push RUN/round_2/merged ORG/NAME --private --revision=v1

The repository is created if it does not exist. All files are uploaded in one commit, and only if each is unchanged
since the run wrote it. A README.md that the repository already has is kept, unless --overwrite_card is given.
"""

from pathlib import Path

from absl import flags

from imm_jax import cli, publishing
from imm_jax.errors import UserError

_FOLDER = flags.DEFINE_string("folder", None, "The checkpoint, in its run directory; also the first argument.")
_TO = flags.DEFINE_string("to", None, "The repository, ORG/NAME; also the second argument.")
_PRIVATE = flags.DEFINE_bool("private", False, "Create a private repository; an existing public one is refused.")
_REVISION = flags.DEFINE_string("revision", None, "The branch, created if it does not exist; by default main.")
_OVERWRITE_CARD = flags.DEFINE_bool("overwrite_card", False, "Replace a README.md that the repository already has.")


def main() -> None:
  """Uploads the checkpoint and prints the address of the commit."""
  for name, value in (("folder", _FOLDER.value), ("to", _TO.value)):
    if not value:
      raise UserError(f"{name.upper()} is missing; expected: RUN/round_2/merged ORG/NAME")
  if _TO.value.count("/") != 1 or not all(_TO.value.split("/")):
    raise UserError(f"--to={_TO.value}: expected ORG/NAME")
  address = publishing.push(Path(_FOLDER.value), _TO.value, private=_PRIVATE.value, revision=_REVISION.value,
                            overwrite_card=_OVERWRITE_CARD.value)
  print(f"{_TO.value}: {address}")


if __name__ == "__main__":
  cli.run(main, positional=("folder", "to"))
