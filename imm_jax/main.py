"""Runs rounds of sampling, filtering, SFT, merging and evaluation.

    imm run --config=tiny --workdir=runs/tiny
    imm run --config=tiny --workdir=runs/star --config.method=star --config.rounds=2
    imm run --config=qwen:1.5b,task=math --workdir=runs/math --dry_run
    imm run --config=MY_FILE.py --workdir=runs/mine --config.model=FOLDER
    imm run --config=common --config.model=FOLDER --compile_only --topology=v5e:4x4

--config is a file, or the name of one that comes with this package. The same command goes on where a killed
run stopped, and ends in the same bits. On several hosts give it to each (a file system that all share holds --workdir);
on Slurm and Cloud TPU (--distributed=on) they find each other.
"""

from absl import flags
from ml_collections import config_flags

from imm_jax import cli, config, loop
from imm_jax.errors import UserError
from imm_jax.runs import experiments
from imm_jax.runtime import distributed

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Settings: a file, or a name such as tiny or qwen:1.5b. Change one with --config.KEY=VALUE, as "
    "in --config.sft.epochs=2; configs/common.py lists and explains all of them.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory; made if missing, continued if not.")
flags.mark_flag_as_required("config")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the stages, their sizes, the memory that they will take and what "
                             "is done; change nothing.")
_RERUN = flags.DEFINE_bool("rerun", False, "Where the config was changed since the last start: run again what depends "
                           "on that, and throw away samples and training that are done.")
_DISTRIBUTED = flags.DEFINE_enum("distributed", "auto", ["auto", "on", "off"], "Whether several processes, on one "
                                 "host or many, work on this run together; auto: where the three flags below, "
                                 "JAX_COORDINATOR_ADDRESS or the cluster's variables say so.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT where process 0 can be reached, of a run of several "
                                   "processes; on Slurm and Cloud TPU it is found out.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of this run.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process among them, from 0.", lower_bound=0)

_COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Run nothing: compile SFT step, layer importance, merge and "
                                  "sampling for a TPU slice that is not here, and print the memory and time that "
                                  "they take.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "With --compile_only: the slice, by its kind and the chips "
                                "along each axis.")
_SLICES = flags.DEFINE_integer("slices", 1, "With --compile_only: number of such slices, joined by the network.")
_ROWS_PER_CHIP = flags.DEFINE_integer("rows_per_chip", 2, "With --compile_only: number of rows, of sft.row_length "
                                      "tokens, in one forward pass on a chip.")
flags.register_multi_flags_validator(
    ["workdir", "compile_only"], lambda given: given["workdir"] or given["compile_only"],
    "Flag --workdir must have a value other than None.")


def main() -> None:
  settings = cli.read_config(_CONFIG)
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
