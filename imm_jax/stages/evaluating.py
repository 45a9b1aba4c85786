"""How a model does on the test questions of every task."""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from imm_jax import distributed, evaluation, files
from imm_jax.metrics import StageMetrics
from imm_jax.run import Model, Run
from imm_jax.rundir import Stage
from imm_jax.sampling import Prompt
from imm_jax.stages import devices, likelihood, lm_eval_tasks, questions, sampling
from imm_jax.tasks import answers, protocols
from imm_jax.tasks.base import Example

# Settings of greedy answers, wherever they are asked for.
ANSWERING = ("eval", "sample.stop", "sample.compute_dtype", "sampler")


def stage(run: Run, model: Model, name: str, round_: int) -> Stage:
  """The evaluation of a model; `round_` is -1 for the base."""
  return Stage(name, (model.stage, "test questions"), run.settings("seed", "task", "prompt", *ANSWERING),
               _plan(run.config), functools.partial(_measure, run, model.folder, name, round_), everywhere=True,
               scratch=str(run.scratch(name)))


def _plan(config: ml_collections.ConfigDict) -> str:
  samples = f", {config.eval.num_samples} samples each" if config.eval.num_samples else ""
  limit, counts = config.task.eval_questions, questions.count_tests(config)
  fewer = any(count < limit for count in counts)
  asked = f", {sum(counts)} questions" if fewer else f" x {limit or 'all'} questions"
  shown = questions.shown_in_evaluation(config)
  how = f", protocol {config.eval.protocol}" if shown or config.eval.protocol != "paper" else ""
  return f"{len(counts)} tasks{asked}{samples}{how}"


def _measure(run: Run, model: Path, name: str, round_: int, out: Path, _: Any) -> dict[str, Any]:
  """`evaluate`, and its figures among the run's metrics."""
  facts = evaluate(run.config, model, run.scratch(name), out, label=name)
  with StageMetrics(run.root, name) as metrics:
    metrics.write(round_ + 1, **{f"accuracy/{task}" if metric == "greedy" else f"{metric}/{task}": score["value"]
                                 for task, found in facts["scores"].items() for metric, score in found.items()},
                  **{f"{key}/{task}": how[key] for task, how in facts["protocol"].items()
                     for key in ("mean_tokens", "cut")},
                  **{f"{key}/{text}": found[key]["value"] for text, found in facts["texts"].items()
                     for key in ("nats_per_token", "bits_per_byte")})
  return facts


def evaluate(config: ml_collections.ConfigDict, model: Path, scratch: Path, out: Path, *, label: str) -> dict[str, Any]:
  """Asks a model all test questions of a config: a folder with <task>.jsonl, a row a question.

  Answers are greedy and asked for by `eval.protocol`; with `config.eval.num_samples` there is also
  <task>_samples.jsonl, for pass@k and the majority vote. Of other tasks options are scored (`likelihood`), or
  lm-evaluation-harness runs them (`lm_eval_tasks`). `scratch` is a folder for what came of a start that was killed
  (`sampling.sampler_of`).

  Returns:
    `scores`: for each task, figures by name, the first of which counts (`greedy`, `pass@4`, `majority@16`; `acc`,
    `acc_norm`; lm_eval's); `texts`: see `likelihood.measure`; `protocol`: for each task, how its figures came
    (`described`); `long_prompts`: questions that were skipped since they do not fit, for each task that has any.
  """
  if distributed.is_main():
    out.mkdir()
  scores: dict[str, dict[str, evaluation.Accuracy]] = {}
  how: dict[str, dict[str, Any]] = {}
  skipped: dict[str, int] = {}
  asked = [(entry, name, examples) for entry, (name, examples) in zip(
      questions.own(config), questions.of_tests(config).items(), strict=True)
           if questions.measure_of(config, entry) == "answer"]
  with contextlib.ExitStack() as stack:
    if asked:
      sampler = stack.enter_context(sampling.sampler_of(config, model, config.eval.batch_size, scratch))
    for entry, name, examples in asked:
      rows, skipped[name] = greedy(config, model, sampler, entry, examples, label=f"{label}: {name}")
      drawn = _samples(config, model, sampler, entry, examples, label=f"{label}: {name}, samples")
      if distributed.is_main():
        how[name] = described(config, name, rows)
        files.write_jsonl(out / f"{name}.jsonl", rows)
        scores[name] = {"greedy": evaluation.accuracy(sum(r["correct"] for r in rows), len(rows))}
        if drawn:
          files.write_jsonl(out / f"{name}_samples.jsonl", drawn)
          scores[name] |= of_samples(drawn, [k for k in config.eval.pass_at_k if k <= config.eval.num_samples])
  sampler = None  # its weights are not to lie beside those that score
  found = {"scores": {name: {metric: score._asdict() for metric, score in found.items()}
                      for name, found in scores.items()}, "protocol": how, "texts": {}}
  if questions.scores_texts(config):
    found = _joined(found, devices.call(config, likelihood.measure, config, model, scratch, out, label))
  if questions.lm_eval_tasks(config):
    found = _joined(found, devices.call(config, lm_eval_tasks.measure, config, model, scratch, out, label))
  names = [questions.name_of(entry) for entry in (config.task.name, *config.task.ood)]
  ordered = {key: {name: of[name] for name in names if name in of} for key, of in found.items() if key != "texts"}
  return {**ordered, "texts": found["texts"], "long_prompts": {name: count for name, count in skipped.items() if count}}


def _joined(found: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
  return {key: value | more[key] for key, value in found.items()}


def greedy(config: ml_collections.ConfigDict, model: Path, sampler: sampling.Generate, entry: str,
           examples: Sequence[Example], *, label: str) -> tuple[list[dict[str, Any]], int]:
  """Greedy answers to questions of a task, by its entry in the config, with verdicts (empty but on process 0), and how
  many questions do not fit."""
  protocol, asked, long = _asked(config, model, entry, examples, label)
  completions = sampler([Prompt(e.id, text) for e, text in asked], label=label,
                        max_new_tokens=protocols.max_new_tokens(config), stop=protocol.stop)
  return sampling.judged([e for e, _ in asked], completions, strict=False,
                         read=protocol.read) if distributed.is_main() else [], long


def described(config: ml_collections.ConfigDict, task: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """How greedy answers came: the protocol's `name`, `shots` in a prompt, `n` answers, their `mean_tokens`, and the
  share that was `cut` at `eval.max_new_tokens`."""
  protocol = protocols.get_protocol(config, task)
  return {"name": protocol.name, "shots": protocol.few_shot, "n": len(rows),
          "mean_tokens": round(sum(r["tokens"] for r in rows) / len(rows), 2),
          "cut": round(sum(r["finish"] == "length" for r in rows) / len(rows), 4)}


def _asked(config: ml_collections.ConfigDict, model: Path, entry: str, examples: Sequence[Example], label: str,
           ) -> tuple[protocols.Protocol, list[tuple[Example, str]], int]:
  """The protocol of a task, its questions with their prompts, and how many do not fit."""
  protocol = protocols.get_protocol(config, questions.name_of(entry))
  return protocol, *sampling.fitting(config, model, examples, limit="eval.max_new_tokens", what=label,
                                     shots=questions.shots_of(config, entry), prompt=protocol.prompt)


def _samples(config: ml_collections.ConfigDict, model: Path, sampler: sampling.Generate, entry: str,
             examples: Sequence[Example], *, label: str) -> list[dict[str, Any]]:
  settings = config.eval
  if not settings.num_samples:
    return []
  protocol, asked, _ = _asked(config, model, entry, examples, label)
  completions = sampler(
      [Prompt(f"eval/{e.id}", text) for e, text in asked], max_new_tokens=protocols.max_new_tokens(config),
      num_samples=settings.num_samples, temperatures=(settings.temperature,), top_p=settings.top_p,
      stop=protocol.stop, seed=config.seed, label=label)
  return sampling.judged([e for e, _ in asked], completions, strict=False, read=protocol.read,
                         temperatures=(settings.temperature,)) if distributed.is_main() else []


def of_samples(rows: Sequence[dict[str, Any]], ks: Sequence[int]) -> dict[str, evaluation.Accuracy]:
  """pass@k for each k, and the accuracy of the majority vote, over samples of which each question has as many."""
  groups: dict[str, list[dict[str, Any]]] = {}
  for row in rows:
    groups.setdefault(row["id"], []).append(row)
  found = {f"pass@{k}": evaluation.mean([evaluation.pass_at_k(len(g), sum(r["correct"] for r in g), k)
                                         for g in groups.values()]) for k in ks}
  winners = [(g, evaluation.majority([answers.canonical(r["span"], r["kind"]) for r in g])) for g in groups.values()]
  right = sum(winner is not None and g[winner]["correct"] for g, winner in winners)
  return found | {f"majority@{len(next(iter(groups.values())))}": evaluation.accuracy(right, len(groups))}
