"""Runs the rounds: plans the stages of a run in their order, runs those that are not done, and prints the results.

    round t:  samples -> train -> sft -> (merged) -> eval;  round t+1 starts from the model that the method hands on
"""

import contextlib
import importlib.metadata
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_collections

from imm_jax import __version__, report
from imm_jax.errors import UserError, join_items
from imm_jax.estimates import cost, disk, memory, shapes
from imm_jax.methods import is_sampling, keeps_average
from imm_jax.model import checkpoint_folder, hf, hub, published
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.runs import metrics, record as run_record, rundir, runlog, status
from imm_jax.runs.run import Checkpoint, Run, Stage
from imm_jax.runtime import distributed
from imm_jax.sampling import engines
from imm_jax.stages import analyze, devices, evaluate, fine_tune, measure_drift, merge, select, synthesize
from imm_jax.stages.round_questions import compute_digests
from imm_jax.stages.task_entries import get_tasks
from imm_jax.training.states import check_folder, find_saved


def plan(run: Run) -> list[Stage]:
  """Returns all stages of a run in their order."""
  method, tasks, start, stages = run.method, get_tasks(run.config), run.base, []
  if run.samples_answers and tasks.few_shot:
    stages.append(synthesize.build_shots_stage(run))
  stages.append(evaluate.build_stage(run, run.base, "base/eval", -1))
  for t in range(run.config.rounds):
    sampler = (run.teacher or start) if run.samples_answers else None
    if sampler:
      stages.append(synthesize.build_stage(run, sampler, t))
    begin = run.base if method.start == "base" else start
    stages += [train := select.build_stage(run, t), sft := fine_tune.build_stage(run, begin, train.name, t)]
    tuned = run.model(sft.name)
    stages.append(evaluate.build_stage(run, tuned, f"round_{t}/eval/sft", t))
    if keeps_average(run.config):
      stages.append(evaluate.build_stage(run, fine_tune.get_average(tuned), f"round_{t}/eval/ema", t))
    if method.merge:
      stages += merge.build_stages(run, begin, tuned, train.name, t)
    stages.append(analyze.build_stage(run, begin, sampler, t))
    if tasks.drift:
      stages.append(measure_drift.build_stage(run, tuned, t))
    start = run.get_next_start(t)
  return stages


def run(config: ml_collections.ConfigDict, workdir: str, *, rerun: bool = False) -> None:
  """Runs the stages that are not done, updates the report after each, and prints the table of results.

  If an earlier start had another config, the stages that depend on the changes run again.

  Args:
    config: settings of the run.
    workdir: the run directory; created if missing.
    rerun: whether changes of the config may discard samples and trained models.

  Raises:
    UserError: for a wrong setting, model, file or directory, and for changes that need `rerun`.
  """
  root = Path(workdir)
  devices.reserve_accelerators(config)
  rundir.check_workdir(workdir)
  metrics.check_tracking(config)
  with runlog.RunLog() as log, distributed.FailTogether(root), _open(config, workdir) as (
      models, directory, (platform, kinds)):
    # On CPU the bits of a sum depend on the number of threads that compute it.
    threads = {"threads": len(os.sched_getaffinity(0))} if platform == "cpu" else {}
    tasks = get_tasks(config)
    task_names = {"id": tasks.in_domain.name, "ood": [entry.name for entry in tasks.ood]}
    directory.record_facts(versions=_versions(), devices=kinds, method=config.method, tasks=task_names, **threads)
    # Only on CPU are the arrays in this process's memory, so that its peak can be recorded.
    on_host = platform == "cpu" and not devices.starts_server(config)
    external = {}
    if distributed.is_main():
      external = {name: checkpoint_folder.digest(model) for name, model in models.items()}
      external |= compute_digests(tasks)
      if not directory.facts:
        for model in models.values():
          hf.check_round_trip(model)
    stages = plan(_make_run(config, root, models))
    directory.begin(stages, external, rerun=rerun)
    if distributed.is_main():
      log.open(root / runlog.FILE)
      runlog.log_line(f"start of process {os.getpid()}, imm_jax {__version__}: {shlex.join(sys.argv)}")
    metrics.start_tracking(config, root)
    num_run, names = 0, [stage.name for stage in stages]
    with status.StatusWriter(root, names) as writer, report.Live(root, names) as page:
      for stage in stages:
        writer.set_stage(stage.name)
        if directory.run(stage, external, on_host=on_host):
          num_run += 1
          page.update()
    if distributed.is_main():
      print(f"{num_run} of {len(stages)} stages were run" + ", the others were done before" * (num_run < len(stages)))
      print(report.format_table(report.Results.read(root)))
      print(f"report: {root / 'report' / 'index.html'}")


@contextlib.contextmanager
def _open(config: ml_collections.ConfigDict, workdir: str,
          ) -> Iterator[tuple[dict[str, Path], rundir.RunDir, tuple[str, list[str]]]]:
  """Opens the run directory after all checks that cost little.

  Yields the model folders by role, the run directory, and the result of `devices.describe_devices`.
  """
  models = _check_models(config)
  engines.check_engine(config)
  description = devices.call(config, devices.describe_devices, config)
  with rundir.RunDir(workdir, config) as directory:
    if config.sft.state_dir and distributed.is_main():
      check_folder(config.sft.state_dir)  # checked now, because training begins much later
    distributed.check_shared(directory.path)
    yield models, directory, description


def dry_run(config: ml_collections.ConfigDict, workdir: str, *, rerun: bool = False) -> None:
  """Prints what `run` would do, and estimates of its cost; changes nothing and downloads nothing of a hub's model.

  Raises:
    UserError: as `run` does; for changes that need `rerun` after everything is printed.
  """
  root = Path(workdir)
  is_local = all(map(hub.is_local, filter(None, (config.model, config.teacher))))
  devices.make_mesh(config)  # checks the mesh
  models = _check_models(config, downloads=False) if is_local else {"base": Path(config.model)} | (
      {"teacher": Path(config.teacher)} if config.teacher else {})
  model = published.find_config(config.model)
  rundir.check_workdir(workdir)
  if not distributed.is_main():
    return
  record = run_record.read(root)
  recorded = {name: value for entry in record["stages"].values() for name, value in entry["inputs"].items()}
  # What is not on this machine counts as unchanged. The digest of a large model takes a while, so it is only computed
  # if there is a record to compare it with.
  external = {name: checkpoint_folder.digest(path) if record["stages"] and is_local else recorded.get(name, "")
              for name, path in models.items()}
  tasks = get_tasks(config)
  if tasks.has_remote_texts or any(entry.is_remote for entry in tasks.own):
    external |= {name: recorded.get(name, "") for name in ("train questions", "test questions")}
  else:
    external |= compute_digests(tasks)
  stages = plan(_make_run(config, root, models))
  run_record.accept_former_settings(record, stages)
  consequences = rundir.find_consequences(root, config, record, stages, external)
  to_do: set[str] = set()
  if line := status.format_line(status.read(root)):
    print(f"{root}: {line}")
  for _, line in rundir.list_changes(root, config):
    print(line)
  print(f"{'stage':<24}{'state':<8}work")
  for stage in stages:
    reason = run_record.stale_reason(stage, record, root, external)
    # A stage that reads the output of one that will run may have to run, too.
    if reason or to_do.intersection(stage.needs):
      to_do.add(stage.name)
    suffix = f" ({reason})" if reason not in (None, "run") else ""
    state = "done" if stage.name not in to_do else "again" if stage.name in record["stages"] else "to do"
    if state == "to do" and stage.scratch and (saved := find_saved(stage.scratch)):
      state, suffix = "begun", f" (step {saved.step} is saved)"
    print(f"{stage.name:<24}{state:<8}{stage.plan}{suffix}")
  teacher = published.find_config(config.teacher) if config.teacher else None
  sizes, lengths = f"{config.model} is not on this machine, so its size is not known", {}
  if model:
    base = models["base"] if is_local else None
    expected = shapes.estimate(config, model, base)
    sizes = memory.describe(config, model, devices.make_mesh(config), expected, teacher) + "\n" + disk.describe(
        config, model, expected, root, base)
    lengths = {"question": expected.question, "answer": expected.answer}
  tokens_and_hours = cost.describe(config, model, record, teacher, [stage.name for stage in stages], **lengths)
  if consequences.dropped:
    print(f"no longer a part of the run: {join_items(consequences.dropped)}")
  print(f"\n{len(to_do)} of {len(stages)} stages to do\n{tasks.describe_tests()}\n{sizes}\n"
        f"the whole run: {tokens_and_hours}")
  if consequences.refusal and not rerun:
    raise UserError(consequences.refusal)


def _check_models(config: ml_collections.ConfigDict, *, downloads: bool = True) -> dict[str, Path]:
  """Returns the folders of the base model and the teacher, after checks of both, which may download questions."""
  models = {"base": hub.resolve(config.model)} | ({"teacher": hub.resolve(config.teacher)} if config.teacher else {})
  for model in models.values():
    load_tokenizer(model, rows=hf.check_folder(model).vocab_size)
  if downloads or not any(entry.is_remote for entry in get_tasks(config).own):
    synthesize.check_prompts_fit(config, models["base"], models.get("teacher", models["base"]), is_sampling(config))
  return models


def _make_run(config: ml_collections.ConfigDict, root: Path, models: dict[str, Path]) -> Run:
  return Run(config, root, **{name: Checkpoint(folder, name) for name, folder in models.items()})


def _versions() -> dict[str, str]:
  return {"imm_jax": __version__} | {
      name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "transformers", "numpy")}
