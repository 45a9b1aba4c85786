"""Several runs under one config, such as those behind a table of the paper (`configs/paper.py`).

Such a config has `title`, `runs` (a config for each name) and `analyses`. Every run has its folder in the work
directory, where it resumes like any other. After the runs come the analyses, each in a folder in `analyses`; one that
is done is skipped while its models and settings are the same. `analyses/figures` shows them side by side.
"""

import json
from pathlib import Path
from typing import Any

import ml_collections

from imm_jax import config as configs, files, loop
from imm_jax.analysis.weight_change import weight_change
from imm_jax.errors import UserError
from imm_jax.methods import method_of
from imm_jax.model import folder, hf, hub
from imm_jax.report import analysis as output
from imm_jax.runs.run import pick
from imm_jax.runtime import distributed
from imm_jax.stages import analysing, devices


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
  for name, analysis in config.analyses.items():
    try:
      if analysis.kind == "importance":
        configs.validate(analysis.config, trains=False, downloads=False)
        configs.require(analysis.config, "analysis.examples", lambda n: n > 0, "expected 1 or more")
        analysing.check_entry(analysis.task)
    except UserError as e:
      raise UserError(f"analysis {name}: {e}") from e


def run(config: ml_collections.ConfigDict, workdir: str, *, rerun: bool = False) -> None:
  """Does one run after the other, then the analyses."""
  for settings in list(config.runs.values())[:1]:  # all sample alike
    devices.reserve_accelerators(settings)
  _check(config, workdir)
  for i, (name, settings) in enumerate(config.runs.items()):
    if distributed.is_main():
      print(f"\n{config.title}, run {i + 1} of {len(config.runs)}: {name}", flush=True)
    loop.run(settings, str(Path(workdir) / name), rerun=rerun)
  if config.analyses:
    _analyse(config, Path(workdir))


def _analyse(config: ml_collections.ConfigDict, root: Path) -> None:
  """Does the analyses that are not done yet, and draws all of them together."""
  together: dict[str, dict[str, Any]] = {"importance": {}, "weight_change": {}}
  with distributed.FailTogether(root):
    for name, analysis in config.analyses.items():
      models = {label: hub.resolve(model) for label, model in _models(config, analysis, root).items()}
      out = root / "analyses" / name
      asked = _asked(analysis, models) if distributed.is_main() else {}
      done = distributed.broadcast((out / output.FILE).exists() and files.read_json(out / output.FILE).get(
          "asked") == asked)
      if distributed.is_main():
        print(f"\nanalysis {name}: {_describe(analysis)}: {'done before' if done else 'run'}", flush=True)
      if not done:
        _one(analysis, models, out, asked)
      if distributed.is_main():
        found = files.read_json(out / output.FILE)
        print(output.format_table(found))
        for measure in together:
          for values in found[measure].values():
            together[measure][name] = values
    if distributed.is_main():
      with files.committed(root / "analyses" / "figures") as out:
        out.mkdir()
        output.write_figures(out, together)
      print(f"analyses: {root / 'analyses'}")


def _one(analysis: ml_collections.ConfigDict, models: dict[str, Path], out: Path, asked: dict[str, Any]) -> None:
  """Does one analysis: a folder like that of `python -m imm_jax.analyze`."""
  scores: dict[str, Any] = {}
  if analysis.kind == "importance":
    hf.check_folder(models["model"])
    analysis.config.model = analysis.model  # the mesh follows from its size
    scores = devices.call(analysis.config, analysing.importances, analysis.config, models["model"], [analysis.task])
  if distributed.is_main():
    change = {} if scores else {analysis.get("model") or analysis.after: weight_change(**models).to_json()}
    with files.committed(out) as made:
      output.write(made, {"asked": asked, **output.combine(scores, change)})
  distributed.barrier(str(out))


def _models(config: ml_collections.ConfigDict, analysis: ml_collections.ConfigDict, root: Path) -> dict[str, str]:
  """The models that an analysis reads, by what they are to it; before one of a run is what its round started from."""
  if analysis.kind == "importance":
    return {"model": analysis.model}
  if "run" not in analysis:
    return {"before": analysis.before, "after": analysis.after}
  settings, here = config.runs[analysis.run], root / analysis.run
  number = int(analysis.model.partition("/")[0].removeprefix("round_"))
  handed_on = {"merged": "merged", "ema": "sft/ema", "tuned": "sft"}[method_of(settings).hands_on]
  last = number and method_of(settings).start == "last"
  return {"before": str(here / f"round_{number - 1}" / handed_on) if last else settings.model,
          "after": str(here / analysis.model)}


def _asked(analysis: ml_collections.ConfigDict, models: dict[str, Path]) -> dict[str, Any]:
  """What an analysis depends on, as json reads it back."""
  settings = pick(analysis.config, "seed", "task", "prompt", "sft", "analysis") if (
      "config" in analysis) else {}
  return json.loads(json.dumps({
      **{key: value for key, value in analysis.items() if key != "config"}, "settings": settings,
      "digests": {label: folder.digest(model) for label, model in models.items()}}))


def dry_run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Prints what `run` would do, run by run and analysis by analysis; nothing is downloaded."""
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
      there = (Path(workdir) / "analyses" / name / output.FILE).exists()
      print(f"\nanalysis {name}: {_describe(analysis)}: {'done' if there else 'to do'}")


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
