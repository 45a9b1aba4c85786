"""A tiny model and its training, whose compiled step the tests of the trainer share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from imm_jax.model import sharding
from imm_jax.model.config import ModelConfig
from imm_jax.training import trainer
from imm_jax.training.packing import PackedBatches, TokenizedExample

CONFIG = ModelConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1,
                     head_dim=8, rope_theta=100.0, rms_norm_eps=1e-5, tie_embeddings=False, qkv_bias=True)
POISON = 60  # examples do not hold it
STEPS = 10


def make_batches(*, poisoned_step: int | None = None) -> PackedBatches:
  """Returns batches of ten steps."""
  rng = np.random.default_rng(0)
  draw = lambda count: rng.integers(1, POISON, count).tolist()
  examples = [TokenizedExample(draw(n), draw(8 - n)) for n in rng.integers(1, 8, 40)]
  batches = PackedBatches(examples, epochs=1, global_batch=4, row_length=16, seed=0)
  assert len(batches) == STEPS
  if poisoned_step is not None:
    examples[batches.members(poisoned_step)[0]].prompt[0] = POISON
  return batches


def train(params, batches: PackedBatches, reports: dict[int, dict[str, float]] | None = None, **options):
  reported = {} if reports is None else reports

  def report(step: int, **values: float) -> None:
    assert step not in reported
    reported[step] = values

  options = {"schedule": optax.constant_schedule(1e-3), "log_every": 1, **options}
  return trainer.train(
      CONFIG, lambda: jax.tree.map(jnp.copy, params), batches, weight_decay=0.0, grad_clip=1.0, accumulation=1,
      remat="none", compute_dtype=jnp.float32, mesh=sharding.make_mesh(data=1, fsdp=1), report=report,
      label="round 0: SFT", **options)


def same(a, b) -> bool:
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
