"""Tests which differences between models are significant, using their answers on disk; no model is loaded.

    imm compare --this=scores/a --against=scores/b
    imm compare --this=RUN/round_2/eval/merged --against=RUN/base/eval --against=RUN/round_2/eval/sft

Each folder is an --out of imm evaluate or an eval folder of a run. Models are compared on the questions that both
answered; questions with the same id must have the same text and gold answer.
"""

from pathlib import Path

from absl import flags

from imm_jax import cli
from imm_jax.errors import UserError
from imm_jax.statistics import model_comparison

_THIS = flags.DEFINE_string("this", None, "The folder with the answers of a model.", required=True)
_AGAINST = flags.DEFINE_multi_string("against", None, "The folder with the answers of another model; may be given "
                                     "several times.", required=True)
_OUT = flags.DEFINE_string("out", None, "A JSON file to write the results to; by default they are only printed.")


def main() -> None:
  """Prints a table for each comparison, and writes the results to --out."""
  out = Path(_OUT.value) if _OUT.value else None
  if out and (out.exists() or out.suffix != ".json"):
    raise UserError(f"--out={out}: {'exists; give another name' if out.exists() else 'expected a name such as a.json'}")
  others = {Path(name): model_comparison.read_folder(Path(name)) for name in _AGAINST.value}
  model_comparison.print_and_write(Path(_THIS.value), others, out)


if __name__ == "__main__":
  cli.run(main)
