"""Runs experiments: several runs, and analyses of their models, from one config such as `configs/paper.py`.

The config has `title`, `runs` (a config for each name) and `analyses`. Each run has its own folder in the work
directory and resumes like any other run. The analyses follow the runs, each in its folder in `analyses`; a finished
analysis is skipped while its models and settings are the same. `analyses/figures` shows all of them side by side.
"""

import json
from pathlib import Path
from typing import Any

import ml_collections

from imm_jax import config_checks, config_keys, files, loop
from imm_jax.analysis.weight_change import weight_change
from imm_jax.errors import UserError
from imm_jax.methods import get_method
from imm_jax.model import checkpoint_folder, hf, hub
from imm_jax.report import analysis_files as output
from imm_jax.runs.run import pick
from imm_jax.runtime import distributed
from imm_jax.stages import analyze, devices


def is_experiment(config: ml_collections.ConfigDict) -> bool:
  """Returns whether a config describes several runs."""
  return "runs" in config


def validate(config: ml_collections.ConfigDict, *, downloads: bool = True) -> None:
  """Checks the configs of all runs and analyses; with `downloads=False` no questions are downloaded.

  Raises:
    UserError: for the first value that cannot work, with the name of its run or analysis.
  """
  for name, settings in config.runs.items():
    try:
      config_checks.validate(settings, downloads=downloads)
    except UserError as e:
      raise UserError(f"run {name}: {e}") from e
  if len({devices.starts_server(settings) for settings in config.runs.values()}) > 1:
    raise UserError("config.runs: some start vLLM servers on this machine and some do not, and who has its "
                    "accelerators is decided once; set --config.sampler.kind for all, or give them different commands")
  for name, analysis in config.analyses.items():
    try:
      if analysis.kind == "importance":
        config_checks.validate(analysis.config, trains=False, downloads=False)
        config_keys.require(analysis.config, "analysis.examples", lambda n: n > 0, "expected 1 or more")
        analyze.check_entry(analysis.task)
    except UserError as e:
      raise UserError(f"analysis {name}: {e}") from e


def run(config: ml_collections.ConfigDict, workdir: str, *, rerun: bool = False) -> None:
  """Runs one run after the other, then the analyses; `rerun` as in `loop.run`."""
  for settings in list(config.runs.values())[:1]:  # `validate` makes sure that all runs use the accelerators alike
    devices.reserve_accelerators(settings)
  _check(config, workdir)
  for i, (name, settings) in enumerate(config.runs.items()):
    if distributed.is_main():
      print(f"\n{config.title}, run {i + 1} of {len(config.runs)}: {name}", flush=True)
    loop.run(settings, str(Path(workdir) / name), rerun=rerun)
  if config.analyses:
    _run_analyses(config, Path(workdir))


def _run_analyses(config: ml_collections.ConfigDict, root: Path) -> None:
  """Runs the analyses that are not done yet, and draws all of them in common figures."""
  measures: dict[str, dict[str, Any]] = {"importance": {}, "weight_change": {}}
  with distributed.FailTogether(root):
    for name, analysis in config.analyses.items():
      models = {label: hub.resolve(model) for label, model in _list_models(config, analysis, root).items()}
      out = root / "analyses" / name
      inputs = _collect_inputs(analysis, models) if distributed.is_main() else {}
      done = distributed.broadcast((out / output.FILE).exists() and files.read_json(out / output.FILE).get(
          "asked") == inputs)
      if distributed.is_main():
        print(f"\nanalysis {name}: {_describe(analysis)}: {'done before' if done else 'run'}", flush=True)
      if not done:
        _run_analysis(analysis, models, out, inputs)
      if distributed.is_main():
        result = files.read_json(out / output.FILE)
        print(output.format_table(result))
        for measure in measures:
          for values in result[measure].values():
            measures[measure][name] = values
    if distributed.is_main():
      with files.write_atomically(root / "analyses" / "figures") as out:
        out.mkdir()
        output.write_figures(out, measures)
      print(f"analyses: {root / 'analyses'}")


def _run_analysis(analysis: ml_collections.ConfigDict, models: dict[str, Path], out: Path, inputs: dict[str, Any],
                  ) -> None:
  """Runs one analysis and writes a folder like that of `imm analyze`."""
  scores: dict[str, Any] = {}
  if analysis.kind == "importance":
    hf.check_folder(models["model"])
    analysis.config.model = analysis.model  # its size decides the mesh
    scores = devices.call(analysis.config, analyze.measure_importance, analysis.config, models["model"],
                          [analysis.task])
  if distributed.is_main():
    change = {} if scores else {analysis.get("model") or analysis.after: weight_change(**models).to_json()}
    with files.write_atomically(out) as folder:
      output.write(folder, {"asked": inputs, **output.combine(scores, change)})
  distributed.barrier(str(out))


def _list_models(config: ml_collections.ConfigDict, analysis: ml_collections.ConfigDict, root: Path) -> dict[str, str]:
  """Returns the models that an analysis reads, by role: `model`, or `before` and `after`.

  For a model of a run, `before` is the model that its round started from.
  """
  if analysis.kind == "importance":
    return {"model": analysis.model}
  if "run" not in analysis:
    return {"before": analysis.before, "after": analysis.after}
  settings, run_folder = config.runs[analysis.run], root / analysis.run
  number = int(analysis.model.partition("/")[0].removeprefix("round_"))
  method = get_method(settings)
  continues = number and method.start == "last"
  return {"before": str(run_folder / f"round_{number - 1}" / method.next_folder) if continues else settings.model,
          "after": str(run_folder / analysis.model)}


def _collect_inputs(analysis: ml_collections.ConfigDict, models: dict[str, Path]) -> dict[str, Any]:
  """Returns everything that an analysis depends on, as JSON reads it back."""
  settings = pick(analysis.config, "seed", "task", "prompt", "sft", "analysis") if (
      "config" in analysis) else {}
  return json.loads(json.dumps({
      **{key: value for key, value in analysis.items() if key != "config"}, "settings": settings,
      "digests": {label: checkpoint_folder.digest(model) for label, model in models.items()}}))


def dry_run(config: ml_collections.ConfigDict, workdir: str, *, rerun: bool = False) -> None:
  """Prints what `run` would do, run by run and analysis by analysis; downloads nothing."""
  _check(config, workdir)
  if distributed.is_main():
    print(f"{config.title}: {len(config.runs)} runs, {len(config.analyses)} analyses")
  for name, settings in config.runs.items():
    if distributed.is_main():
      print(f"\nrun {name}: {settings.method} on {settings.model}, {settings.rounds} rounds, in domain "
            f"{settings.task.name}, out of domain {', '.join(settings.task.ood)}")
    loop.dry_run(settings, str(Path(workdir) / name), rerun=rerun)
  for name, analysis in config.analyses.items():
    if distributed.is_main():
      is_done = (Path(workdir) / "analyses" / name / output.FILE).exists()
      print(f"\nanalysis {name}: {_describe(analysis)}: {'done' if is_done else 'to do'}")


def _check(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Raises UserError unless the work directory is a folder, or can become one, and is no run directory itself."""
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
