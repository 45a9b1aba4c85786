"""Runs `imm COMMAND`, or `python -m imm_jax COMMAND`: all commands under one name."""

import runpy
import sys

from imm_jax import __version__
from imm_jax.errors import Exit, UserError, suggest
from imm_jax.runtime import signals

# For each command the module that it runs, as `python -m MODULE` does, and a description.
COMMANDS = {
    "run": ("imm_jax.main", "in rounds: sample answers, keep the right ones, fine-tune, merge with the base, evaluate"),
    "evaluate": ("imm_jax.evaluate", "measure a checkpoint's accuracy on tasks: greedy answers, pass@k, majority vote"),
    "compare": ("imm_jax.compare", "test which differences between evaluated models are significant (paired tests)"),
    "analyze": ("imm_jax.analyze", "measure which layers matter for a task, and which changed between two checkpoints"),
    "merge": ("imm_jax.merge", "merge checkpoints on disk, by any method of imm_jax.merging or a mergekit recipe"),
    "convert": ("imm_jax.convert", "convert a checkpoint between HF and orbax, merge a LoRA adapter, check a folder"),
    "report": ("imm_jax.report", "write the report of a run again, or compare several runs side by side"),
    "status": ("imm_jax.status", "print the state of runs: running, finished, stopped or failed, where and why"),
    "push": ("imm_jax.push", "upload a checkpoint of a run to the Hugging Face hub, with a model card"),
    "verify": ("imm_jax.verify", "check that the files of a run directory are unchanged since the run wrote them"),
}


def main() -> None:
  """Runs the command that the arguments name, in this process."""
  signals.end_on_interrupt()
  command, *arguments = [*sys.argv[1:], ""][:max(1, len(sys.argv) - 1)]
  if command in ("--help", "-h", "help", ""):
    print(_format_help(), file=sys.stdout if command else sys.stderr)
    sys.exit(Exit.DONE if command else Exit.MISTAKE)
  if command == "--version":
    print(f"imm_jax {__version__}")
    return
  if command not in COMMANDS:
    print(f"error: imm has no command {command!r}; {suggest(command, [*COMMANDS])}", file=sys.stderr)
    sys.exit(Exit.MISTAKE)
  sys.argv = [sys.argv[0], *arguments]
  # It runs as __main__, so that --help and the processes that it starts find the same module as with python -m.
  try:
    runpy.run_module(COMMANDS[command][0], run_name="__main__", alter_sys=True)
  except UserError as e:  # a merging method that cannot be registered; the command itself prints all others
    print(f"error: {e}", file=sys.stderr)
    sys.exit(Exit.MISTAKE)


def _format_help() -> str:
  lines = [f"  {name:<10}{description}" for name, (_, description) in COMMANDS.items()]
  return "\n".join([
      "usage: imm COMMAND [--flag=value ...]", "",
      "Iterative Model Merging: language models that improve their own reasoning without going shallow.", "",
      *lines, "",
      "imm COMMAND --help explains a command and its flags. Begin with:", "",
      "  imm run --config=tiny --workdir=runs/tiny", "",
      "docs/operations.md explains the exit codes, docs/python_api.md the Python API."])


if __name__ == "__main__":
  main()
