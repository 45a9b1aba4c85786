"""Which layers matter, which have moved, and how diverse the samples are: of a round, or of any checkpoints."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from imm_jax import distributed, files, tasks
from imm_jax.analysis import MODULES, diversity, importance as layers
from imm_jax.analysis.weight_change import spearman, weight_change
from imm_jax.errors import UserError, nearest
from imm_jax.model import hf
from imm_jax.model.decoder import Params
from imm_jax.model.tokenization import check_ids
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.run import Model, Run
from imm_jax.rundir import Stage
from imm_jax.stages import devices, questions, tuning
from imm_jax.tasks import texts
from imm_jax.training.packing import TokenizedExample

_SAMPLE = {"id": str, "question": str, "text": str, "span": str, "kind": str}
Found = dict[str, Any]


class Round(NamedTuple):
  """What is analysed of a round.

  Attributes:
    number: of the round, from 0.
    folder: its folder, with train.jsonl, sft, and what else there is of samples.jsonl, importance.json and merged.
    base: folder of the base model.
    start: of the model that the round started from.
    sampler: of the model that sampled, or None where none did.
    merges: whether there is a merged model.
  """

  number: int
  folder: Path
  base: Path
  start: Path
  sampler: Path | None
  merges: bool


def stage(run: Run, start: Model, sampler: Model | None, round_: int) -> Stage:
  """The analysis of a round, from the model that it started from and the one that sampled, if any did."""
  here, merge = f"round_{round_}", run.merges
  inputs = [run.base.stage, start.stage, f"{here}/train.jsonl", f"{here}/sft"]
  inputs += [f"{here}/merged"] * bool(merge) + [f"{here}/importance.json"] * (merge == "iimm")
  inputs += [sampler.stage, f"{here}/samples.jsonl"] if sampler else []
  seen = Round(round_, run.root / here, run.base.folder, start.folder, sampler and sampler.folder, bool(merge))
  count = run.config.analysis.examples
  return Stage(f"{here}/analysis.json", tuple(inputs),
               run.settings(*questions.settings_of_round(run.config), "sft") | {"analysis": {"examples": count}},
               "weight change by layer" + (f"; importance and entropy on {count} answers" if count else ""),
               lambda out, _: devices.call(run.config, analyse, run.config, seen, out), everywhere=True)


def importance_stage(run: Run, model: Model, train: str, name: str) -> Stage:
  """Layer importance of a model on what a round trains on."""
  return Stage(name, (model.stage, train), run.settings("seed", "prompt", "sft"),
               "of each layer of the start, on train.jsonl (eq. 3)",
               lambda out, _: devices.call(run.config, importance, run.config, model.folder, run.root / train, out),
               everywhere=True)


def importance(config: ml_collections.ConfigDict, model: Path, train: Path, out: Path) -> dict[str, Any]:
  """Eq. 3 for the model on all of train.jsonl: importance.json, by layer and by module."""
  examples = list(map(tuning.encoder(config, model), tuning.read_train(train)))
  if examples:
    data = tuning.pack(config, model, examples, what=train, epochs=1, seed=config.seed)
    found = _scores(data, tuning.load_params(config, model), order=1, label="importance")
  else:  # data.skip_empty: nothing says which layer matters
    equal = [1.0] * hf.read_config(model).num_layers
    found = {"examples": 0, "dropped_long": 0, "order": 1, "layers": equal, "modules": dict.fromkeys(MODULES, equal)}
  if distributed.is_main():
    files.write_text(out, json.dumps(found, indent=1) + "\n")
  return {"examples": found["examples"], "most_important": int(np.argmax(found["layers"]))}


def importances(config: ml_collections.ConfigDict, model: Path, entries: Sequence[str], order: int = 1,
                ) -> dict[str, Found]:
  """The model's layer importance on tasks and corpora, by entry, on `config.analysis.examples` of each.

  Args:
    config: settings: seed, prompt, sft, mesh, analysis.
    model: a checkpoint folder.
    entries: each `NAME` or `NAME=SOURCE`: a task, whose train split's worked answers count (of mbpp the programs); a
      corpus of `texts.CORPORA`; or `text=SOURCE` for any other.
    order: 1 (eq. 3) or 2 (eq. 2).

  Raises:
    UserError: for an unknown name, or a task without worked answers to train on.
  """
  # All of them are read before anything is computed.
  data = {entry: tuning.pack(config, model, examples_of(config, model, entry), what=entry, epochs=1, seed=config.seed)
          for entry in entries}
  params = tuning.load_params(config, model)
  return {entry: _scores(of_entry, params, order=order, label=f"importance on {entry}")
          for entry, of_entry in data.items()}


def analyse(config: ml_collections.ConfigDict, round_: Round, out: Path) -> dict[str, Any]:
  """Writes analysis.json of a round.

  `importance` of the round's start on answers of train.jsonl; `weight_change` of `sft` against the start and of
  `merged` against the base; `spearman` between importance and the change by SFT; `diversity` of the samples. What is
  not measured is null.
  """
  rng = np.random.default_rng((config.seed, round_.number))
  # Of two models the first makes room for the second.
  held: dict[Path, Params] = {}

  def params(model: Path) -> Params:
    if model not in held:
      held.clear()
      held[model] = tuning.load_params(config, model)
    return held[model]

  scores = _importance(config, round_, rng, params)
  rows = files.read_jsonl(round_.folder / "samples.jsonl", _SAMPLE) if round_.sampler else []
  entropy = _entropy(config, round_, rows, rng, params)
  held.clear()
  if not distributed.is_main():
    return {}
  change = {"sft": weight_change(round_.start, round_.folder / "sft").to_json()}
  if round_.merges:
    change["merged"] = weight_change(round_.base, round_.folder / "merged").to_json()
  rank = spearman(scores["layers"], change["sft"]["layers"]) if scores else None
  sampled = diversity.measure_diversity(rows)._asdict() | {"token_entropy": entropy} if rows else None
  found = {"importance": scores, "weight_change": change, "spearman": rank, "diversity": sampled}
  files.write_text(out, json.dumps(found, indent=1, allow_nan=False) + "\n")
  facts = {"spearman": rank} | {k: (sampled or {}).get(k) for k in ("distinct_answers", "token_entropy")}
  return {name: round(value, 6) for name, value in facts.items() if value is not None}


def _importance(config: ml_collections.ConfigDict, round_: Round, rng: np.random.Generator,
                params: Callable[[Path], Params]) -> Found | None:
  if (round_.folder / "importance.json").exists():
    return files.read_json(round_.folder / "importance.json")
  if not config.analysis.examples:
    return None
  train = round_.folder / "train.jsonl"
  if not train.stat().st_size:
    return None
  examples = _some(tuning.read_train(train), config.analysis.examples, rng, tuning.encoder(config, round_.start),
                   lambda e: len(e.prompt) + len(e.response) <= config.sft.row_length)
  data = tuning.pack(config, round_.start, examples, what=train, epochs=1, seed=config.seed, quiet=True)
  return _scores(data, params(round_.start), order=1, label=f"round {round_.number}: importance")


def _entropy(config: ml_collections.ConfigDict, round_: Round, rows: Sequence[Found], rng: np.random.Generator,
             params: Callable[[Path], Params]) -> float | None:
  """Of the samples' texts under the model and the prompts that they came from; what ended them does not count."""
  if not (rows and config.analysis.examples):
    return None
  model = round_.sampler
  encode = tuning.encoder(config, model, shots=questions.of_round(config, round_.number).shots, ends=False)
  examples = _some([{**row, "response": row["text"]} for row in rows], config.analysis.examples, rng, encode,
                   lambda e: bool(e.response))
  if not examples:
    return None
  # Worked examples make prompts longer here than in training.
  data = tuning.pack(config, model, examples, what="samples", epochs=1, seed=config.seed, quiet=True,
                     row_length=tuning.row_for(config, examples))
  options = {name: value for name, value in data.options.items() if name != "remat"}  # there is no backward pass
  return diversity.token_entropy(data.model, params(model), data.batches, label=f"round {round_.number}: entropy",
                                 **options)


def _some(rows: Sequence[Found], count: int, rng: np.random.Generator, encode: Callable[[Found], TokenizedExample],
          fits: Callable[[TokenizedExample], bool]) -> list[TokenizedExample]:
  """So many of the rows at most, drawn from those that fit."""
  drawn = (encode(rows[i]) for i in rng.permutation(len(rows)))
  return list(itertools.islice(filter(fits, drawn), count))


def _scores(data: tuning.Data, params: Params, *, order: int, label: str) -> Found:
  """Layer importance as json holds it."""
  options = {**data.options, "label": label}
  if order == 1:
    sums = (layers.gradient(data.model, params, data.batches, **options),)
  else:
    del options["accumulation"]  # one example at a time leaves nothing to divide
    sums = layers.gradient_and_squares(data.model, params, data.batches, **options)
  return {"examples": len(data.lines), "dropped_long": data.dropped, "order": order,
          **layers.layer_importance(params, *sums).to_json()}


def check_entry(entry: str) -> None:
  """Raises UserError unless `importances` knows the name of an entry."""
  name, _, source = entry.partition("=")
  known = [*tasks.NAMES, *texts.CORPORA, "text"]
  if name not in known:
    raise UserError(f"task {name!r}: {nearest(name, known)}")
  if name == "text" and not source:
    raise UserError("task text needs a source: text=file:PATH.txt, or records with a field text")
  if source and name in tasks.NAMES and tasks.is_generated(name):
    raise UserError(f"task {entry}: {name} is generated and has no source")


def examples_of(config: ml_collections.ConfigDict, model: Path, entry: str) -> list[TokenizedExample]:
  """What importance on an entry is measured on: worked answers to questions, or passages, cut where a row ends.

  Raises:
    UserError: as `importances` does.
  """
  check_entry(entry)
  (name, _, source), count = entry.partition("="), config.analysis.examples
  if name == "text" or name in texts.CORPORA:
    passages = tasks.load_text(name.removeprefix("text"), source=source, count=count)
    rows, length = hf.read_config(model).vocab_size, config.sft.row_length
    tokenizer = load_tokenizer(model, rows=rows)
    found = [TokenizedExample([], check_ids(tokenizer, tokenizer(text)["input_ids"][:length], rows))
             for text in passages]
    if all(len(e.response) < 2 for e in found):
      raise UserError(f"task {entry}: no passage has a second token that is predicted from the first (they are cut at "
                      f"config.sft.row_length={length}); give more text")
    return found
  try:
    found = questions.load(config, entry, split="train", count=count if tasks.is_generated(name) else None)
  except ValueError as e:
    raise UserError(f"task {entry}, config.analysis.examples={count}: {e}") from e
  worked = [e for e in found if e.rationale][:count]
  if not worked:
    raise UserError(f"task {entry}: none of its {len(found)} answers is worked out, as importance is measured on them; "
                    "give a source whose answers are")
  encode = tuning.encoder(config, model)
  return [encode({"question": e.question, "response": e.rationale}) for e in worked]
