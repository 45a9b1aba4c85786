"""The command: rounds of synthesize, filter, SFT, merge and evaluate.

    python -m imm_jax.main --config=configs/tiny.py --workdir=runs/tiny
    python -m imm_jax.main --config=configs/tiny.py --workdir=runs/star --config.method=star --config.rounds=2
    python -m imm_jax.main --config=configs/tiny.py --workdir=runs/tiny --dry_run
    python -m imm_jax.main --config=configs/common.py --config.model=FOLDER --compile_only --topology=v5e:4x4

The same command goes on where a killed run stopped, and ends in the same bits. On several hosts give it to each (a file
system that all share holds --workdir); on Slurm and Cloud TPU (--distributed=on) they find each other.
"""

from absl import flags
from ml_collections import config_flags

from imm_jax import cli, config, distributed, experiments, loop
from imm_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Settings; change one with --config.key=value (configs/common.py explains them).")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory; made if missing, continued if not.")
flags.mark_flag_as_required("config")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the stages, their sizes and what is done; change nothing.")
_RERUN = flags.DEFINE_bool("rerun", False, "Where the config was changed: run again what depends on that, even samples "
                           "and training that are done.")
_DISTRIBUTED = flags.DEFINE_enum("distributed", "auto", ["auto", "on", "off"], "Several processes as one run; auto: "
                                 "where the flags below, JAX_COORDINATOR_ADDRESS or the cluster's variables say so.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where it cannot be found out.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of this run.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this process, from 0.", lower_bound=0)

_COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Compile SFT step, layer importance, merge and sampling for a "
                                  "TPU slice that is not here; print what they take.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "With --compile_only: the slice, as chips along each axis.")
_SLICES = flags.DEFINE_integer("slices", 1, "With --compile_only: equal slices, joined by the network.")
_ROWS_PER_CHIP = flags.DEFINE_integer("rows_per_chip", 2, "With --compile_only: rows of one forward pass on a chip.")
flags.register_multi_flags_validator(
    ["workdir", "compile_only"], lambda given: given["workdir"] or given["compile_only"],
    "Flag --workdir must have a value other than None.")


def main() -> None:
  settings = cli.config_of(_CONFIG)
  several = experiments.is_experiment(settings)
  (experiments if several else config).validate(settings, downloads=not (_DRY_RUN.value or _COMPILE_ONLY.value))
  if _COMPILE_ONLY.value:
    if several:
      raise UserError("--compile_only: takes the config of a single run")
    from imm_jax.aot import check  # late: only this needs it
    check.run(settings, topology_name=_TOPOLOGY.value, slices=_SLICES.value, rows_per_chip=_ROWS_PER_CHIP.value)
    return
  distributed.start(_DISTRIBUTED.value, coordinator=_COORDINATOR.value, num_processes=_NUM_PROCESSES.value,
                    process_id=_PROCESS_ID.value)
  runner = experiments if several else loop
  if _DRY_RUN.value:
    runner.dry_run(settings, _WORKDIR.value)
  else:
    runner.run(settings, _WORKDIR.value, rerun=_RERUN.value)


if __name__ == "__main__":
  cli.run(main)
