"""Drift of a round's models from the base, measured on held-out texts of every task."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from imm_jax import files
from imm_jax.analysis.drift import measure_drift
from imm_jax.errors import UserError
from imm_jax.methods import keeps_average
from imm_jax.model import hf
from imm_jax.model.tokenization import check_ids
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.runs.metrics import StageMetrics
from imm_jax.runs.run import Checkpoint, Run, Stage
from imm_jax.runtime import distributed
from imm_jax.scoring import encode_continuations
from imm_jax.stages import devices, fine_tune
from imm_jax.stages.task_entries import get_tasks
from imm_jax.tasks.base import Choice, Example
from imm_jax.training.packing import TokenizedExample

# Settings that determine the texts and the computation; `build_stage` adds the number of texts.
_SETTINGS = ("task.name", "task.source", "task.fields", "task.kind", "task.ood", "prompt.header", "prompt.style",
             "eval.by_likelihood", "eval.texts", "sft.row_length", "sft.global_batch", "sft.compute_dtype")


def build_stage(run: Run, tuned: Checkpoint, round_: int) -> Stage:
  """Builds the stage that measures a round's tuned model and, if any, its moving average and the merged model."""
  here, count = f"round_{round_}", get_tasks(run.config).drift
  models = {"sft": tuned} | ({"ema": fine_tune.get_average(tuned)} if keeps_average(run.config) else {})
  models |= {"merged": run.model(f"{here}/merged")} if run.method.merge else {}
  name, folders = f"{here}/drift.json", {kind: model.folder for kind, model in models.items()}

  def make(out: Path, _: Any) -> dict[str, Any]:
    drifts = devices.call(run.config, measure, run.config, run.base.folder, folders, out, f"round {round_}: drift")
    with StageMetrics(run.root, f"{here}/drift", tracking=run.config.tracking) as metrics:
      metrics.write(round_ + 1, **{f"{key}/{kind}/{task}": value for kind, tasks in drifts["models"].items()
                                   for task, values in tasks.items() for key, value in values.items()})
    return {"kl": {kind: tasks[run.config.task.name]["kl"] for kind, tasks in drifts["models"].items()},
            "tokens_read": sum(text["tokens"] for text in drifts["texts"].values())}

  inputs = dict.fromkeys([run.base.stage, *(model.stage for model in models.values()), "test questions"])
  return Stage(name, tuple(inputs), run.settings(*_SETTINGS) | {"questions": count},
               f"KL to the base and loss, on up to {count} test questions of each task", make, everywhere=True,
               summarize=lambda facts: "KL to the base in domain, nats a token: " + ", ".join(
                   f"{kind} {value:.4f}" for kind, value in facts["kl"].items()))


def measure(config: ml_collections.ConfigDict, base: Path, models: dict[str, Path], out: Path, label: str,
            ) -> dict[str, Any]:
  """Writes drift.json and returns its contents.

  `texts` has, for each task and each text of `eval.texts`, the number of `examples` and learned `tokens`, and the
  base's `loss` and `entropy`; `models` has, for each model and text, `kl` (KL(base || model)), `loss` and `entropy`;
  all in nats per token.
  """
  texts = dict(encode_texts(config, base))
  length = fine_tune.choose_row_length(config, itertools.chain(*texts.values()))
  data = {name: fine_tune.pack(config, base, examples, source=f"test questions of {name}", epochs=1, seed=0, quiet=True,
                               row_length=length) for name, examples in texts.items()}
  dtype = next(iter(data.values())).computation.compute_dtype
  drifts: dict[str, Any] = {"texts": {}, "models": {}}
  base_params = fine_tune.load_params(config, base, dtype)
  for kind, folder in models.items():
    params, drifts["models"][kind] = fine_tune.load_params(config, folder, dtype), {}
    for name, packed in data.items():
      result = measure_drift(packed.model, base_params, params, packed.batches, packed.computation,
                             label=f"{label}, {kind} on {name}")
      if not np.all(np.isfinite(result)):
        raise UserError(f"{folder}: its predictions on the test questions of {name} are not finite")
      values = {key: round(value, 7) for key, value in result._asdict().items()}
      drifts["texts"][name] = {"examples": len(packed.lines), "tokens": result.tokens, "loss": values["base_loss"],
                               "entropy": values["base_entropy"]}
      drifts["models"][kind][name] = {key: values[key] for key in ("kl", "loss", "entropy")}
    del params  # frees its memory before the next one is loaded
  if distributed.is_main():
    files.write_json(out, drifts, allow_nan=False)
  return drifts


def encode_texts(config: ml_collections.ConfigDict, model: Path) -> Iterator[tuple[str, list[TokenizedExample]]]:
  """Yields the held-out examples of each task and text, with its name; none without examples.

  Of a task with generated answers: its first test questions with the prompt of training and the worked answer, or `The
  answer is X.` if there is none. Of a multiple-choice task: the right option after its context. Of a text: passages,
  truncated to the length of a row.
  """
  tasks, model_config = get_tasks(config), hf.read_config(model)
  tokenizer = load_tokenizer(model, rows=model_config.vocab_size)
  encode = fine_tune.make_encoder(config, model)
  tests, choices, count = tasks.load_tests(), tasks.load_test_choices(), tasks.drift
  for name, examples in tests.items():
    if name in choices:
      requests = encode_continuations(tokenizer, list(map(_right_option, choices[name][:count])),
                                      rows=model_config.vocab_size, positions=model_config.max_positions)
      yield name, [TokenizedExample(list(r.tokens[:r.start]), list(r.tokens[r.start:])) for r in requests]
    else:
      yield name, [encode({"question": e.question, "response": _worked_answer(e)}) for e in examples[:count]]
  for name, passages in tasks.load_passages().items():
    examples = [TokenizedExample([], check_ids(tokenizer, tokenizer(text)["input_ids"], model_config.vocab_size)[
        :config.sft.row_length]) for text in passages[:count]]
    if any(len(e.response) > 1 for e in examples):  # the first token is not predicted
      yield name, examples


def _right_option(choice: Choice) -> tuple[str, str]:
  """Returns the context and the right option of a question."""
  return choice.contexts[choice.gold % len(choice.contexts)], choice.options[choice.gold]


def _worked_answer(example: Example) -> str:
  return example.rationale or f"The answer is {example.answer}."
