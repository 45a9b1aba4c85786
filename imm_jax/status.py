"""Prints the state of runs: running, finished, stopped or failed, in which stage, and why.

    imm status runs/tiny
    imm status runs

A process that was killed is noticed, too. Exits with code 0 whatever the states are.
"""

from absl import flags

from imm_jax import cli
from imm_jax.report.results import find_runs
from imm_jax.runs import record, status

_WORKDIRS = flags.DEFINE_list("workdirs", None, "Run directories, DIR,DIR,..., or folders that hold some; also the "
                             "arguments without a name.")


def main() -> None:
  """Prints a line for each run."""
  for root in find_runs(_WORKDIRS.value):
    state, recorded = status.read(root), record.read(root)
    done = recorded["stages"].keys() - {*recorded.get("outdated", ())}
    count = f"{sum(stage in done for stage in state.plan)} of {len(state.plan)}" if state.plan else str(len(done))
    print(f"{root}: {status.format_line(state) or 'unknown'}; {count} stages done")


if __name__ == "__main__":
  cli.run(main, positional=("workdirs",))
