"""Estimates the shapes of a run's training and sampling before any answers exist."""

import itertools
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import ml_collections
import numpy as np

from imm_jax.estimates import cost
from imm_jax.methods import is_sampling
from imm_jax.model import attention, sharding
from imm_jax.model.config import ModelConfig
from imm_jax.runtime import hardware
from imm_jax.stages.devices import make_mesh
from imm_jax.stages.fine_tune import make_encoder
from imm_jax.stages.round_questions import load_round
from imm_jax.stages.task_entries import get_tasks
from imm_jax.training.packing import PackedBatches, TokenizedExample

# Number of questions whose lengths are measured.
_NUM_MEASURED = 100


class Expected(NamedTuple):
  """Holds the shapes that a run is expected to compute with.

  Attributes:
    rows: rows of an SFT step, over all devices.
    attention: the attention backend of SFT.
    prompt: tokens of the longest prompt; 0 if unknown.
    question: mean tokens of a prompt without worked examples; 0 if unknown.
    answer: mean tokens of a worked answer; 0 if unknown.
  """

  rows: int
  attention: str
  prompt: int
  question: float = 0.0
  answer: float = 0.0


def estimate(config: ml_collections.ConfigDict, model: ModelConfig, folder: Path | None) -> Expected:
  """Estimates the shapes of a round's training and sampling before a run.

  Lengths are measured on the task's worked answers. They are assumed if there are none, or if the task or the model
  would have to be downloaded.

  Args:
    config: settings of the run.
    model: config of the model.
    folder: the model's folder, or None if it is not on this machine.
  """
  sft, mesh, tasks = config.sft, make_mesh(config), get_tasks(config)
  count, _ = tasks.count_questions()
  assumed = round(cost.ASSUMED["question"] + cost.ASSUMED["length"] * config.sample.max_new_tokens)
  lengths, prompt, question, answer = [assumed], 0, 0.0, 0.0
  if folder and not tasks.in_domain.is_remote:
    chosen, encode = load_round(tasks, 0), make_encoder(config, folder)
    worked = [encode({"question": e.question, "response": e.rationale})
              for e in chosen.round_questions[:_NUM_MEASURED] if e.rationale]
    lengths = [len(e.prompt) + len(e.response) for e in worked] or lengths
    encode_with_shots = make_encoder(config, folder, shots=chosen.shots if is_sampling(config) else ())
    unanswered = [{"question": e.question, "response": ""} for e in chosen.round_questions[:_NUM_MEASURED]]
    prompt = max(len(encode_with_shots(row).prompt) for row in unanswered)
    question = float(np.mean([len(encode(row).prompt) for row in unanswered]))
    answer = float(np.mean([len(e.response) for e in worked])) if worked else 0.0
  if is_sampling(config):
    count = round(count * config.sample.num_samples * cost.ASSUMED["right"] / cost.get_sampled_share(config))
  repeated = itertools.islice(itertools.cycle(lengths), max(1, min(count, 1000)))
  lengths = [min(length, sft.row_length) for length in repeated]
  rows = PackedBatches([TokenizedExample([], [0] * length) for length in lengths], epochs=1, row_length=sft.row_length,
                       global_batch=sft.global_batch, seed=0,
                       row_multiple=sharding.num_batch_shards(mesh) * sft.accumulation).rows
  dtype = jnp.dtype(hardware.compute_dtype(sft.compute_dtype))
  kernel = attention.choose_backend(sft.attention, model, dtype=dtype, length=sft.row_length,
                                    rows=rows // sft.accumulation, mesh=mesh)
  return Expected(rows, kernel, prompt, question, answer)
