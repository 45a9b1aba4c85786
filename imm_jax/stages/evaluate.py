"""Evaluation of a model on the test questions of every task."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from imm_jax import files
from imm_jax.model import checkpoint_folder
from imm_jax.runs.metrics import StageMetrics
from imm_jax.runs.run import Checkpoint, Run, Stage
from imm_jax.runtime import distributed
from imm_jax.sampling import Prompt
from imm_jax.stages import devices, likelihood, lm_eval_tasks, synthesize
from imm_jax.stages.result_cache import FOLDER, ResultCache
from imm_jax.stages.task_entries import RunTask, Tasks, get_tasks
from imm_jax.stages.worked_examples import load_shots
from imm_jax.statistics import accuracy
from imm_jax.tasks import answers, protocols
from imm_jax.tasks.base import Example

# Settings that determine answers to test questions.
ANSWERING = ("eval", "sample.stop", "sample.compute_dtype", "sampler")
# Settings of `eval` that do not affect greedy answers: the others' samples, and what is scored by likelihood.
_OF_SAMPLES = ("num_samples", "pass_at_k", "temperature", "top_p")
# Characters of a text that are shown.
_BEGINNING = 200
_OF_OTHERS = ("texts", "passages", "lm_eval")


def build_stage(run: Run, model: Checkpoint, name: str, round_: int) -> Stage:
  """Builds the stage that evaluates a model; `round_` is -1 for the base."""
  former = run.settings("seed", "task", "prompt", *ANSWERING)
  return Stage(name, (model.stage, "test questions"), _pick_effective(former, get_tasks(run.config)),
               _plan(get_tasks(run.config), run.config.eval.num_samples),
               functools.partial(_measure, run, model.folder, name, round_), everywhere=True,
               scratch=str(run.scratch(name)), former_settings=former, takes_over=True)


def _pick_effective(settings: dict[str, Any], tasks: Tasks) -> dict[str, Any]:
  """Returns the settings of an evaluation without those that have no effect on it."""
  asked = settings["eval"]
  idle = () if asked["num_samples"] else _OF_SAMPLES
  idle += () if asked["texts"] else ("passages",)
  idle += () if tasks.lm_eval else ("lm_eval",)
  result = settings | {"task": _without(settings["task"], "questions_per_round"), "eval": _without(asked, *idle)}
  return result if asked["num_samples"] or tasks.lm_eval else _without(result, "seed")


def pick_greedy(settings: dict[str, Any]) -> dict[str, Any]:
  """Returns settings without those of `eval` that do not affect greedy answers."""
  return settings | {"eval": _without(settings["eval"], *_OF_SAMPLES, *_OF_OTHERS)}


def _without(settings: dict[str, Any], *keys: str) -> dict[str, Any]:
  return {key: value for key, value in settings.items() if key not in keys}


def _plan(tasks: Tasks, num_samples: int) -> str:
  samples = f", {num_samples} samples each" if num_samples else ""
  limit, counts = tasks.per_test, tasks.count_tests()
  fewer = any(count < limit for count in counts)
  phrase = f", {sum(counts)} questions" if fewer else f" x {limit or 'all'} questions"
  shown, name = tasks.get_protocol(tasks.in_domain).few_shot, tasks.protocol.name
  protocol = f", protocol {name}" if shown or name != "paper" else ""
  return f"{len(counts)} tasks{phrase}{samples}{protocol}"


def _measure(run: Run, model: Path, name: str, round_: int, out: Path, _: Any) -> dict[str, Any]:
  """Evaluates a model and adds the scores to the run's metrics."""
  cache = ResultCache(out, run.root / name, run.root / FOLDER)
  facts = evaluate(run.config, model, run.scratch(name), cache, label=name)
  with StageMetrics(run.root, name, tracking=run.config.tracking) as metrics:
    metrics.write(round_ + 1, **{f"accuracy/{task}" if metric == "greedy" else f"{metric}/{task}": score["value"]
                                 for task, scores in facts["scores"].items() for metric, score in scores.items()},
                  **{f"{key}/{task}": protocol[key] for task, protocol in facts["protocol"].items()
                     for key in ("mean_tokens", "cut")},
                  **{f"{key}/{text}": scores[key]["value"] for text, scores in facts["texts"].items()
                     for key in ("nats_per_token", "bits_per_byte")})
  return facts


def evaluate(config: ml_collections.ConfigDict, model: Path, scratch: Path, cache: ResultCache, *, label: str,
             ) -> dict[str, Any]:
  """Evaluates a model on all test questions of a config.

  Writes the folder `cache.out` with <task>.jsonl, one row per question; files of an earlier evaluation whose model,
  questions and settings are the same are taken over. Answers are greedy, with the prompts of `eval.protocol`; with
  `config.eval.num_samples` there is also <task>_samples.jsonl, for pass@k and the majority vote. Multiple-choice tasks
  are scored by likelihood (`likelihood`); lm-evaluation-harness runs its own tasks (`lm_eval_tasks`). `scratch` is a
  folder for partial results, from which a killed evaluation resumes.

  Returns:
    `scores`: for each task its metrics, the primary one first (`greedy`, `pass@4`, `majority@16`; `acc`, `acc_norm`;
    lm_eval's); `texts`: see `likelihood.measure`; `protocol`: for each task how it was measured (`describe_protocol`);
    `long_prompts`: for each task with any, the number of questions skipped because they do not fit.
  """
  if distributed.is_main():
    cache.out.mkdir()
  scores: dict[str, dict[str, accuracy.Accuracy]] = {}
  protocol: dict[str, dict[str, Any]] = {}
  skipped: dict[str, int] = {}
  tasks, settings = get_tasks(config), config.eval
  answered_tasks = [(entry, examples) for entry, examples in zip(tasks.own, tasks.load_tests().values(), strict=True)
                    if entry.measure == "answer"]
  digest = checkpoint_folder.digest(model) if distributed.is_main() else ""
  with contextlib.ExitStack() as stack:
    sampler = functools.cache(lambda: stack.enter_context(
        synthesize.open_sampler(config, model, settings.batch_size, scratch)))
    for entry, examples in answered_tasks:
      name = entry.name
      shots = load_shots(tasks, entry)
      rows, samples, skipped[name] = _answer_task(config, model, digest, sampler, entry, examples, shots, cache, label)
      if distributed.is_main():
        protocol[name] = describe_protocol(tasks, entry, rows, shots)
        scores[name] = {"greedy": accuracy.compute_accuracy(sum(r["correct"] for r in rows), len(rows))}
        if samples:
          scores[name] |= score_samples(samples, [k for k in settings.pass_at_k if k <= settings.num_samples])
  sampler.cache_clear()  # frees its weights before others are loaded for scoring
  result = {"scores": {name: {metric: score._asdict() for metric, score in metrics.items()}
                       for name, metrics in scores.items()}, "protocol": protocol, "texts": {}}
  if tasks.needs_likelihood:
    result = _join(result, devices.call(config, likelihood.measure, config, model, scratch, cache, label))
  if tasks.lm_eval:
    result = _join(result, devices.call(config, lm_eval_tasks.measure, config, model, scratch, cache, label))
  ordered = {key: {name: value[name] for name in tasks.names if name in value}
             for key, value in result.items() if key != "texts"}
  long = {name: count for name, count in skipped.items() if count}
  if distributed.is_main():
    cache.finish()
  return {**ordered, "texts": result["texts"], "long_prompts": long}


def _answer_task(config: ml_collections.ConfigDict, model: Path, digest: str,
                 sampler: Callable[[], synthesize.Generate], entry: RunTask, examples: Sequence[Example],
                 shots: Sequence[Example], cache: ResultCache, label: str,
                 ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
  """Answers a task's questions or takes the answers over; returns both kinds of rows and the number of long prompts.

  `digest` is that of the model, and `sampler` opens its sampler, which takes a while.
  """
  tasks, name, drawn = get_tasks(config), entry.name, config.eval.num_samples
  protocol, prompts, long = _prepare(tasks, model, entry, examples, shots, f"{label}: {name}")
  asked = {"model": digest, "sampler": config.sampler.kind, "dtype": config.sample.compute_dtype,
           "protocol": protocol.name, "stop": list(protocol.stop), "max_new_tokens": tasks.protocol.token_limit,
           "questions": [[e.id, e.question, e.answer, e.kind, text] for e, text in prompts]}
  rows, _ = cache.obtain(name, asked, lambda: (_answer(
      tasks, sampler(), entry, prompts, label=f"{label}: {name}"), {}), label=label)
  if not drawn:
    return rows, [], long
  drawing = {"num_samples": drawn, "temperature": config.eval.temperature, "top_p": config.eval.top_p,
             "seed": config.seed}
  samples, _ = cache.obtain(f"{name}_samples", asked | drawing, lambda: (_answer_repeatedly(
      tasks, sampler(), entry, prompts, label=f"{label}: {name}, samples", **drawing), {}), label=label)
  return rows, samples, long


def list_first_prompts(config: ml_collections.ConfigDict, model: Path) -> list[tuple[str, int, str]]:
  """Lists name, number of questions and first prompt of each of a config's tasks but lm_eval's.

  Options whose likelihood is measured follow their context in brackets, each on a line of its own. Of a text it is the
  number of passages, and the beginning of the first.
  """
  tasks = get_tasks(config)
  listed = {}
  for entry, examples in zip(tasks.own, tasks.load_tests().values(), strict=True):
    if entry.measure == "answer":
      _, prompts, long = _prepare(tasks, model, entry, examples, load_shots(tasks, entry), entry.name)
      listed[entry.name] = (len(prompts) + long, prompts[0][1])
  for name, choices in tasks.load_test_choices().items():
    first = choices[0]
    options = [f"{first.contexts[i % len(first.contexts)]}[{option}]" for i, option in enumerate(first.options)]
    listed[name] = (len(choices), "\n".join(options))
  for name, passages in tasks.load_passages().items():
    listed[name] = (len(passages), f"{passages[0][:_BEGINNING]}...")
  return [(name, *listed[name]) for name in dict.fromkeys((*tasks.names, *listed)) if name in listed]


def _join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
  return {key: value | second[key] for key, value in first.items()}


def answer_greedily(tasks: Tasks, model: Path, sampler: synthesize.Generate, entry: RunTask,
                    examples: Sequence[Example], *, label: str) -> tuple[list[dict[str, Any]], int]:
  """Answers questions of a task greedily.

  Returns:
    A row with the verdict for each answer (empty except on process 0), and the number of questions that do not fit.
  """
  _, prompts, long = _prepare(tasks, model, entry, examples, load_shots(tasks, entry), label)
  return _answer(tasks, sampler, entry, prompts, label=label), long


def _answer(tasks: Tasks, sampler: synthesize.Generate, entry: RunTask, prompts: Sequence[tuple[Example, str]], *,
            label: str) -> list[dict[str, Any]]:
  protocol = tasks.get_protocol(entry)
  completions = sampler([Prompt(e.id, text) for e, text in prompts], label=label,
                        max_new_tokens=tasks.protocol.token_limit, stop=protocol.stop)
  return synthesize.judge_samples([e for e, _ in prompts], completions, strict=False,
                                  read=protocol.read) if distributed.is_main() else []


def describe_protocol(tasks: Tasks, entry: RunTask, rows: Sequence[dict[str, Any]], shots: Sequence[Example] = (),
                      ) -> dict[str, Any]:
  """Describes how greedy answers were obtained: the protocol's `name`, `shots` per prompt, `n` answers, `mean_tokens`
  per answer, the share that was `cut` at `max_new_tokens`, the number `unread` because nothing in them could be judged,
  whether prompts are a `chat`, `stop`, the paper's `header`, and the `shots_digest` of the worked examples if given.
  """
  protocol = tasks.get_protocol(entry)
  shown = [[e.question, e.rationale] for e in shots]
  return {"name": protocol.name, "shots": protocol.few_shot, "n": len(rows), "chat": protocol.chat,
          "stop": list(protocol.stop), "max_new_tokens": tasks.protocol.token_limit,
          **({"header": tasks.protocol.header} if protocol.name == "paper" else {}),
          "mean_tokens": round(sum(r["tokens"] for r in rows) / len(rows), 2),
          "cut": round(sum(r["finish"] == "length" for r in rows) / len(rows), 4),
          "unread": sum(not r["span"] for r in rows),
          **({"shots_digest": files.digest_json(shown, digits=16)} if shown else {})}


def _prepare(tasks: Tasks, model: Path, entry: RunTask, examples: Sequence[Example], shots: Sequence[Example],
             label: str) -> tuple[protocols.Protocol, list[tuple[Example, str]], int]:
  """Returns the protocol of a task, the questions that fit with their prompts, and how many do not fit."""
  protocol = tasks.get_protocol(entry)
  return protocol, *synthesize.build_prompts(
      model, examples, protocol.prompt, shots=shots, limit="eval.max_new_tokens",
      max_new_tokens=tasks.protocol.token_limit, source=label)


def _answer_repeatedly(tasks: Tasks, sampler: synthesize.Generate, entry: RunTask,
                       prompts: Sequence[tuple[Example, str]], *, label: str, num_samples: int, temperature: float,
                       top_p: float, seed: int) -> list[dict[str, Any]]:
  """Returns the rows of several answers to each question, as in `answer_greedily`."""
  protocol = tasks.get_protocol(entry)
  completions = sampler(
      [Prompt(f"eval/{e.id}", text) for e, text in prompts], max_new_tokens=tasks.protocol.token_limit,
      num_samples=num_samples, temperatures=(temperature,), top_p=top_p, stop=protocol.stop, seed=seed, label=label)
  return synthesize.judge_samples([e for e, _ in prompts], completions, strict=False, read=protocol.read,
                                  temperatures=(temperature,)) if distributed.is_main() else []


def score_samples(rows: Sequence[dict[str, Any]], ks: Sequence[int]) -> dict[str, accuracy.Accuracy]:
  """Computes pass@k for each k and the accuracy of the majority vote; each question has the same number of samples."""
  groups: dict[str, list[dict[str, Any]]] = {}
  for row in rows:
    groups.setdefault(row["id"], []).append(row)
  scores = {f"pass@{k}": accuracy.compute_mean([accuracy.pass_at_k(len(g), sum(r["correct"] for r in g), k)
                                                for g in groups.values()]) for k in ks}
  winners = [(g, accuracy.majority([answers.canonical(r["span"], r["kind"]) for r in g])) for g in groups.values()]
  right = sum(winner is not None and g[winner]["correct"] for g, winner in winners)
  return scores | {f"majority@{len(next(iter(groups.values())))}": accuracy.compute_accuracy(right, len(groups))}
