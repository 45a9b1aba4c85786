"""The command: rounds of synthesize, filter, SFT, merge and evaluate.

    python -m imm_jax.main --config=configs/tiny.py --workdir=runs/tiny
    python -m imm_jax.main --config=configs/tiny.py --workdir=runs/star --config.method=star --config.rounds=2
    python -m imm_jax.main --config=configs/tiny.py --workdir=runs/tiny --dry_run

The same command goes on where a killed run stopped, and ends in the same bits.
"""

from absl import flags
from ml_collections import config_flags

from imm_jax import cli, config, loop

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Settings; change one with --config.key=value (configs/common.py explains them).")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory; made if missing, continued if not.", required=True)
flags.mark_flag_as_required("config")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the stages, their sizes and what is done; change nothing.")


def main() -> None:
  settings = cli.config_of(_CONFIG)
  config.validate(settings)
  (loop.dry_run if _DRY_RUN.value else loop.run)(settings, _WORKDIR.value)


if __name__ == "__main__":
  cli.run(main)
