"""Analyses of a round or of checkpoints: layer importance, weight change by layer, and diversity of samples."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from imm_jax import files, tasks
from imm_jax.analysis import diversity
from imm_jax.analysis.importance import layer_importance
from imm_jax.analysis.weight_change import spearman, weight_change
from imm_jax.errors import UserError, suggest
from imm_jax.model import hf
from imm_jax.model.config import PROJECTIONS
from imm_jax.model.decoder import Params
from imm_jax.model.tokenization import check_ids
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.runs.run import Checkpoint, Run, Stage
from imm_jax.runtime import distributed
from imm_jax.stages import devices, fine_tune
from imm_jax.stages.merge_settings import get_settings
from imm_jax.stages.round_questions import list_round_keys, load_round
from imm_jax.stages.task_entries import get_entry, get_tasks
from imm_jax.tasks import sources, texts
from imm_jax.training import gradients
from imm_jax.training.packing import TokenizedExample

# The fields of a sample that its diversity needs.
_DIVERSITY_FIELDS = {"id": str, "question": str, "text": str, "span": str, "kind": str}
Json = dict[str, Any]


class Round(NamedTuple):
  """Holds the inputs of a round's analysis.

  Attributes:
    number: number of the round, from 0.
    folder: folder of the round, with train.jsonl, sft and, if any, samples.jsonl, importance.json and merged.
    base: folder of the base model.
    start: folder of the model that the round started from.
    sampler: folder of the model that sampled, or None if none did.
    merges: whether there is a merged model.
  """

  number: int
  folder: Path
  base: Path
  start: Path
  sampler: Path | None
  merges: bool


def build_stage(run: Run, start: Checkpoint, sampler: Checkpoint | None, round_: int) -> Stage:
  """Builds the stage that analyzes a round, given its initial model and, if any, the model that sampled."""
  here, merge = f"round_{round_}", run.merge_method
  needs = [run.base.stage, start.stage, f"{here}/train.jsonl", f"{here}/sft"]
  needs += [f"{here}/merged"] * bool(merge)
  needs += [f"{here}/importance.json"] * get_settings(run.config).needs_importance
  needs += [sampler.stage, f"{here}/samples.jsonl"] if sampler else []
  round_inputs = Round(round_, run.root / here, run.base.folder, start.folder, sampler and sampler.folder, bool(merge))
  count = run.config.analysis.examples
  return Stage(f"{here}/analysis.json", tuple(needs),
               run.settings(*list_round_keys(get_tasks(run.config)), "sft") | {"analysis": {"examples": count}},
               "weight change by layer" + (f"; importance and entropy on {count} answers" if count else ""),
               lambda out, _: devices.call(run.config, analyze_round, run.config, round_inputs, out), everywhere=True)


def build_importance_stage(run: Run, model: Checkpoint, train: str, name: str) -> Stage:
  """Builds the stage that measures a model's layer importance on the training data of a round."""
  return Stage(name, (model.stage, train), run.settings("seed", "prompt", "sft"),
               "of each layer of the start, on train.jsonl (eq. 3)",
               lambda out,
               _: devices.call(run.config, write_importance, run.config, model.folder, run.root / train, out),
               everywhere=True)


def write_importance(config: ml_collections.ConfigDict, model: Path, train: Path, out: Path) -> dict[str, Any]:
  """Writes importance.json: eq. 3 for the model on all of train.jsonl, by layer and by module."""
  examples = list(map(fine_tune.make_encoder(config, model), fine_tune.read_train(train)))
  if examples:
    data = fine_tune.pack(config, model, examples, source=train, epochs=1, seed=config.seed)
    scores = _compute_scores(data, fine_tune.load_params(config, model), order=1, label="importance")
  else:  # data.skip_empty: without data all layers count the same
    equal = [1.0] * hf.read_config(model).num_layers
    scores = {"examples": 0, "dropped_long": 0, "order": 1, "layers": equal,
              "modules": dict.fromkeys(PROJECTIONS, equal)}
  if distributed.is_main():
    files.write_json(out, scores)
  return {"examples": scores["examples"], "most_important": int(np.argmax(scores["layers"]))}


def measure_importance(config: ml_collections.ConfigDict, model: Path, entries: Sequence[str], order: int = 1,
                       ) -> dict[str, Json]:
  """Measures a model's layer importance on `config.analysis.examples` examples of each task or corpus.

  Args:
    config: run config, of which seed, prompt, sft, mesh and analysis matter.
    model: checkpoint folder.
    entries: each `NAME` or `NAME=SOURCE`: a task, of which the worked answers of the train split are used (for mbpp the
      programs); a corpus of `texts.CORPORA`; or `text=SOURCE` for any other text.
    order: 1 (eq. 3) or 2 (eq. 2).

  Returns:
    The importance for each entry, in the form of importance.json.

  Raises:
    UserError: for an unknown name, or a task without worked answers to train on.
  """
  # All data are read before anything is computed, so that errors come early.
  data = {entry: fine_tune.pack(config, model, load_examples(config, model, entry), source=entry, epochs=1,
                                seed=config.seed) for entry in entries}
  params = fine_tune.load_params(config, model)
  return {entry: _compute_scores(packed, params, order=order, label=f"importance on {entry}")
          for entry, packed in data.items()}


def analyze_round(config: ml_collections.ConfigDict, round_: Round, out: Path) -> dict[str, Any]:
  """Writes analysis.json of a round and returns its main figures.

  The file has `importance` of the round's initial model on answers of train.jsonl; `weight_change` of `sft` relative to
  the initial model and of `merged` relative to the base; `spearman`, the rank correlation between importance and weight
  change by SFT; and `diversity` of the samples. What is not measured is null.
  """
  rng = np.random.default_rng((config.seed, round_.number))
  # A cache of one model, so that only one is in memory at a time.
  cache: dict[Path, Params] = {}

  def params(model: Path) -> Params:
    if model not in cache:
      cache.clear()
      cache[model] = fine_tune.load_params(config, model)
    return cache[model]

  scores = _measure_round_importance(config, round_, rng, params)
  rows = files.read_jsonl(round_.folder / "samples.jsonl", _DIVERSITY_FIELDS) if round_.sampler else []
  entropy = _measure_entropy(config, round_, rows, rng, params)
  cache.clear()
  if not distributed.is_main():
    return {}
  change = {"sft": weight_change(round_.start, round_.folder / "sft").to_json()}
  if round_.merges:
    change["merged"] = weight_change(round_.base, round_.folder / "merged").to_json()
  rank = spearman(scores["layers"], change["sft"]["layers"]) if scores else None
  sampled = diversity.measure_diversity(rows)._asdict() | {"token_entropy": entropy} if rows else None
  analysis = {"importance": scores, "weight_change": change, "spearman": rank, "diversity": sampled}
  files.write_json(out, analysis, allow_nan=False)
  facts = {"spearman": rank} | {k: (sampled or {}).get(k) for k in ("distinct_answers", "token_entropy")}
  return {name: round(value, 6) for name, value in facts.items() if value is not None}


def _measure_round_importance(config: ml_collections.ConfigDict, round_: Round, rng: np.random.Generator,
                              params: Callable[[Path], Params]) -> Json | None:
  if (round_.folder / "importance.json").exists():
    return files.read_json(round_.folder / "importance.json")
  if not config.analysis.examples:
    return None
  train = round_.folder / "train.jsonl"
  if not train.stat().st_size:
    return None
  examples = _draw(fine_tune.read_train(train), config.analysis.examples, rng,
                   fine_tune.make_encoder(config, round_.start),
                   lambda e: len(e.prompt) + len(e.response) <= config.sft.row_length)
  data = fine_tune.pack(config, round_.start, examples, source=train, epochs=1, seed=config.seed, quiet=True)
  return _compute_scores(data, params(round_.start), order=1, label=f"round {round_.number}: importance")


def _measure_entropy(config: ml_collections.ConfigDict, round_: Round, rows: Sequence[Json], rng: np.random.Generator,
                     params: Callable[[Path], Params]) -> float | None:
  """Measures the token entropy of the samples' texts, without end tokens, under their own model and prompts."""
  if not (rows and config.analysis.examples):
    return None
  model = round_.sampler
  shots = load_round(get_tasks(config), round_.number).shots
  encode = fine_tune.make_encoder(config, model, shots=shots, ends=False)
  examples = _draw([{**row, "response": row["text"]} for row in rows], config.analysis.examples, rng, encode,
                   lambda e: bool(e.response))
  if not examples:
    return None
  # Prompts have worked examples here, and are longer than in training.
  data = fine_tune.pack(config, model, examples, source="samples", epochs=1, seed=config.seed, quiet=True,
                        row_length=fine_tune.choose_row_length(config, examples))
  return diversity.token_entropy(data.model, params(model), data.batches, data.computation,
                                 label=f"round {round_.number}: entropy")


def _draw(rows: Sequence[Json], count: int, rng: np.random.Generator, encode: Callable[[Json], TokenizedExample],
          fits: Callable[[TokenizedExample], bool]) -> list[TokenizedExample]:
  """Draws and encodes at most `count` of the rows that fit."""
  drawn = (encode(rows[i]) for i in rng.permutation(len(rows)))
  return list(itertools.islice(filter(fits, drawn), count))


def _compute_scores(data: fine_tune.Data, params: Params, *, order: int, label: str) -> Json:
  """Computes layer importance in the form of importance.json."""
  if order == 1:
    sums = (gradients.gradient(data.model, params, data.batches, data.computation, label=label),)
  else:
    sums = gradients.gradient_and_squares(data.model, params, data.batches, data.computation, label=label)
  return {"examples": len(data.lines), "dropped_long": data.dropped, "order": order,
          **layer_importance(params, *sums).to_json()}


def check_entry(entry: str) -> None:
  """Raises UserError unless an entry is valid for `measure_importance`."""
  name, _, source = entry.partition("=")
  known = [*tasks.NAMES, *texts.CORPORA, "text"]
  if name not in known:
    raise UserError(f"task {name!r}: {suggest(name, known)}")
  if name == "text" and not source:
    raise UserError("task text needs a source: text=file:PATH.txt, or records with a field text")
  if source and name in tasks.NAMES and tasks.is_generated(name):
    raise UserError(f"task {entry}: {name} is generated and has no source")
  if source:
    sources.check(source)


def load_examples(config: ml_collections.ConfigDict, model: Path, entry: str) -> list[TokenizedExample]:
  """Loads the examples of an entry of `measure_importance`: worked answers, or passages cut to the length of a row.

  Raises:
    UserError: as `measure_importance` does.
  """
  check_entry(entry)
  (name, _, source), count = entry.partition("="), config.analysis.examples
  if name == "text" or name in texts.CORPORA:
    passages = tasks.load_text(name.removeprefix("text"), source=source, count=count)
    rows, length = hf.read_config(model).vocab_size, config.sft.row_length
    tokenizer = load_tokenizer(model, rows=rows)
    cut = [TokenizedExample([], check_ids(tokenizer, tokenizer(text)["input_ids"][:length], rows))
           for text in passages]
    if all(len(e.response) < 2 for e in cut):
      raise UserError(f"task {entry}: no passage has a second token that is predicted from the first (they are cut at "
                      f"config.sft.row_length={length}); give more text")
    return cut
  try:
    examples = get_entry(config, entry).load(split="train", count=count if tasks.is_generated(name) else None)
  except ValueError as e:
    raise UserError(f"task {entry}, config.analysis.examples={count}: {e}") from e
  worked = [e for e in examples if e.rationale][:count]
  if not worked:
    raise UserError(f"task {entry}: none of its {len(examples)} answers is worked out, as importance is measured on "
                    "them; give a source whose answers are")
  encode = fine_tune.make_encoder(config, model)
  return [encode({"question": e.question, "response": e.rationale}) for e in worked]
