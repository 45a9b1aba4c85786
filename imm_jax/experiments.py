"""Several runs under one config, such as those behind a table of the paper (`configs/paper.py`).

Such a config has `title`, `runs` (a config for each name) and `analyses`. Every run has its folder in the work
directory, where it resumes like any other.
"""

from pathlib import Path

import ml_collections

from imm_jax import config as configs, distributed, loop
from imm_jax.errors import UserError
from imm_jax.stages import devices


def is_experiment(config: ml_collections.ConfigDict) -> bool:
  """Whether this is a config of several runs."""
  return "runs" in config


def validate(config: ml_collections.ConfigDict, *, downloads: bool = True) -> None:
  """Raises UserError for the first run whose config cannot work, with its name."""
  for name, settings in config.runs.items():
    try:
      configs.validate(settings, downloads=downloads)
    except UserError as e:
      raise UserError(f"run {name}: {e}") from e
  if len({devices.starts_server(settings) for settings in config.runs.values()}) > 1:
    raise UserError("config.runs: some start vLLM servers on this machine and some do not, and who has its "
                    "accelerators is decided once; set --config.sampler.kind for all, or give them different commands")


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Does one run after the other.

  Raises:
    UserError: where there are analyses alone.
  """
  _check(config, workdir)
  if not config.runs:
    raise UserError(f"{config.title} has no runs, only analyses: {', '.join(map(_describe, config.analyses.values()))}")
  for settings in config.runs.values():
    devices.leave_to_others(settings)
  for i, (name, settings) in enumerate(config.runs.items()):
    if distributed.is_main():
      print(f"\n{config.title}, run {i + 1} of {len(config.runs)}: {name}", flush=True)
    loop.run(settings, str(Path(workdir) / name))


def dry_run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Prints what `run` would do, run by run, and the analyses that go with them."""
  _check(config, workdir)
  if distributed.is_main():
    print(f"{config.title}: {len(config.runs)} runs, {len(config.analyses)} analyses")
  for name, settings in config.runs.items():
    if distributed.is_main():
      print(f"\nrun {name}: {settings.method} on {settings.model}, {settings.rounds} rounds, in domain "
            f"{settings.task.name}, out of domain {', '.join(settings.task.ood)}")
    loop.dry_run(settings, str(Path(workdir) / name))
  for name, analysis in config.analyses.items():
    if distributed.is_main():
      print(f"\nanalysis {name}: {_describe(analysis)}")


def _check(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Raises UserError for a work directory that is itself a run directory, or no folder."""
  root = Path(workdir)
  if not workdir or "://" in workdir or (root.exists() and not root.is_dir()):
    raise UserError(f"--workdir={workdir}: expected a folder, in which each run has its own")
  if (root / "config.json").exists():
    raise UserError(f"--workdir={workdir}: is the folder of a single run; use another for the runs of {config.title}")


def _describe(analysis: ml_collections.ConfigDict) -> str:
  if analysis.kind == "importance":
    return f"layer importance of {analysis.model} on {analysis.task}"
  if "run" in analysis:
    return f"weight change of {analysis.model} of {analysis.run}"
  return f"weight change from {analysis.before} to {analysis.after}"
