"""The rounds: which stages a run has, in which order, and what came out.

    round t:  samples -> train -> sft -> (merged) -> eval;  round t+1 starts from what the method hands on
"""

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

import ml_collections

from imm_jax import __version__, report
from imm_jax.estimates import cost, disk, memory, shapes
from imm_jax.methods import keeps_average, samples_answers
from imm_jax.model import folder, hf, hub, published
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.runs import metrics, record as run_record, rundir, runlog, status
from imm_jax.runs.run import Model, Run, Stage
from imm_jax.runtime import distributed
from imm_jax.stages import analysing, devices, drifting, evaluating, merging, questions, sampling, selection, tuning
from imm_jax.training.checkpoints import check_folder


def plan(run: Run) -> list[Stage]:
  """All stages of a run in order."""
  method, start, stages = run.method, run.base, []
  if run.samples_answers and run.config.prompt.few_shot:
    stages.append(sampling.shots_stage(run))
  stages.append(evaluating.stage(run, run.base, "base/eval", -1))
  for t in range(run.config.rounds):
    sampler = (run.teacher or start) if run.samples_answers else None
    if sampler:
      stages.append(sampling.stage(run, sampler, t))
    begin = run.base if method.start == "base" else start
    stages += [train := selection.stage(run, t), sft := tuning.stage(run, begin, train.name, t)]
    tuned = run.model(sft.name)
    stages.append(evaluating.stage(run, tuned, f"round_{t}/eval/sft", t))
    if keeps_average(run.config):
      stages.append(evaluating.stage(run, tuning.average_of(tuned), f"round_{t}/eval/ema", t))
    if method.merge:
      stages += merging.stages(run, begin, tuned, train.name, t)
    stages.append(analysing.stage(run, begin, sampler, t))
    if questions.drift_questions(run.config):
      stages.append(drifting.stage(run, tuned, t))
    start = {"merged": run.model(f"round_{t}/merged"), "ema": tuning.average_of(tuned), "tuned": tuned}[method.hands_on]
  return stages


def run(config: ml_collections.ConfigDict, workdir: str, *, rerun: bool = False) -> None:
  """Runs what is not done yet, with a report after each stage, then prints the table.

  Where an earlier start had another config, stages that depend on what changed are run again; `rerun` says whether that
  may throw samples and trained models away.
  """
  root = Path(workdir)
  devices.reserve_accelerators(config)
  rundir.check(workdir)
  metrics.check_tracking(config)
  with runlog.RunLog() as log, distributed.FailTogether(root), _opened(config, workdir) as (
      found, directory, (platform, kinds)):
    # The bits of a sum on CPU depend on how many threads share it.
    threads = {"threads": len(os.sched_getaffinity(0))} if platform == "cpu" else {}
    task_names = {"id": config.task.name, "ood": [questions.name_of(entry) for entry in config.task.ood]}
    directory.record_facts(versions=_versions(), devices=kinds, method=config.method, tasks=task_names, **threads)
    on_host = platform == "cpu" and not devices.starts_server(config)  # else others compute, or devices hold it
    external = {}
    if distributed.is_main():
      external = {name: folder.digest(model) for name, model in found.items()} | questions.digests(config)
      if not directory.facts:
        for model in found.values():
          hf.check_round_trip(model)
    steps = plan(_run(config, root, found))
    directory.begin(steps, external, rerun=rerun)
    if distributed.is_main():
      log.open(root / runlog.FILE)
    metrics.start_tracking(config, root)
    ran, names = 0, [stage.name for stage in steps]
    with status.StatusWriter(root, names) as writer, report.Live(root, names) as page:
      for stage in steps:
        writer.set_stage(stage.name)
        if directory.run(stage, external, on_host=on_host):
          ran += 1
          page.update()
    if distributed.is_main():
      print(f"{ran} of {len(steps)} stages were run, the others were done before")
      print(report.table(report.Results.of(root)))
      print(f"report: {root / 'report' / 'index.html'}")


@contextlib.contextmanager
def _opened(config: ml_collections.ConfigDict, workdir: str,
            ) -> Iterator[tuple[dict[str, Path], rundir.RunDir, tuple[str, list[str]]]]:
  """The models' folders, the run directory and `devices.describe_devices`, all looked at before anything is spent."""
  found = _check(config)
  sampling.check_sampler(config)
  looked = devices.call(config, devices.describe_devices, config)
  with rundir.RunDir(workdir, config) as directory:
    if config.sft.state_dir and distributed.is_main():
      check_folder(config.sft.state_dir)  # now, for training comes late
    distributed.check_shared(directory.path)
    yield found, directory, looked


def dry_run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Prints what `run` would do and changes nothing; of a model of the hub nothing is downloaded."""
  root = Path(workdir)
  local = all(map(hub.is_local, filter(None, (config.model, config.teacher))))
  devices.mesh_of(config)
  found = _check(config, dry=True) if local else {"base": Path(config.model)} | (
      {"teacher": Path(config.teacher)} if config.teacher else {})
  model = published.find_config(config.model)
  rundir.check(workdir)
  if not distributed.is_main():
    return
  record = run_record.read(root)
  # A large model takes a while; one of the hub has the digest that was recorded.
  external = {name: folder.digest(model) if record["stages"] and local else "" for name, model in found.items()}
  if any(questions.is_remote(config, entry) for entry in questions.own(config)) or questions.has_remote_texts(config):
    recorded = {name: value for entry in record["stages"].values() for name, value in entry["inputs"].items()}
    external |= {name: recorded.get(name, "") for name in ("train questions", "test questions")}
  else:
    external |= questions.digests(config)
  steps = plan(_run(config, root, found))
  waiting: set[str] = set()
  if line := status.format_line(status.read(root)):
    print(f"{root}: {line}")
  for _, line in rundir.list_changes(root, config):
    print(line)
  print(f"{'stage':<24}{'state':<8}work")
  for stage in steps:
    reason = run_record.stale_reason(stage, record, root, external)
    # What reads a stage that will be made again may have to follow.
    if reason or waiting.intersection(stage.needs):
      waiting.add(stage.name)
    again = f" ({reason})" if reason not in (None, "run") else ""
    print(f"{stage.name:<24}{'to do' if stage.name in waiting else 'done':<8}{stage.plan}{again}")
  teacher = published.find_config(config.teacher) if config.teacher else None
  sizes, lengths = f"{config.model} is not on this machine, so its size is not known", {}
  if model:
    expected = shapes.estimate(config, model, found["base"] if local else None)
    sizes = memory.describe(config, model, devices.mesh_of(config), expected, teacher) + "\n" + disk.describe(
        config, model, expected, root, found["base"] if local else None)
    lengths = {"question": expected.question, "answer": expected.answer}
  took = cost.describe(config, model, record, teacher, [stage.name for stage in steps], **lengths)
  print(f"\n{len(waiting)} of {len(steps)} stages to do\n{questions.describe_tests(config)}\n{sizes}\n"
        f"the whole run: {took}")


def _check(config: ml_collections.ConfigDict, *, dry: bool = False) -> dict[str, Path]:
  """The folders of the base model and of the teacher; what cannot work ends the run before anything is spent.

  With `dry` no questions are downloaded.
  """
  found = {"base": hub.resolve(config.model)} | ({"teacher": hub.resolve(config.teacher)} if config.teacher else {})
  for model in found.values():
    load_tokenizer(model, rows=hf.check_folder(model).vocab_size)
  entries = questions.own(config)
  if not (dry and any(questions.is_remote(config, entry) for entry in entries)):
    sampling.check(config, found["base"], found.get("teacher", found["base"]), samples_answers(config))
  return found


def _run(config: ml_collections.ConfigDict, root: Path, found: dict[str, Path]) -> Run:
  return Run(config, root, **{name: Model(folder, name) for name, folder in found.items()})


def _versions() -> dict[str, str]:
  return {"imm_jax": __version__} | {
      name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "transformers", "numpy")}
