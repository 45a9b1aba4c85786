"""`imm COMMAND`, or `python -m imm_jax COMMAND`: all commands under one name."""

import runpy
import sys

from imm_jax import __version__
from imm_jax.errors import Exit, suggest

# By command: the module that it runs, as `python -m MODULE` does, and what it is for.
COMMANDS = {
    "run": ("imm_jax.main", "sample answers, keep the right ones, fine-tune, merge with the base, evaluate; in rounds"),
    "evaluate": ("imm_jax.evaluate", "accuracy of a checkpoint on tasks: greedy answers, pass@k, majority vote"),
    "compare": ("imm_jax.compare", "which differences between evaluated models are real (paired tests)"),
    "analyze": ("imm_jax.analyze", "which layers matter for a task, and which have moved between two checkpoints"),
    "merge": ("imm_jax.merge", "merge checkpoints on disk, by any method of imm_jax.merging or a mergekit recipe"),
    "convert": ("imm_jax.convert", "convert a checkpoint between HF and orbax, merge a LoRA adapter, check a folder"),
    "report": ("imm_jax.report", "write the report of a run again, or of several side by side"),
    "push": ("imm_jax.push", "upload a checkpoint of a run to the Hugging Face hub, with a model card"),
    "verify": ("imm_jax.verify", "check that a run directory is still what the run has written"),
}


def main() -> None:
  """Runs the command that the arguments name, in this process."""
  command, *arguments = [*sys.argv[1:], ""][:max(1, len(sys.argv) - 1)]
  if command in ("--help", "-h", "help", ""):
    print(_help(), file=sys.stdout if command else sys.stderr)
    sys.exit(Exit.DONE if command else Exit.MISTAKE)
  if command == "--version":
    print(f"imm_jax {__version__}")
    return
  if command not in COMMANDS:
    print(f"error: imm has no command {command!r}; {suggest(command, [*COMMANDS])}", file=sys.stderr)
    sys.exit(Exit.MISTAKE)
  sys.argv = [sys.argv[0], *arguments]
  try:
    # In the place of this module, so that processes that it starts, and --help, find what they find with python -m.
    runpy.run_module(COMMANDS[command][0], run_name="__main__", alter_sys=True)
  except KeyboardInterrupt:  # while it was imported
    sys.exit(Exit.INTERRUPTED)


def _help() -> str:
  lines = [f"  {name:<10}{what}" for name, (_, what) in COMMANDS.items()]
  return "\n".join([
      "usage: imm COMMAND [--flag=value ...]", "",
      "Iterative Model Merging: language models that improve their own reasoning without going shallow.", "",
      *lines, "",
      "imm COMMAND --help explains a command and its flags. Begin with:", "",
      "  imm run --config=tiny --workdir=runs/tiny", "",
      "docs/operations.md says what exit codes mean; docs/python_api.md how to do the same from Python."])


if __name__ == "__main__":
  main()
