"""Estimates the disk space of a run from the size of its model and its settings."""

import math
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections

from imm_jax import files
from imm_jax.estimates import cost
from imm_jax.estimates.shapes import Expected
from imm_jax.formatting import format_size
from imm_jax.methods import get_method, is_sampling, keeps_average
from imm_jax.model import checkpoint_folder
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import count_params
from imm_jax.stages.task_entries import get_tasks
from imm_jax.training import lora
from imm_jax.training.additions import get_additions

# Bytes of keys and numbers in a row of answers, and characters per token of its question and answer.
_BYTES_PER_ROW, _CHARACTERS_PER_TOKEN = 185, 3
# Bytes of report, TensorBoard and records, as measured; most of it is figures.
_OTHER_BYTES = 500_000


class Disk(NamedTuple):
  """Holds the sizes in a run directory.

  Attributes:
    num_checkpoints: number of checkpoints when the run is done.
    checkpoint: bytes of one checkpoint, stored as the base is.
    models: bytes of all checkpoints.
    answers: bytes of samples, training data and evaluations.
    state: bytes of one training state.
    num_states: largest number of training states at a time.
    final: bytes of everything when the run is done.
    peak: largest number of bytes at any time.
  """

  num_checkpoints: int
  checkpoint: float
  models: float
  answers: float
  state: float
  num_states: int
  final: float
  peak: float


def estimate(config: ml_collections.ConfigDict, model: ModelConfig, expected: Expected,
             folder: Path | None = None) -> Disk:
  """Estimates the disk space that a run takes.

  Args:
    config: settings of the run.
    model: config of the base model.
    expected: the result of `shapes.estimate`.
    folder: the base model's folder, or None if it is not on this machine.
  """
  sft, method, count, additions = config.sft, get_method(config), count_params(model), get_additions(config)
  weights, side_files = 2.0 * count, 0
  if folder:
    weights = sum(path.stat().st_size for path in checkpoint_folder.weight_files(folder))
    side_files = sum((folder / name).stat().st_size for name in checkpoint_folder.SIDE_FILES
                     if (folder / name).is_file())
  checkpoint_bytes = weights + side_files
  tuned = (checkpoint_bytes if sft.export == "model" else 4.0 * count + side_files) * (1 + keeps_average(config))
  trained = count
  if additions.lora:
    trained = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(lora.abstract(model, additions.lora)))
    tuned += 4 * trained
  merged = checkpoint_bytes * (1 + len(config.merge.sweep)) * bool(method.merge)
  # Parameters and two moments are float32; a mask takes one byte per parameter.
  bytes_per_param = 12 + 4 * bool(additions.ema) + 4 * (1 + bool(additions.ema)) * (sft.stop_share > 0)
  state = (bytes_per_param + (sft.intervention == "weight_masking")) * trained
  num_questions, tests = get_tasks(config).count_questions()
  sampled = num_questions * config.sample.num_samples * is_sampling(config)
  right = sampled * cost.ASSUMED["right"] if sampled else num_questions
  saves = max(1, (math.ceil(sft.epochs * right / sft.global_batch) - 1) // sft.save_interval)
  tokens = (expected.question or cost.ASSUMED["question"]) + (
      expected.answer or cost.ASSUMED["length"] * config.sample.max_new_tokens)
  row = _BYTES_PER_ROW + _CHARACTERS_PER_TOKEN * tokens
  evaluation = row * tests * (1 + config.eval.num_samples)
  models_of_round = 1 + keeps_average(config) + (1 + len(config.merge.sweep)) * bool(method.merge)
  answers = config.rounds * (row * (sampled + right) + evaluation * models_of_round) + evaluation
  models = config.rounds * (tuned + merged)
  final = models + answers + _OTHER_BYTES
  # A state is removed when the next one is complete, and all states when the tuned model is.
  training = max(min(saves, sft.max_to_keep + 1) * state, min(saves, sft.max_to_keep) * state + tuned)
  training *= not sft.state_dir
  peak = max(final, final - merged - tuned + max(training, tuned))
  return Disk(config.rounds * models_of_round, checkpoint_bytes, models, answers, state,
              min(saves, sft.max_to_keep + 1), final, peak)


def describe(config: ml_collections.ConfigDict, model: ModelConfig, expected: Expected, root: Path,
             folder: Path | None = None) -> str:
  """Describes the result of `estimate` in lines, with the free space where `root`, the run directory, is."""
  sizes, state_dir = estimate(config, model, expected, folder), config.sft.state_dir
  states = f"{sizes.num_states} training state{'s' * (sizes.num_states > 1)} of {format_size(sizes.state)}"
  free = shutil.disk_usage(files.find_existing_parent(root)).free
  taken = sum(path.stat().st_size for path in files.list_files(root)) if root.is_dir() else 0
  scarce = f"\n  warning: more than is free for {root}" if sizes.peak - taken > free else ""
  return (f"disk: about {format_size(sizes.final)} in the end ({sizes.num_checkpoints} checkpoints of "
          f"{format_size(sizes.checkpoint)}, answers {format_size(sizes.answers)}), at the peak about "
          f"{format_size(sizes.peak)}; {format_size(free)} free\n"
          f"  up to {states} during SFT{f', in {state_dir}' if state_dir else ''}{scarce}")
