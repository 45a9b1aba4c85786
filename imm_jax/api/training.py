"""Fine-tunes a model in memory, and computes its layer importance."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax.analysis import ORDERS, importance as layers
from imm_jax.analysis.importance import LayerImportance
from imm_jax.api import checks
from imm_jax.api.model import Model, Pair
from imm_jax.model import attention, sharding
from imm_jax.model.decoder import REMAT, Params
from imm_jax.model.tokenization import encode_continuation
from imm_jax.training import gradients, trainer
from imm_jax.training.computation import Computation
from imm_jax.training.optimization import SCHEDULES, Optimization, make_schedule
from imm_jax.training.packing import PackedBatches, TokenizedExample
from imm_jax.training.reporting import Reporting

# A packed row has _MIN_ROW_LENGTH tokens, or where a text is longer the next multiple of _ROW_MULTIPLE.
_MIN_ROW_LENGTH, _ROW_MULTIPLE = 512, 128
# In fewer steps than this a first one at a learning rate of 0 matters.
_FEW_STEPS = 10


def fine_tune(model: Model, pairs: Sequence[Pair], *, learning_rate: float = 2e-5, epochs: int = 3,
              global_batch: int = 128, schedule: str = "cosine", warmup_ratio: float = 0.03, weight_decay: float = 0.0,
              grad_clip: float = 1.0, row_length: int | None = None, seed: int = 0, compute_dtype: str = "auto",
              remat: str = "full", ends: bool = True, report: Callable[..., None] | None = None) -> Model:
  """Fine-tunes a model on answers: minimizes -log p of their tokens, given the prompt and the tokens before each.

  AdamW with float32 weights and moments, on packed rows, as the SFT of runs; the defaults are the paper's.

  Args:
    model: the model to start from; it stays unchanged.
    pairs: (prompt, answer).
    learning_rate: the peak of the schedule.
    epochs: passes over the pairs.
    global_batch: pairs of a step, on average; a step has one packed row or more.
    schedule: of the learning rate after the warm-up: cosine, linear or constant.
    warmup_ratio: share of the steps with a rising learning rate, which is 0 in the first; 0 for none.
    weight_decay: AdamW's.
    grad_clip: largest global norm of the gradient; 0 does not clip.
    row_length: tokens of a packed row; by default 512, or what the longest pair takes.
    seed: of the order of the pairs.
    compute_dtype: as in `Model.logits`.
    remat: as in `forward`.
    ends: whether each answer is followed by the tokenizer's end-of-text token.
    report: called for each step with its number and, by name, `loss`, `learning_rate`, `grad_norm` and more.

  Returns:
    The tuned model, its parameters in float32.

  Raises:
    UserError: when the loss is not finite.
    ValueError: for no pair, one that is longer than a row or has no prompt or no token to learn, or a wrong argument.

  >>> import imm_jax
  >>> losses = []
  >>> tuned = fine_tune(imm_jax.load("tiny"), [("3+4=", "8")], learning_rate=1e-3, global_batch=1,
  ...                   warmup_ratio=0, report=lambda step, loss, **_: losses.append(loss))
  >>> len(losses), losses[-1] < losses[0]
  (3, True)
  """
  checks.check_choice("schedule", schedule, SCHEDULES)
  checks.check_choice("remat", remat, REMAT)
  checks.check_numbers(1, epochs=epochs)
  checks.check_numbers(0, learning_rate=learning_rate, warmup_ratio=warmup_ratio, weight_decay=weight_decay,
                       grad_clip=grad_clip)
  if warmup_ratio >= 1:
    raise ValueError(f"warmup_ratio={warmup_ratio}: expected less than 1")
  batches, computation = _pack(model, pairs, epochs=epochs, global_batch=global_batch, row_length=row_length, seed=seed,
                               compute_dtype=compute_dtype, ends=ends)
  rates = make_schedule(schedule, peak=learning_rate, total_steps=len(batches), warmup_ratio=warmup_ratio)
  _warn_of_few_steps(len(pairs), len(batches), epochs=epochs, global_batch=global_batch, warmup_ratio=warmup_ratio)
  trained = trainer.train(
      model.config, lambda: _float32(model.params, copied=True), batches, Optimization(rates, weight_decay, grad_clip),
      computation._replace(remat=remat), Reporting(report or (lambda *_, **__: None), "fine-tune", log_every=10))
  return dataclasses.replace(model, params=trained.params)


def importance(model: Model, pairs: Sequence[Pair], *, order: int = 1, global_batch: int = 128,
               row_length: int | None = None, compute_dtype: str = "auto", ends: bool = True) -> LayerImportance:
  """Computes the importance of each layer for answers: the sum of |gradient x weight| over its matrices (eq. 3).

  Args:
    model: the model.
    pairs: (prompt, answer); the gradient is that of the mean loss over all of them.
    order: 1, or 2 to add the second-order term of eq. 2.
    global_batch: pairs of a forward pass, on average.
    row_length: as in `fine_tune`.
    compute_dtype: as in `Model.logits`.
    ends: as in `fine_tune`.

  Returns:
    `total`, float64 [L], and `modules`, its summands by the name of the module (`q_proj`). `total` goes to
    `importance=` of `imm_jax.merging.iimm`.

  Raises:
    UserError: when the gradient is not finite.
    ValueError: as `fine_tune`, and for another order.

  >>> import imm_jax
  >>> scores = importance(imm_jax.load("tiny"), [("3+4=", "7")])
  >>> scores.total.shape, len(scores.modules)
  ((4,), 7)
  """
  if order not in ORDERS:
    raise ValueError(f"order={order}: expected 1 or 2")
  batches, computation = _pack(model, pairs, epochs=1, global_batch=global_batch, row_length=row_length, seed=0,
                               compute_dtype=compute_dtype, ends=ends)
  params = _float32(model.params)
  if order == 1:
    return layers.layer_importance(params, gradients.gradient(
        model.config, params, batches, computation, label="importance"))
  return layers.layer_importance(params, *gradients.gradient_and_squares(
      model.config, params, batches, computation, label="importance"))


def _warn_of_few_steps(pairs: int, steps: int, *, epochs: int, global_batch: int, warmup_ratio: float) -> None:
  """Warns if a training hardly trains: steps of more than all pairs, or most of its steps in the warm-up."""
  counted = f"fine_tune: {pairs} pair{'s' * (pairs > 1)} in {epochs} epoch{'s' * (epochs > 1)}: {steps} step"
  counted += "s" * (steps > 1)
  if steps < epochs:
    warnings.warn(f"{counted}; a smaller global_batch than {global_batch} gives more", stacklevel=3)
  elif 1 < steps < _FEW_STEPS and warmup_ratio > 0:
    warnings.warn(f"{counted}, the first at a learning rate of 0; warmup_ratio=0 has none such", stacklevel=3)


def _pack(model: Model, pairs: Sequence[Pair], *, epochs: int, global_batch: int, row_length: int | None, seed: int,
          compute_dtype: str, ends: bool) -> tuple[PackedBatches, Computation]:
  """Packs pairs into batches for the model's devices; also returns how passes over them are computed."""
  checks.check_pairs(pairs)
  checks.check_numbers(1, global_batch=global_batch)
  if ends and model.tokenizer.eos_token_id is None:
    raise ValueError("ends=True: the tokenizer has no end-of-text token; give ends=False")
  rows, end = model.config.vocab_size, [model.tokenizer.eos_token_id] * ends
  examples = [TokenizedExample(model.encode(prompt), encode_continuation(model.tokenizer, answer, rows=rows) + end)
              for prompt, answer in pairs]
  for i, example in enumerate(examples):
    if not example.prompt or not example.response:
      raise ValueError(f"pairs[{i}]={pairs[i]!r:.80}: has no token of a prompt, or none to learn")
  longest = max((len(e.prompt) + len(e.response) for e in examples), default=0)
  length = row_length or max(_MIN_ROW_LENGTH, -(-longest // _ROW_MULTIPLE) * _ROW_MULTIPLE)
  batches = PackedBatches(examples, epochs=epochs, global_batch=global_batch, row_length=length, seed=seed,
                          row_multiple=sharding.num_batch_shards(model.mesh))
  dtype = jnp.dtype(checks.resolve_compute_dtype(compute_dtype))
  backend = attention.choose_backend("auto", model.config, dtype=dtype, length=length, rows=batches.rows,
                                     mesh=model.mesh)
  return batches, Computation(model.mesh, dtype, remat="full", attention=backend)


def _float32(params: Params, *, copied: bool = False) -> Params:
  """Casts parameters to float32; `copied` copies those that have it already, since training donates its buffers."""
  return jax.tree.map(lambda leaf: jnp.copy(leaf) if copied and leaf.dtype == np.float32 else leaf.astype(jnp.float32),
                      params)
