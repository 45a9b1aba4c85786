"""Checks that the files of a run directory are unchanged since the run wrote them, by computing every digest again.

    imm verify runs/tiny
    imm verify runs/tiny runs/star

Prints each file that differs on stdout, and exits with code 1 if there is one, else with 2 if a file of a run could not
be checked. Nothing is changed.
"""

import sys
from pathlib import Path

from absl import flags

from imm_jax import cli
from imm_jax.errors import Exit, join_items
from imm_jax.report.results import find_runs
from imm_jax.runs.status import is_running
from imm_jax.runs.verification import Findings, check_run

_WORKDIRS = flags.DEFINE_list("workdirs", None, "Run directories, DIR,DIR,..., or folders that hold some; also the "
                             "arguments without a name.")


def main() -> None:
  """Checks the run directories, and exits with code 1 if a file differs, or 2 if one could not be checked."""
  codes = {Exit.DONE}
  for root in find_runs(_WORKDIRS.value):
    findings = check_run(Path(root))
    if is_running(Path(root)):
      findings.notes.append("a process works in it: what it is writing now may seem to differ, so look again when it "
                            "has ended")
    for note in findings.notes:
      print(f"note: {root}: {note}", file=sys.stderr)
    for name in findings.differing:
      print(f"{root}/{name}: differs from what was written")
    print(f"{root}: {_summarize(findings)}")
    codes.add(Exit.MISTAKE if findings.differing else Exit.UNCHECKED if findings.unchecked else Exit.DONE)
  if code := next((code for code in (Exit.MISTAKE, Exit.UNCHECKED) if code in codes), None):
    sys.exit(code)


def _summarize(findings: Findings) -> str:
  count = sum(findings.unchecked.values())
  names = join_items(list(findings.unchecked))
  unchecked = f"{count} {'file was' if count == 1 else 'files were'} not checked: {names}"
  if findings.differing:
    return f"{len(findings.differing)} differ" + (f"; {unchecked}" if count else "")
  return f"nothing that could be checked differs; {unchecked}" if count else "unchanged"


if __name__ == "__main__":
  cli.run(main, positional=("workdirs",))
