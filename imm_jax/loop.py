"""The rounds: which stages a run has, in which order, and what came out.

    round t:  samples -> train -> sft -> (merged) -> eval;  round t+1 starts from the merged model, else the tuned one
"""

import contextlib
import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections

from imm_jax import __version__, distributed, files, memory, report, rundir, stages
from imm_jax.config import HOW
from imm_jax.model import folder, hf, hub
from imm_jax.model.config import ModelConfig
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.rundir import Stage
from imm_jax.training.checkpoints import check_folder


def plan(config: ml_collections.ConfigDict, base: Path, root: Path) -> list[Stage]:
  """All stages of a run in order; `base` is the base model's folder, `root` the run directory."""
  settings = config.to_dict()
  result = [_evaluation(config, base, root, "base/eval", "base", -1)]
  start, start_name = base, "base"
  for t in range(config.rounds):
    name = f"round_{t}"
    here = root / name
    add = functools.partial(_stage, result, name)
    if config.method == "real":
      add("train.jsonl", (), _pick(settings, "seed", "task", "prompt"),
          f"{config.task.questions_per_round} gold answers", functools.partial(stages.gold_answers, config, t))
    else:
      count = config.task.questions_per_round * config.sample.num_samples
      add("samples.jsonl", (start_name,), _pick(settings, "seed", "task", "prompt", "sample"),
          f"{config.task.questions_per_round} questions x {config.sample.num_samples} = {count} answers, up to "
          f"{count * config.sample.max_new_tokens:,} tokens", functools.partial(stages.synthesize, config, start, t),
          everywhere=True)
      add("train.jsonl", (f"{name}/samples.jsonl",), {}, "keep the right answers",
          functools.partial(stages.keep_correct, here / "samples.jsonl"))
    result.append(Stage(f"{name}/sft", (start_name, f"{name}/train.jsonl"), _pick(settings, "seed", "prompt", "sft"),
                        f"{config.sft.epochs} epochs, {config.sft.global_batch} answers a step",
                        functools.partial(stages.fine_tune, config, start, here / "train.jsonl", root, t),
                        everywhere=True, scratch=stages.states_folder(config, root, t)))
    result.append(_evaluation(config, here / "sft", root, f"{name}/eval/sft", f"{name}/sft", t))
    if config.method == "imm":
      add("merged", ("base", start_name, f"{name}/sft"), _pick(settings, "seed", "merge"),
          f"base_weight {config.merge.base_weight}, drop_rate {config.merge.drop_rate}",
          functools.partial(stages.merge, config, base, start, here / "sft", t))
      result.append(_evaluation(config, here / "merged", root, f"{name}/eval/merged", f"{name}/merged", t))
    start_name = f"{name}/{'merged' if config.method == 'imm' else 'sft'}"
    start = root / start_name
  return result


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Runs what is not done yet, then prints the table and writes the report."""
  root = Path(workdir)
  rundir.check(workdir, config)
  with distributed.FailTogether(root), _opened(config, workdir) as (base, directory):
    # The bits of a sum on CPU depend on how many threads share it.
    threads = {"threads": len(os.sched_getaffinity(0))} if jax.default_backend() == "cpu" else {}
    directory.note(versions=_versions(), devices=[d.device_kind for d in jax.devices()], method=config.method,
                   tasks={"id": config.task.name, "ood": list(config.task.ood)}, **threads)
    external = {"base": folder.digest(base)} if distributed.is_main() else {}
    if distributed.is_main() and not directory.facts:
      hf.check_bytes(base)
    steps = plan(config, base, root)
    ran = sum(directory.run(stage, external) for stage in steps)
    if distributed.is_main():
      print(f"{ran} of {len(steps)} stages were run, the others were done before")
      results = report.Results.of(root)
      with files.committed(root / "report") as out:
        report.write(results, out)
      print(report.table(results))
      print(f"report: {root / 'report' / 'index.html'}")


@contextlib.contextmanager
def _opened(config: ml_collections.ConfigDict, workdir: str) -> Iterator[tuple[Path, rundir.RunDir]]:
  """The base model's folder and the run directory, both looked at before anything is spent."""
  base, _ = _check(config)
  if config.sft.state_dir and distributed.is_main():
    check_folder(config.sft.state_dir)  # now, for training comes late
  with rundir.RunDir(workdir, config) as directory:
    distributed.check_shared(directory.path)
    yield base, directory


def dry_run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Prints what `run` would do and changes nothing."""
  root = Path(workdir)
  base, model = _check(config)
  rundir.check(workdir, config)
  record = rundir.read_record(root)
  external = {"base": folder.digest(base) if record["stages"] else ""}  # a large model takes a while
  if not distributed.is_main():
    return
  steps = plan(config, base, root)
  waiting: set[str] = set()
  print(f"{'stage':<24}{'state':<8}work")
  for stage in steps:
    reason = rundir.why(stage, record, root, external)
    # What reads a stage that will be made again may have to follow.
    if reason or waiting.intersection(stage.needs):
      waiting.add(stage.name)
    again = f" ({reason})" if reason not in (None, "run") else ""
    print(f"{stage.name:<24}{'to do' if stage.name in waiting else 'done':<8}{stage.plan}{again}")
  print(f"\n{len(waiting)} of {len(steps)} stages to do; {memory.estimate(config, model, stages.mesh_of(config))}")


def _check(config: ml_collections.ConfigDict) -> tuple[Path, ModelConfig]:
  """The base model's folder and config; what cannot work ends the run before anything is spent."""
  base = hub.resolve(config.model)
  model = hf.check(base)
  load_tokenizer(base, rows=model.vocab_size)
  stages.mesh_of(config)
  return base, model


def _evaluation(config: ml_collections.ConfigDict, model: Path, root: Path, name: str, need: str, round_: int) -> Stage:
  names = (config.task.name, *config.task.ood)
  settings = _pick(config.to_dict(), "task", "prompt", "eval") | {
      "stop": list(config.sample.stop), "compute_dtype": config.sample.compute_dtype}
  evaluate = functools.partial(stages.evaluate, config, model, root, name, round_)
  return Stage(name, (need,), settings, f"{len(names)} tasks x {config.task.eval_questions} questions",
               lambda out, _: evaluate(out), everywhere=True)


def _stage(result: list[Stage], round_name: str, target: str, needs: tuple[str, ...], settings: dict[str, Any],
           what: str, make: Callable[[Path], dict[str, Any]], *, everywhere: bool = False) -> None:
  result.append(Stage(f"{round_name}/{target}", needs, settings, what, lambda out, _: make(out), everywhere))


def _pick(settings: dict[str, Any], *keys: str) -> dict[str, Any]:
  """Some of the settings, without those that do not change what comes out."""
  return {key: {k: v for k, v in settings[key].items() if f"{key}.{k}" not in HOW}
          if isinstance(settings[key], dict) else settings[key] for key in keys}


def _versions() -> dict[str, str]:
  return {"imm_jax": __version__} | {
      name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "transformers", "numpy")}
