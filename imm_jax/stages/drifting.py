"""How far the models of a round have gone from the base, on held-out texts of every task."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from imm_jax import distributed, files
from imm_jax.analysis.drift import measure_drift
from imm_jax.errors import UserError
from imm_jax.methods import averages
from imm_jax.metrics import StageMetrics
from imm_jax.model import hf
from imm_jax.model.tokenization import check_ids
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.run import Model, Run
from imm_jax.rundir import Stage
from imm_jax.scoring import encode_continuations
from imm_jax.stages import devices, questions, tuning
from imm_jax.tasks.base import Choice, Example
from imm_jax.training.packing import TokenizedExample

# What decides the texts and how they are computed with; of how many there are, see `stage`.
_SETTINGS = ("task.name", "task.source", "task.fields", "task.kind", "task.ood", "prompt.header", "prompt.style",
             "eval.by_likelihood", "eval.texts", "sft.row_length", "sft.global_batch", "sft.compute_dtype")


def stage(run: Run, tuned: Model, round_: int) -> Stage:
  """The drift of a round's models: the tuned one, the average over SFT and the merged one, where there are such."""
  here, count = f"round_{round_}", questions.drift_questions(run.config)
  models = {"sft": tuned} | ({"ema": tuning.average_of(tuned)} if averages(run.config) else {})
  models |= {"merged": run.model(f"{here}/merged")} if run.method.merge else {}
  name, folders = f"{here}/drift.json", {kind: model.folder for kind, model in models.items()}

  def make(out: Path, _: Any) -> dict[str, Any]:
    found = devices.call(run.config, measure, run.config, run.base.folder, folders, out, f"round {round_}: drift")
    with StageMetrics(run.root, f"{here}/drift") as metrics:
      metrics.write(round_ + 1, **{f"{measured}/{kind}/{task}": value for kind, tasks in found["models"].items()
                                   for task, values in tasks.items() for measured, value in values.items()})
    return {"kl": {kind: of[run.config.task.name]["kl"] for kind, of in found["models"].items()},
            "tokens_read": sum(of["tokens"] for of in found["texts"].values())}

  inputs = dict.fromkeys([run.base.stage, *(model.stage for model in models.values()), "test questions"])
  return Stage(name, tuple(inputs), run.settings(*_SETTINGS) | {"questions": count},
               f"KL to the base and loss, on up to {count} test questions of each task", make, everywhere=True,
               said=lambda facts: "KL to the base in domain, nats a token: " + ", ".join(
                   f"{kind} {value:.4f}" for kind, value in facts["kl"].items()))


def measure(config: ml_collections.ConfigDict, base: Path, models: dict[str, Path], out: Path, label: str,
            ) -> dict[str, Any]:
  """Writes drift.json and returns what it holds.

  `texts`: of each task and text of `eval.texts` how many `examples` and learned `tokens`, and the base's `loss` and
  `entropy`; `models`: for each model and text `kl` (KL(base || model)), `loss` and `entropy`; in nats a token.
  """
  texts = dict(texts_of(config, base))
  length = tuning.row_for(config, itertools.chain(*texts.values()))
  data = {name: tuning.pack(config, base, of, what=f"test questions of {name}", epochs=1, seed=0, quiet=True,
                            row_length=length) for name, of in texts.items()}
  dtype = next(iter(data.values())).options["compute_dtype"]
  found: dict[str, Any] = {"texts": {}, "models": {}}
  first = tuning.load_params(config, base, dtype)
  for kind, folder in models.items():
    params, found["models"][kind] = tuning.load_params(config, folder, dtype), {}
    for name, of in data.items():
      options = {key: value for key, value in of.options.items() if key != "remat"}  # there is no backward pass
      seen = measure_drift(of.model, first, params, of.batches, label=f"{label}, {kind} on {name}", **options)
      if not np.all(np.isfinite(seen)):
        raise UserError(f"{folder}: its predictions on the test questions of {name} are not finite")
      values = {key: round(value, 7) for key, value in seen._asdict().items()}
      found["texts"][name] = {"examples": len(of.lines), "tokens": seen.tokens, "loss": values["base_loss"],
                              "entropy": values["base_entropy"]}
      found["models"][kind][name] = {key: values[key] for key in ("kl", "loss", "entropy")}
    del params  # the next one takes its place
  if distributed.is_main():
    files.write_text(out, json.dumps(found, indent=1, allow_nan=False) + "\n")
  return found


def texts_of(config: ml_collections.ConfigDict, model: Path) -> Iterator[tuple[str, list[TokenizedExample]]]:
  """The held-out texts by name of the task or text, each of which has one at least.

  An answered task: its first test questions in the prompt of training, with the worked answer, or `The answer is X.`
  where there is none; one of options: the right option after its context; a text: passages, cut where a row ends.
  """
  count, known = questions.drift_questions(config), hf.read_config(model)
  tokenizer = load_tokenizer(model, rows=known.vocab_size)
  encode = tuning.encoder(config, model)
  tests, choices = questions.of_tests(config), questions.choices_of_tests(config)
  for name, examples in tests.items():
    if name in choices:
      requests = encode_continuations(tokenizer, list(map(_right, choices[name][:count])), rows=known.vocab_size,
                                      positions=known.max_positions)
      yield name, [TokenizedExample(list(r.tokens[:r.start]), list(r.tokens[r.start:])) for r in requests]
    else:
      yield name, [encode({"question": e.question, "response": _worked(e)}) for e in examples[:count]]
  for name, passages in questions.texts_of(config).items():
    found = [TokenizedExample([], check_ids(tokenizer, tokenizer(text)["input_ids"], known.vocab_size)[
        :config.sft.row_length]) for text in passages[:count]]
    if any(len(e.response) > 1 for e in found):  # the first token is predicted from nothing
      yield name, found


def _right(choice: Choice) -> tuple[str, str]:
  """The right option after its context."""
  return choice.contexts[choice.gold % len(choice.contexts)], choice.options[choice.gold]


def _worked(example: Example) -> str:
  return example.rationale or f"The answer is {example.answer}."
