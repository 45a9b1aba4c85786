"""What a run takes of the disk, from the sizes of its model and its settings."""

import math
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections

from imm_jax.estimates import cost
from imm_jax.estimates.memory import format_bytes
from imm_jax.estimates.shapes import Expected
from imm_jax.methods import keeps_average, method_of, samples_answers
from imm_jax.model import folder as checkpoint
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import count_params
from imm_jax.stages import questions
from imm_jax.training import lora
from imm_jax.training.additions import additions_of

# Of a row of answers: its keys and numbers, and characters of a token of the bare question and the answer.
_ROW, _CHARACTERS = 185, 3
# Of the report, TensorBoard and the records: as measured, figures above all.
_OTHERS = 500_000


class Disk(NamedTuple):
  """Bytes of a run directory.

  Attributes:
    checkpoints: how many there are in the end.
    checkpoint: of one of them, as the base is stored.
    models: of all of them.
    answers: of samples, of what is trained on, and of evaluations.
    state: of one training state.
    states: how many of these there are at once, at most.
    last: of what stands there in the end.
    most: of what stands there at any time.
  """

  checkpoints: int
  checkpoint: float
  models: float
  answers: float
  state: float
  states: int
  last: float
  most: float


def estimate(config: ml_collections.ConfigDict, model: ModelConfig, expected: Expected,
             folder: Path | None = None) -> Disk:
  """What a run will probably take.

  Args:
    config: of the run.
    model: the base's shape.
    expected: `shapes.estimate`.
    folder: the base, or None where it is not on this machine.
  """
  sft, method, count, given = config.sft, method_of(config), count_params(model), additions_of(config)
  weights, beside = 2.0 * count, 0
  if folder:
    weights = sum(path.stat().st_size for path in checkpoint.weight_files(folder))
    beside = sum((folder / name).stat().st_size for name in checkpoint.SIDE_FILES if (folder / name).is_file())
  one = weights + beside
  tuned = (one if sft.export == "model" else 4.0 * count + beside) * (1 + keeps_average(config))
  trained = count
  if given.lora:
    trained = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(lora.abstract(model, given.lora)))
    tuned += 4 * trained
  merged = one * (1 + len(config.merge.sweep)) * bool(method.merge)
  # Parameters and two moments in float32; a mask has a byte for each.
  kept = 12 + 4 * bool(given.ema) + 4 * (1 + bool(given.ema)) * (sft.stop_share > 0)
  state = (kept + (sft.intervention == "weight_masking")) * trained
  asked, tests = questions.counts(config)
  sampled = asked * config.sample.num_samples * samples_answers(config)
  right = sampled * cost.ASSUMED["right"] if sampled else asked
  saves = max(1, (math.ceil(sft.epochs * right / sft.global_batch) - 1) // sft.save_interval)
  tokens = (expected.question or cost.ASSUMED["question"]) + (
      expected.answer or cost.ASSUMED["length"] * config.sample.max_new_tokens)
  row = _ROW + _CHARACTERS * tokens
  evaluation = row * tests * (1 + config.eval.num_samples)
  models_of_round = 1 + keeps_average(config) + (1 + len(config.merge.sweep)) * bool(method.merge)
  answers = config.rounds * (row * (sampled + right) + evaluation * models_of_round) + evaluation
  models = config.rounds * (tuned + merged)
  last = models + answers + _OTHERS
  # A state is removed when the next one is whole; all are when the tuned model is.
  here = not sft.state_dir
  training = max(min(saves, sft.max_to_keep + 1) * state, min(saves, sft.max_to_keep) * state + tuned) * here
  most = max(last, last - merged - tuned + max(training, tuned))
  return Disk(config.rounds * models_of_round, one, models, answers, state, min(saves, sft.max_to_keep + 1), last, most)


def describe(config: ml_collections.ConfigDict, model: ModelConfig, expected: Expected, root: Path,
             folder: Path | None = None) -> str:
  """Two lines on `estimate`, for a run in the directory `root`, which may be yet to be made."""
  sizes, state_dir = estimate(config, model, expected, folder), config.sft.state_dir
  states = f"{sizes.states} training state{'s' * (sizes.states > 1)} of {format_bytes(sizes.state)}"
  existing = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
  return (f"disk: about {format_bytes(sizes.last)} when it is done ({sizes.checkpoints} checkpoints of "
          f"{format_bytes(sizes.checkpoint)}, answers {format_bytes(sizes.answers)}), most at once about "
          f"{format_bytes(sizes.most)}; {format_bytes(shutil.disk_usage(existing).free)} are free\n"
          f"  up to {states} while SFT goes on{f', in {state_dir}' if state_dir else ''}")
