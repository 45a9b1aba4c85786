"""Uploads a checkpoint of a run to the Hugging Face hub, with a model card of the run's settings and scores.

    imm push RUN/round_2/merged ORG/NAME
    imm push RUN/round_2/merged ORG/NAME --private --revision=v1

The repository is made where it is not there. All files go in one commit, and only where each is what the run has
written. A README.md that the repository has already stays, unless --overwrite_card is given.
"""

from pathlib import Path

from absl import flags

from imm_jax import cli, publishing
from imm_jax.errors import UserError

_FOLDER = flags.DEFINE_string("folder", None, "The checkpoint, in its run directory; or the first argument.")
_TO = flags.DEFINE_string("to", None, "The repository, ORG/NAME; or the second argument.")
_PRIVATE = flags.DEFINE_bool("private", False, "Make the repository private; one that is public already is refused.")
_REVISION = flags.DEFINE_string("revision", None, "A branch of it, made where it is not there; by default main.")
_OVERWRITE_CARD = flags.DEFINE_bool("overwrite_card", False, "Replace a README.md that the repository has.")


def main() -> None:
  """Reads the flags and does what they say."""
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
