"""Checks that the files of a run directory are unchanged since the run wrote them, by computing every digest again.

    imm verify runs/tiny
    imm verify runs/tiny runs/star

Prints each file that differs on stdout, and exits with code 1 if there is one. Nothing is changed.
"""

import sys
from pathlib import Path

from absl import flags

from imm_jax import cli, integrity
from imm_jax.report.results import find_runs
from imm_jax.runs.status import is_running

_WORKDIRS = flags.DEFINE_list("workdirs", None, "Run directories, DIR,DIR,..., or folders that hold some; also the "
                             "arguments without a name.")


def main() -> None:
  """Checks the run directories, and exits with code 1 if a file differs."""
  damaged = False
  for root in find_runs(_WORKDIRS.value):
    differing, notes = integrity.check_run(Path(root))
    if is_running(Path(root)):
      notes.append("a process works in it: what it is writing now may seem to differ, so look again when it has ended")
    for note in notes:
      print(f"note: {root}: {note}", file=sys.stderr)
    for name in differing:
      print(f"{root}/{name}: differs from what was written")
    print(f"{root}: {f'{len(differing)} differ' if differing else 'as it was written'}")
    damaged = damaged or bool(differing)
  if damaged:
    sys.exit(1)


if __name__ == "__main__":
  cli.run(main, positional=("workdirs",))
