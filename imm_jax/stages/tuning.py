"""What each stage of a round does: synthesize, filter, SFT, merge, evaluate.

Stages read files of the run directory and write files of the run directory; nothing else passes between them.
"""

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from imm_jax import distributed, evaluation, files, memory, tasks
from imm_jax.errors import UserError
from imm_jax.merging import checkpoint, masks, methods
from imm_jax.metrics import StageMetrics
from imm_jax.model import attention, folder, hf, hub, sharding
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.sampling import Completion, Prompt
from imm_jax.sampling.native import NativeSampler
from imm_jax.tasks import answers, prompts
from imm_jax.tasks.base import Example
from imm_jax.training import throughput, trainer
from imm_jax.training.checkpoints import Checkpoints
from imm_jax.training.packing import PackedBatches, TokenizedExample
from imm_jax.training.step import make_schedule

# Test questions are part of a task and the same in every run, as those of a published data set are.
_TEST_SEED = 0


def questions(config: ml_collections.ConfigDict, round_: int) -> tuple[list[Example], list[Example]]:
  """The worked examples of the prompt, and the questions of a round; no question is among the examples."""
  shots, count = config.prompt.few_shot, config.task.questions_per_round
  pool = tasks.load(config.task.name, split="train", count=shots + (round_ + 1) * count, seed=config.seed)
  return pool[:shots], pool[shots + round_ * count:]


def synthesize(config: ml_collections.ConfigDict, model: Path, round_: int, out: Path) -> dict[str, Any]:
  """Samples answers to the round's questions and judges them: samples.jsonl."""
  shots, examples = questions(config, round_)
  sample = config.sample
  asked = [Prompt(f"round_{round_}/{e.id}", prompts.build(e.question, header=config.prompt.header, examples=shots))
           for e in examples]
  completions = _generate(
      _sampler(config, model, sample.batch_size), asked, max_new_tokens=sample.max_new_tokens,
      num_samples=sample.num_samples, temperatures=sample.temperatures, top_p=sample.top_p, stop=sample.stop,
      seed=config.seed, label=f"round {round_}: sample")
  rows = [_judged(example, completion, strict=True, sample=s,
                  temperature=sample.temperatures[s % len(sample.temperatures)])
          for example, group in zip(examples, completions, strict=True) for s, completion in enumerate(group)]
  if distributed.is_main():
    files.write_jsonl(out, rows)
  return {"samples": len(rows), "correct": sum(r["correct"] for r in rows), "tokens": sum(r["tokens"] for r in rows),
          "unfinished": sum(r["finish"] == "length" for r in rows), "no_answer": sum(not r["span"] for r in rows)}


def keep_correct(samples: Path, out: Path) -> dict[str, Any]:
  """Keeps the samples with the right answer, once each: train.jsonl.

  Raises:
    UserError: when none is right.
  """
  rows = files.read_jsonl(
      samples, {"id": str, "question": str, "text": str, "finish": str, "span": str, "correct": bool})
  correct = [r for r in rows if r["correct"]]
  kept = {(r["question"], r["text"]): {"id": r["id"], "question": r["question"], "response": r["text"]}
          for r in reversed(correct)}  # reversed: the first of equal answers stays
  if not kept:
    raise UserError(
        f"{samples}: none of {len(rows)} samples is right ({sum(r['finish'] == 'length' for r in rows)} cut at "
        f"max_new_tokens, {sum(not r['span'] for r in rows)} without an answer), so there is nothing to train on; read "
        "some samples, then start a run with more sample.num_samples or max_new_tokens, other temperatures, more "
        "prompt.few_shot, or an easier task. The samples are kept")
  train = list(reversed(kept.values()))
  files.write_jsonl(out, train)
  return {"kept": len(train), "dropped_wrong": len(rows) - len(correct), "dropped_duplicate": len(correct) - len(train)}


def gold_answers(config: ml_collections.ConfigDict, round_: int, out: Path) -> dict[str, Any]:
  """The worked gold answers of the round's questions in place of samples: train.jsonl."""
  _, examples = questions(config, round_)
  files.write_jsonl(out, [{"id": e.id, "question": e.question, "response": e.rationale} for e in examples])
  return {"kept": len(examples)}


def fine_tune(config: ml_collections.ConfigDict, model: Path, train: Path, root: Path, round_: int, out: Path,
              inputs: Mapping[str, str | None]) -> dict[str, Any]:
  """Fine-tunes the model on the kept answers: an HF checkpoint folder in the model's own dtype.

  `inputs` are the digests of what it reads: training goes on from a saved state of the same ones.
  """
  sft = config.sft
  mesh = mesh_of(config)
  name = f"round_{round_}"
  fitting, dropped = _tokenized(config, model, train)
  multiple = sharding.batch_parts(mesh) * sft.accumulation
  batches = PackedBatches(fitting, epochs=sft.epochs, global_batch=sft.global_batch, row_length=sft.row_length,
                          seed=(config.seed, round_), row_multiple=multiple)
  if batches.empty_rows and distributed.is_main():
    filled = batches.rows - batches.empty_rows
    print(f"note: {batches.empty_rows} of {batches.rows} rows of a step are empty, since {mesh.size} devices and "
          f"config.sft.accumulation={sft.accumulation} need a multiple of {multiple}; "
          f"config.sft.global_batch={round(sft.global_batch * batches.rows / filled)} would fill them", file=sys.stderr)
  schedule = make_schedule(sft.schedule, peak=sft.learning_rate, total_steps=len(batches),
                           warmup_ratio=sft.warmup_ratio)
  model_config, dtype = hf.read_config(model), jnp.dtype(sft.compute_dtype)
  whole = memory.undivided(model_config, mesh)
  if whole and distributed.is_main():
    print(f"note: every device holds these whole, for config.mesh does not divide them: {', '.join(whole)}",
          file=sys.stderr)
  longest = max(len(e.prompt) + len(e.response) for e in fitting)
  if model_config.max_positions and longest > model_config.max_positions and distributed.is_main():
    print(f"note: the longest answer has {longest} tokens with its prompt, the model's context "
          f"{model_config.max_positions} (max_position_embeddings): the rest was never trained", file=sys.stderr)
  kernel = attention.choose(sft.attention, model_config, dtype=dtype, length=sft.row_length,
                            rows=batches.rows // sft.accumulation, mesh=mesh)
  place = functools.partial(sharding.param_sharding, mesh)
  states = Checkpoints(states_folder(config, root, round_), save_interval=sft.save_interval,
                       max_to_keep=sft.max_to_keep, identity=dict(inputs))
  with states as checkpoints:
    saved = checkpoints.latest()  # refuses another training's before metrics are dropped
    with StageMetrics(root, f"{name}/sft", keep=saved["step"] if saved else 0) as metrics:
      trained = trainer.train(
          model_config, lambda: hf.load(model, dtype=jnp.float32, place=place)[1], batches, schedule=schedule,
          weight_decay=sft.weight_decay, grad_clip=sft.grad_clip, compute_dtype=dtype, accumulation=sft.accumulation,
          remat=sft.remat, attention=kernel, mesh=mesh, log_every=sft.log_every, report=metrics.write,
          label=f"round {round_}: SFT", checkpoints=checkpoints,
          profile=throughput.Profile(config.profile, root / "profile" / name / f"process_{jax.process_index()}"))
    hf.save(trained.params, out, like=model, keep_dtypes=True)
  return {"examples": len(fitting), "dropped_long": dropped, "steps": len(batches),
          "attention": kernel, "examples_per_step": round(batches.per_step, 2), "padding": round(batches.padding, 4),
          "first_loss": round(trained.first_loss, 6), "last_loss": round(trained.last_loss, 6)}


def states_folder(config: ml_collections.ConfigDict, root: Path, round_: int) -> str:
  """Where the training states of a round are, until it is done."""
  name = f"round_{round_}"
  return f"{config.sft.state_dir}/{name}" if config.sft.state_dir else str(root / name / "sft_state")


def _tokenized(config: ml_collections.ConfigDict, model: Path, train: Path) -> tuple[list[TokenizedExample], int]:
  """The kept answers that fit in a row, and how many do not."""
  tokenizer = load_tokenizer(model)
  rows = files.read_jsonl(train, {"question": str, "response": str})
  tokenized = [TokenizedExample(
      tokenizer(prompts.build(r["question"], header=config.prompt.header))["input_ids"],
      tokenizer(r["response"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]) for r in rows]
  fitting = [e for e in tokenized if len(e.prompt) + len(e.response) <= config.sft.row_length]
  if not fitting:
    raise UserError(f"{train}: all {len(rows)} answers are longer than config.sft.row_length="
                    f"{config.sft.row_length} tokens")
  return fitting, len(rows) - len(fitting)


def merge(config: ml_collections.ConfigDict, base: Path, start: Path, tuned: Path, round_: int, out: Path,
          ) -> dict[str, Any]:
  """Merges the tuned model with the base (eq. 5 and 6): an HF checkpoint folder."""
  settings = config.merge
  models = {"base": base, "start": base if settings.delta_ref == "base" else start, "tuned": tuned}
  key = jax.random.fold_in(jax.random.key(config.seed), round_)
  with checkpoint.CheckpointSource(models) as source:
    plan = methods.imm(source, base_weight=settings.base_weight, drop_rate=settings.drop_rate)
    checkpoint.merge(source, [checkpoint.Output(out, plan)], key=np.asarray(masks.key_words(key)))
  folder.copy_side_files(base, out)
  return {"base_weight": settings.base_weight, "drop_rate": settings.drop_rate}


def evaluate(config: ml_collections.ConfigDict, model: Path, root: Path, stage: str, round_: int, out: Path,
             ) -> dict[str, Any]:
  """Answers every task's test questions greedily, zero-shot: a folder with <task>.jsonl."""
  sampler = _sampler(config, model, config.eval.batch_size)
  if distributed.is_main():
    out.mkdir()
  scores = {}
  for name in (config.task.name, *config.task.ood):
    examples = tasks.load(name, split="test", count=config.task.eval_questions, seed=_TEST_SEED)
    completions = _generate(
        sampler, [Prompt(e.id, prompts.build(e.question, header=config.prompt.header)) for e in examples],
        max_new_tokens=config.eval.max_new_tokens, stop=config.sample.stop, label=f"{stage}: {name}")
    rows = [_judged(e, c[0], strict=False) for e, c in zip(examples, completions, strict=True)]
    if distributed.is_main():
      files.write_jsonl(out / f"{name}.jsonl", rows)
    scores[name] = evaluation.accuracy(sum(r["correct"] for r in rows), len(rows))
  with StageMetrics(root, stage) as metrics:
    metrics.write(round_ + 1, **{f"accuracy/{name}": score.value for name, score in scores.items()})
  return {name: score._asdict() for name, score in scores.items()}


def mesh_of(config: ml_collections.ConfigDict) -> Mesh:
  """The devices of a run."""
  return sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor,
                            hidden_size=_hidden_size(config.model))


@functools.cache  # a hub id is asked for over the network
def _hidden_size(model: str) -> int:
  return hf.read_config(hub.resolve(model)).hidden_size


def _sampler(config: ml_collections.ConfigDict, model: Path, batch_size: int) -> NativeSampler:
  """On this process's own devices: each process samples its share of the questions."""
  if jax.process_count() == 1:
    mesh = mesh_of(config)
  else:
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=-1, devices=jax.local_devices())
  return NativeSampler(model, compute_dtype=config.sample.compute_dtype, batch_size=batch_size, mesh=mesh)


def _generate(sampler: NativeSampler, asked: list[Prompt], **options: Any) -> list[list[Completion]]:
  """Every prompt's completions, by all processes together."""
  done = distributed.gather(sampler.generate(list(distributed.share(asked)), **options))
  return [[Completion(*completion) for completion in group] for group in done]


def _judged(example: Example, completion: Completion, *, strict: bool, **extra: Any) -> dict[str, Any]:
  verdict = answers.verdict(completion.text, example.answer, example.kind, strict=strict)
  return {"id": example.id, **extra, "question": example.question, "gold": example.answer, "text": completion.text,
          "tokens": completion.num_tokens, "finish": completion.finish, "correct": verdict.correct,
          "span": verdict.span}
