"""Checks whether a run directory is still what the run has written: every recorded digest is computed again.

    imm verify runs/tiny
    imm verify runs/tiny runs/star

Names each file that differs, on stdout, and ends with exit code 1 where there is one. Nothing is changed.
"""

import sys
from pathlib import Path

from absl import flags

from imm_jax import cli, integrity
from imm_jax.report.results import find_runs
from imm_jax.runs.status import is_running

_WORKDIRS = flags.DEFINE_list("workdirs", None, "Run directories, DIR,DIR,..., or folders that hold some; or the "
                             "arguments.")


def main() -> None:
  damaged = False
  for root in find_runs(_WORKDIRS.value):
    wrong, notes = integrity.check_run(Path(root))
    if is_running(Path(root)):
      notes.append("a process works in it: what it is writing now may seem to differ, so look again when it has ended")
    for note in notes:
      print(f"note: {root}: {note}", file=sys.stderr)
    for name in wrong:
      print(f"{root}/{name}: differs from what was written")
    print(f"{root}: {f'{len(wrong)} differ' if wrong else 'as it was written'}")
    damaged = damaged or bool(wrong)
  if damaged:
    sys.exit(1)


if __name__ == "__main__":
  cli.run(main, positional=("workdirs",))
