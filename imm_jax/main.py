"""Runs rounds of sampling, filtering, SFT, merging and evaluation.

    imm run --config=tiny --workdir=runs/tiny
    imm run --config=tiny --workdir=runs/star --config.method=star --config.rounds=2
    imm run --config=qwen:1.5b,task=math --workdir=runs/math --dry_run
    imm run --config=MY_FILE.py --workdir=runs/mine --config.model=FOLDER
    imm run --config=common --config.model=FOLDER --compile_only --topology=v5e:4x4

--config is a file, or the name of one that comes with this package. If a run was stopped or killed, the same command
continues it and ends with the same bits. For a run on several hosts, give the command to each of them, with --workdir
on a file system that they share; on Slurm and Cloud TPU (--distributed=on) they find each other.
"""

import sys

import ml_collections
from absl import flags
from ml_collections import config_flags

from imm_jax import cli, config_checks, experiments, loop
from imm_jax.errors import UserError
from imm_jax.runs.run import list_idle_keys
from imm_jax.runtime import distributed
from imm_jax.stages import merge_settings

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The settings, as a file or a name such as tiny or qwen:1.5b. --config.KEY=VALUE changes one of "
    "them, as in --config.sft.epochs=2; configs/common.py lists and explains all settings.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory. It is created if missing; otherwise its run is "
                               "continued.")
flags.mark_flag_as_required("config")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the stages with their sizes and whether they are done, and "
                             "estimates of memory, disk space and time; change nothing.")
_RERUN = flags.DEFINE_bool("rerun", False, "If the config changed since the last start: run all stages again that "
                           "depend on the changes, even if that discards samples and trained models.")
_DISTRIBUTED = flags.DEFINE_enum("distributed", "auto", ["auto", "on", "off"], "Whether several processes, on one "
                                 "host or many, work on this run. auto: if the three flags below, "
                                 "JAX_COORDINATOR_ADDRESS or the cluster's variables say so.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "With several processes: HOST:PORT of process 0; not needed on "
                                   "Slurm and Cloud TPU.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With several processes: their number.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With several processes: the number of this one, from 0.",
                                   lower_bound=0)

_COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Run nothing: compile SFT step, layer importance, merge and "
                                  "sampling for a TPU slice, which need not be available, and print the memory and "
                                  "time that they would take.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "With --compile_only: the kind of TPU and the number of chips "
                                "along each axis of the slice.")
_SLICES = flags.DEFINE_integer("slices", 1, "With --compile_only: the number of such slices, connected by a network.")
_ROWS_PER_CHIP = flags.DEFINE_integer("rows_per_chip", 2, "With --compile_only: the number of rows of sft.row_length "
                                      "tokens in one forward pass on a chip.")
flags.register_multi_flags_validator(
    ["workdir", "compile_only"], lambda values: values["workdir"] or values["compile_only"],
    "Flag --workdir must have a value other than None.")


def main() -> None:
  """Runs the config's run, or all runs of an experiment; or plans or compiles them, as the flags say."""
  settings = cli.read_config(_CONFIG)
  is_experiment = experiments.is_experiment(settings)
  checks = experiments if is_experiment else config_checks
  checks.validate(settings, downloads=not (_DRY_RUN.value or _COMPILE_ONLY.value))
  if not is_experiment:
    _print_idle_keys(settings)
  if _COMPILE_ONLY.value:
    if is_experiment:
      raise UserError("--compile_only: takes the config of a single run")
    from imm_jax.aot import check  # imported here because only this needs it
    check.run(settings, topology_name=_TOPOLOGY.value, slices=_SLICES.value, rows_per_chip=_ROWS_PER_CHIP.value)
    return
  distributed.start(_DISTRIBUTED.value, coordinator=_COORDINATOR.value, num_processes=_NUM_PROCESSES.value,
                    process_id=_PROCESS_ID.value)
  runner = experiments if is_experiment else loop
  if _DRY_RUN.value:
    runner.dry_run(settings, _WORKDIR.value, rerun=_RERUN.value)
  else:
    runner.run(settings, _WORKDIR.value, rerun=_RERUN.value)


def _print_idle_keys(settings: ml_collections.ConfigDict) -> None:
  """Prints a note on the settings of the command line that have no effect, such as a penalty of another method."""
  given = config_flags.get_override_values(flags.FLAGS["config"])
  idle = list_idle_keys(settings, given)
  merge = merge_settings.get_settings(settings)
  if merge.method and "merge.base_weight" in given and not merge.weighs:
    idle.append("merge.base_weight")
  if idle:
    merging = f", merge.method={settings.merge.method}" * bool(settings.merge.method)
    print(f"note: {', '.join(f'--config.{key}' for key in idle)}: no effect with method={settings.method}{merging} and "
          "the other settings", file=sys.stderr)


if __name__ == "__main__":
  cli.run(main, resumes=True)
