"""The rounds: which stages a run has, in which order, and what came out.

    round t:  samples -> train -> sft -> (merged) -> eval;  round t+1 starts from the merged model, else the tuned one
"""

import contextlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_collections

from imm_jax import __version__, cost, distributed, memory, report, rundir
from imm_jax.config import HOW, MERGES, REUSES, draws
from imm_jax.model import folder, hf, hub, published
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.rundir import Stage
from imm_jax.stages import analysing, devices, evaluating, merging, questions, sampling, selection, tuning
from imm_jax.training.checkpoints import check_folder

# Settings of greedy answers, wherever they are asked for.
_ANSWERING = ("eval", "sample.stop", "sample.compute_dtype", "sampler")


def plan(config: ml_collections.ConfigDict, base: Path, root: Path, teacher: Path | None = None) -> list[Stage]:
  """All stages of a run in order.

  Args:
    config: of the run.
    base: the base model's folder.
    root: the run directory.
    teacher: the folder of the model that samples, or None for the model that the round starts from.
  """
  settings, auto = config.to_dict(), _is_auto(config)
  result: list[Stage] = []

  def add(name: str, needs: Sequence[str], keys: Sequence[str], what: str, make: Callable[..., dict[str, Any]], *,
          with_inputs: bool = False, **options: Any) -> None:
    result.append(Stage(name, tuple(needs), pick(settings, *keys), what,
                        make if with_inputs else lambda out, _: make(out), **options))

  def scratch(name: str) -> Path:
    return (root / name).with_name(f".{Path(name).name}.sampling")

  def evaluate(model: Path, name: str, need: str, round_: int) -> None:
    add(name, (need, "test questions"), ("seed", "task", "prompt", *_ANSWERING), _evaluation_plan(config),
        partial(evaluating.stage, config, model, root, name, round_, scratch(name)), everywhere=True,
        scratch=str(scratch(name)))

  # Questions that are shown in evaluation or held out are not asked.
  asks = ("seed", "task", "prompt", *(("merge.auto.questions",) if auto else ()),
          *(("eval.protocol", "eval.few_shot", "eval.shots_file") if questions.shown_in_evaluation(config) else ()))
  samples = draws(config)
  if samples and config.prompt.few_shot:
    add("few_shot.jsonl", ("train questions",), asks, f"the {config.prompt.few_shot} worked examples of the prompt",
        partial(sampling.write_shots, config))
  evaluate(base, "base/eval", "base", -1)
  start, start_name = base, "base"
  for t in range(config.rounds):
    here, name = root / f"round_{t}", f"round_{t}"
    train, tuned = here / "train.jsonl", here / "sft"
    if samples:
      sampler, sampler_name = (teacher, "teacher") if teacher else (start, start_name)
      beside = scratch(f"{name}/samples.jsonl")
      add(f"{name}/samples.jsonl", (sampler_name, "train questions"), (*asks, "sample", "sampler"),
          _sampling_plan(config), partial(sampling.synthesize, config, sampler, t, beside), everywhere=True,
          scratch=str(beside))
    drawn = [f"round_{s}/samples.jsonl" for s in range(t + 1)] if samples else []
    reads = drawn if config.method in REUSES else drawn[-1:]
    add(f"{name}/train.jsonl", ("train questions", *reads), (*asks, "method", "data"),
        _selection_plan(config), partial(selection.select, config, [root / name for name in drawn], t))
    add(f"{name}/sft", (start_name, f"{name}/train.jsonl"), ("seed", "prompt", "sft"),
        f"{config.sft.epochs} epochs, {config.sft.global_batch} answers a step",
        partial(devices.call, config, tuning.fine_tune, config, start, train, root, t), with_inputs=True,
        everywhere=True, scratch=tuning.states_folder(config, root, t))
    evaluate(tuned, f"{name}/eval/sft", f"{name}/sft", t)
    if config.method in MERGES:
      models = merging.Models(base, start, tuned, here / "importance.json" if config.method == "iimm" else None)
      inputs = ["base", start_name, f"{name}/sft"]
      if models.importance:
        add(f"{name}/importance.json", (start_name, f"{name}/train.jsonl"), ("seed", "prompt", "sft"),
            "of each layer of the start, on train.jsonl (eq. 3)",
            partial(devices.call, config, analysing.importance, config, start, train), everywhere=True)
        inputs.append(f"{name}/importance.json")
      if config.merge.sweep:
        add(f"{name}/sweep", inputs, ("seed", "merge"), f"base weights {config.merge.sweep}",
            partial(merging.sweep, config, models, t))
        for weight in config.merge.sweep:
          evaluate(here / "sweep" / f"{weight:g}", f"{name}/eval/sweep_{weight:g}", f"{name}/sweep", t)
      weight_file = here / "base_weight.json" if auto else None
      if weight_file:
        beside = scratch(f"{name}/base_weight.json")
        add(f"{name}/base_weight.json", [*inputs, "train questions"], (*asks, "merge", *_ANSWERING),
            _choice_plan(config), partial(merging.choose_weight, config, models, t, beside), everywhere=True,
            scratch=str(beside))
        inputs = [*inputs, f"{name}/base_weight.json"]
      add(f"{name}/merged", inputs, ("seed", "merge"),
          f"base_weight {config.merge.base_weight}, drop_rate {config.merge.drop_rate}",
          partial(merging.merge, config, models, t, weight_file))
      evaluate(here / "merged", f"{name}/eval/merged", f"{name}/merged", t)
    merges = config.method in MERGES
    seen = analysing.Round(t, here, base, start, (teacher or start) if samples else None, merges)
    inputs = ["base", start_name, f"{name}/train.jsonl", f"{name}/sft"]
    inputs += [f"{name}/merged"] * merges + [f"{name}/importance.json"] * (config.method == "iimm")
    inputs += [sampler_name, f"{name}/samples.jsonl"] if samples else []
    add(f"{name}/analysis.json", inputs, (*asks, "sft", "analysis"), _analysis_plan(config),
        partial(devices.call, config, analysing.analyse, config, seen), everywhere=True)
    start_name = f"{name}/{'merged' if merges else 'sft'}"
    start = root / start_name
  return result


def _is_auto(config: ml_collections.ConfigDict) -> bool:
  return config.merge.base_weight == "auto"


def _evaluation_plan(config: ml_collections.ConfigDict) -> str:
  samples = f", {config.eval.num_samples} samples each" if config.eval.num_samples else ""
  limit, counts = config.task.eval_questions, questions.count_tests(config)
  fewer = any(count < limit for count in counts)
  asked = f", {sum(counts)} questions" if fewer else f" x {limit or 'all'} questions"
  shown = questions.shown_in_evaluation(config)
  how = f", protocol {config.eval.protocol}" if shown or config.eval.protocol != "paper" else ""
  return f"{len(counts)} tasks{asked}{samples}{how}"


def _choice_plan(config: ml_collections.ConfigDict) -> str:
  auto = config.merge.auto
  groups = f", up to {2 * auto.groups} more by groups of layers" if auto.groups else ""
  return f"{len(auto.weights)} base weights{groups}, on {1 + len(auto.general)} x {auto.questions} held-out questions"


def _sampling_plan(config: ml_collections.ConfigDict) -> str:
  asked = config.task.questions_per_round
  if not asked:
    return f"{config.sample.num_samples} answers to every train question"
  count = asked * config.sample.num_samples
  return (f"{asked} questions x {config.sample.num_samples} = {count} answers, up to "
          f"{count * config.sample.max_new_tokens:,} tokens")


def _analysis_plan(config: ml_collections.ConfigDict) -> str:
  count = config.analysis.examples
  return "weight change by layer" + (f"; importance and entropy on {count} answers" if count else "")


def _selection_plan(config: ml_collections.ConfigDict) -> str:
  data, real = config.data, "real worked answers"
  if config.method == "real" or data.real_fraction == 1:
    return real
  parts = {"data_mixture": f"the right answers, and {data.mixture_share:.0%} of each earlier round's",
           "data_accumulation": "the right answers of all rounds so far"}.get(config.method, "the right answers")
  if config.method == "data_accumulation" and data.with_real:
    return f"{parts}, and {real}"
  return f"{parts}, {data.real_fraction:.0%} {real}" if data.real_fraction else parts


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Runs what is not done yet, with a report after each stage, then prints the table."""
  root = Path(workdir)
  devices.leave_to_others(config)
  rundir.check(workdir, config)
  with distributed.FailTogether(root), _opened(config, workdir) as (found, directory, (platform, kinds)):
    # The bits of a sum on CPU depend on how many threads share it.
    threads = {"threads": len(os.sched_getaffinity(0))} if platform == "cpu" else {}
    directory.note(versions=_versions(), devices=kinds, method=config.method,
                   tasks={"id": config.task.name, "ood": [questions.name_of(entry) for entry in config.task.ood]},
                   **threads)
    on_host = platform == "cpu" and not devices.starts_server(config)  # else others compute, or devices hold it
    external = {}
    if distributed.is_main():
      external = {name: folder.digest(model) for name, model in found.items()} | questions.digests(config)
      if not directory.facts:
        for model in found.values():
          hf.check_bytes(model)
    steps = plan(config, found["base"], root, found.get("teacher"))
    ran = 0
    with report.Live(root, [stage.name for stage in steps]) as page:
      for stage in steps:
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
  """The models' folders, the run directory and `devices.look`, all looked at before anything is spent."""
  found = _check(config)
  sampling.check_sampler(config)
  looked = devices.call(config, devices.look, config)
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
  model = published.config_of(config.model)
  rundir.check(workdir, config)
  if not distributed.is_main():
    return
  record = rundir.read_record(root)
  # A large model takes a while; one of the hub has the digest that was recorded.
  external = {name: folder.digest(model) if record["stages"] and local else "" for name, model in found.items()}
  if any(questions.is_remote(config, entry) for entry in questions.own(config)):
    recorded = {name: value for entry in record["stages"].values() for name, value in entry["inputs"].items()}
    external |= {name: recorded.get(name, "") for name in ("train questions", "test questions")}
  else:
    external |= questions.digests(config)
  steps = plan(config, found["base"], root, found.get("teacher"))
  waiting: set[str] = set()
  print(f"{'stage':<24}{'state':<8}work")
  for stage in steps:
    reason = rundir.why(stage, record, root, external)
    # What reads a stage that will be made again may have to follow.
    if reason or waiting.intersection(stage.needs):
      waiting.add(stage.name)
    again = f" ({reason})" if reason not in (None, "run") else ""
    print(f"{stage.name:<24}{'to do' if stage.name in waiting else 'done':<8}{stage.plan}{again}")
  teacher = published.config_of(config.teacher) if config.teacher else None
  sizes = f"{config.model} is not on this machine, so its size is not known"
  if model:
    expected = tuning.expect(config, model, found["base"] if local else None)
    sizes = memory.estimate(config, model, devices.mesh_of(config), expected, teacher)
  print(f"\n{len(waiting)} of {len(steps)} stages to do\n{questions.describe_tests(config)}\n{sizes}\n"
        f"the whole run: {cost.estimate(config, model, record, teacher)}")


def _check(config: ml_collections.ConfigDict, *, dry: bool = False) -> dict[str, Path]:
  """The folders of the base model and of the teacher; what cannot work ends the run before anything is spent.

  With `dry` no questions are downloaded.
  """
  found = {"base": hub.resolve(config.model)} | ({"teacher": hub.resolve(config.teacher)} if config.teacher else {})
  for model in found.values():
    load_tokenizer(model, rows=hf.check(model).vocab_size)
  entries = questions.own(config)
  if not (dry and any(questions.is_remote(config, entry) for entry in entries)):
    sampling.check(config, found["base"], found.get("teacher", found["base"]), draws(config))
  return found


def pick(settings: dict[str, Any], *keys: str) -> dict[str, Any]:
  """Some of the settings (`sft`, `sample.stop`), without those that do not change what comes out."""
  picked = {}
  for key in keys:
    value: Any = settings
    for part in key.split("."):
      value = value[part]
    picked[key] = {k: v for k, v in value.items() if f"{key}.{k}" not in HOW} if isinstance(value, dict) else value
  return picked


def _versions() -> dict[str, str]:
  return {"imm_jax": __version__} | {
      name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "transformers", "numpy")}
