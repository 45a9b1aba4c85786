"""Selection of training data: right samples, of this round and possibly earlier ones, and real worked answers."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from imm_jax import files
from imm_jax.errors import UserError
from imm_jax.files import Row
from imm_jax.methods import get_method
from imm_jax.runs.run import Run, Stage
from imm_jax.stages import synthesize
from imm_jax.stages.round_questions import list_round_keys, load_round
from imm_jax.stages.task_entries import Tasks, get_tasks
from imm_jax.tasks import answers

# The fields of a sample that are read here.
_SAMPLE_FIELDS = {"id": str, "question": str, "text": str, "finish": str, "span": str, "correct": bool}
# A smaller share of right samples is worth a warning.
_FEW_RIGHT = 0.01


def build_stage(run: Run, round_: int) -> Stage:
  """Builds the stage that selects a round's training data."""
  drawn = [synthesize.get_samples_name(t) for t in range(round_ + 1)] if run.samples_answers else []
  reads = drawn if run.method.data in ("mixture", "accumulation") else drawn[-1:]
  return Stage(f"round_{round_}/train.jsonl", ("train questions", *reads),
               run.settings(*list_round_keys(get_tasks(run.config)), "data") | {"kind": run.method.data},
               _plan(run.config.data, run.method.data),
               lambda out, _: select(run.config, [run.root / name for name in drawn], round_, out),
               summarize=_summarize)


def _summarize(facts: dict[str, Any]) -> str:
  if not facts["kept"]:
    return "nothing to train on: the round hands on the model that it started from"
  dropped = ", ".join(f"{facts[f'dropped_{kind}']} {text}" for kind, text in (
      ("wrong", "wrong"), ("unfinished", "cut off"), ("duplicate", "duplicates")) if facts.get(f"dropped_{kind}"))
  return (f"{facts['kept']} answers to train on" + (f", {facts['real']} of them real" if facts["real"] else "")
          + (f"; left out: {dropped}" if dropped else ""))


def _plan(data: ml_collections.ConfigDict, kind: str) -> str:
  real = "real worked answers"
  if kind == "worked" or data.real_fraction == 1:
    return real
  parts = {"mixture": f"the right answers, and {data.mixture_share:.0%} of each earlier round's",
           "accumulation": "the right answers of all rounds so far"}.get(kind, "the right answers")
  if kind == "accumulation" and data.with_real:
    return f"{parts}, and {real}"
  return f"{parts}, {data.real_fraction:.0%} {real}" if data.real_fraction else parts


def select(config: ml_collections.ConfigDict, samples: Sequence[Path], round_: int, out: Path) -> dict[str, Any]:
  """Writes train.jsonl: id, question, response, round, and source (`synthetic` or `real`).

  | method | what round t trains on |
  |---|---|
  | `imm`, `iimm`, `star` | the right samples of round t |
  | `data_mixture` | these, and a share of each earlier round's (`data.mixture_share`), drawn again in each round |
  | `data_accumulation` | the right samples of rounds 0 to t (M. Gerstgrasser et al., 2024) |
  | `real` | the real worked answers to the questions of round t |

  `data.with_real` adds to `data_accumulation` the real worked answers to the questions of rounds 0 to t. With
  `data.real_fraction` f, real answers to the round's questions are added until they are a share f of the data, or there
  are no more; with f = 1 the data are only real answers, and nothing is sampled.

  Args:
    config: run config.
    samples: samples.jsonl of rounds 0 to t, empty if nothing is sampled.
    round_: t.
    out: file to write.

  Raises:
    UserError: when nothing is left to train on, unless `data.skip_empty` is set.
  """
  rng = np.random.default_rng((config.seed, round_))
  method, tasks = get_method(config), get_tasks(config)
  fraction = 1.0 if method.data == "worked" else config.data.real_fraction
  facts: dict[str, Any] = {}
  synthetic: list[Row] = []
  this_round: list[Row] = []
  if fraction < 1:
    this_round = files.read_jsonl(samples[round_], _SAMPLE_FIELDS)
    right = right_samples(this_round, round_)
    facts = {"dropped_wrong": sum(not r["correct"] for r in this_round),
             "dropped_unfinished": sum(r["correct"] and _response(r) is None for r in this_round)}
    facts["dropped_duplicate"] = len(this_round) - sum(facts.values()) - len(right)
    earlier = [right_samples(files.read_jsonl(path, _SAMPLE_FIELDS), t) for t, path in enumerate(samples[:round_])]
    if method.data == "mixture":
      earlier = [_draw(rows, round(config.data.mixture_share * len(rows)), rng) for rows in earlier]
    elif method.data != "accumulation":
      earlier = []
    synthetic = _unique([*(row for rows in earlier for row in rows), *right])
  real: list[Row] = []
  if method.data == "accumulation" and config.data.with_real:
    real = _unique(row for t in range(round_ + 1) for row in worked_answers(tasks, t))
  elif fraction == 1:
    real = worked_answers(tasks, round_)
  elif fraction:
    sampled = {(row["question"], row["response"]) for row in synthetic}
    available = [r for r in worked_answers(tasks, round_) if (r["question"], r["response"]) not in sampled]
    real = _draw(available, min(len(available), round(fraction / (1 - fraction) * len(synthetic))), rng)
  rows = _unique([*synthetic, *real])
  if not rows and not config.data.skip_empty:
    raise UserError(_nothing_to_train_on(samples[round_], this_round))
  if rows and (warning := _warn_of_few(rows, this_round, config.sft.global_batch)):
    print(f"warning: round {round_}: {warning}", file=sys.stderr)
  files.write_jsonl(out, rows)
  count = sum(row["source"] == "real" for row in rows)
  return {"kept": len(rows), "real": count, "of_earlier_rounds": sum(row["round"] != round_ for row in rows), **facts}


def right_samples(samples: Sequence[Row], round_: int) -> list[Row]:
  """Returns the right samples of a round, truncated to what was judged, without duplicates and unfinished ones."""
  rows = ({"id": r["id"], "question": r["question"], "response": response, "round": round_, "source": "synthetic"}
          for r in samples if r["correct"] and (response := _response(r)) is not None)
  return _unique(rows)


def _response(sample: Row) -> str | None:
  """Returns the text of a sample up to a next question that it makes up, or None if the sample is unfinished."""
  text = answers.before_next_question(sample["text"])
  return text if sample["finish"] == "stop" or text != sample["text"] else None


def worked_answers(tasks: Tasks, round_: int) -> list[Row]:
  """Returns the real worked answers to a round's questions.

  Raises:
    UserError: when the task has none.
  """
  examples = load_round(tasks, round_).round_questions
  rows = [{"id": e.id, "question": e.question, "response": e.rationale, "round": round_, "source": "real"}
          for e in examples if e.rationale]
  if not rows:
    raise UserError(f"config.task.name={tasks.in_domain.name}: has no worked answers to train on: none of the "
                    f"{len(examples)} questions of round {round_} (method=real, data.real_fraction and data.with_real "
                    "need them)")
  return rows


def _unique(rows: Iterable[Row]) -> list[Row]:
  """Removes rows with the same question and response as an earlier row."""
  first: dict[tuple[str, str], Row] = {}
  for row in rows:
    first.setdefault((row["question"], row["response"]), row)
  return list(first.values())


def _draw(rows: Sequence[Row], count: int, rng: np.random.Generator) -> list[Row]:
  """Draws `count` of the rows without replacement, and keeps their order."""
  return [rows[i] for i in sorted(rng.choice(len(rows), count, replace=False))]


def _warn_of_few(rows: Sequence[Row], samples: Sequence[Row], batch: int) -> str:
  """Returns a warning if nearly nothing was sampled that is right, or the rows to train on do not fill a batch.

  >>> _warn_of_few([{}] * 20, [{"correct": i < 2} for i in range(300)], 20)
  '2 of 300 samples are right, so that 20 answers are all there is to train on; read some samples first'
  >>> _warn_of_few([{}] * 20, [{"correct": i < 3} for i in range(300)], 20)
  ''
  >>> _warn_of_few([{}], [], 20)
  '1 answer is all there is to train on, less than a batch of 20 (sft.global_batch)'
  """
  right = sum(sample["correct"] for sample in samples)
  few, small = right < _FEW_RIGHT * len(samples), len(rows) < batch
  if not few and not small:
    return ""
  sampled = f"{right} of {len(samples)} samples {'is' if right == 1 else 'are'} right, so that " if samples else ""
  trained = f"{len(rows)} {'answer is' if len(rows) == 1 else 'answers are'} all there is to train on"
  return (sampled + trained + (f", less than a batch of {batch} (sft.global_batch)" if small else "")
          + ("; read some samples first" if few else ""))


def _nothing_to_train_on(samples: Path, rows: Sequence[Row]) -> str:
  return (f"{samples}: none of {len(rows)} samples is right ({sum(r['finish'] == 'length' for r in rows)} cut at "
          f"max_new_tokens, {sum(not r['span'] for r in rows)} without an answer), so there is nothing to train on; "
          "read some samples, then go past the round with config.data.skip_empty=True, or sample it anew with --rerun "
          "and other temperatures for it (config.sample.temperatures, a tuple each round), or begin again with --rerun "
          "and more questions (config.task.questions_per_round), num_samples, max_new_tokens or prompt.few_shot. The "
          "samples are kept until then")
