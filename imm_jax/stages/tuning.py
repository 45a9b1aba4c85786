"""SFT of a round's model on its training data."""

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from imm_jax import distributed, files, memory
from imm_jax.errors import UserError
from imm_jax.metrics import StageMetrics
from imm_jax.model import attention, hf, sharding
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.stages.devices import mesh_of
from imm_jax.tasks import prompts
from imm_jax.training import throughput, trainer
from imm_jax.training.checkpoints import Checkpoints
from imm_jax.training.packing import PackedBatches, TokenizedExample
from imm_jax.training.step import make_schedule


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
          "tokens": round(batches.tokens_per_step * len(batches)),
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
