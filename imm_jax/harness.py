"""Runs lm-evaluation-harness on this package's models.

    python -m imm_jax.harness --model=imm_jax --model_args=pretrained=DIR --tasks=arc_easy,gsm8k --output_path=OUT

takes the arguments of `lm_eval`, which is installed with `pip install -e '.[harness]'`. `model_args` are the arguments
of `HarnessLM`. In a config, `lm_eval:NAME` in `task.ood` is a task of lm_eval, or of the YAML files in
`eval.lm_eval.path` (`stages.lm_eval_tasks`).
"""

import sys

from imm_jax.errors import UserError
from imm_jax.scoring.harness import HarnessLM

__all__ = ["HarnessLM", "main"]


def main() -> None:
  """Runs lm_eval's own command, with the model `imm_jax` registered."""
  from lm_eval.__main__ import cli_evaluate

  try:
    cli_evaluate()
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
  main()
