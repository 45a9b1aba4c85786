"""A tiny model and its training, whose compiled step the tests of the trainer share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from imm_jax.model import sharding
from imm_jax.model.config import ModelConfig
from imm_jax.training import trainer
from imm_jax.training.computation import Computation
from imm_jax.training.optimization import Optimization
from imm_jax.training.packing import PackedBatches, TokenizedExample
from imm_jax.training.reporting import Report, Reporting
from imm_jax.training.throughput import Profile

CONFIG = ModelConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1,
                     head_dim=8, rope_theta=100.0, rms_norm_eps=1e-5, tie_embeddings=False, qkv_bias=True)
POISON = 60  # examples do not hold it
STEPS = 10
SCHEDULE = optax.constant_schedule(1e-3)


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


def train(params, batches: PackedBatches, reports: dict[int, dict[str, float]] | None = None, *,
          schedule: optax.Schedule = SCHEDULE, log_every: int = 1, profile: Profile | None = None, **options):
  reported = {} if reports is None else reports

  def report(step: int, **values: float) -> None:
    assert step not in reported
    reported[step] = values

  return train_with(params, report, batches, schedule=schedule, log_every=log_every, profile=profile, **options)


def train_with(params, report: Report, batches: PackedBatches, *, config: ModelConfig = CONFIG,
               schedule: optax.Schedule = SCHEDULE, log_every: int = 1, profile: Profile | None = None, **options):
  return trainer.train(
      config, lambda: jax.tree.map(jnp.copy, params), batches, Optimization(schedule, 0.0, 1.0),
      Computation(sharding.make_mesh(data=1, fsdp=1), jnp.float32),
      Reporting(report, "round 0: SFT", log_every, profile=profile), **options)


def same(a, b) -> bool:
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
