"""Fixtures of the tests of the trainer."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from imm_jax.model import sharding
from imm_jax.model.decoder import init_params
from imm_jax.training import optimization, step as training_step, trainer
from imm_jax.training.computation import Computation
from tests.training.helpers import CONFIG


@pytest.fixture(scope="module")
def params():
  return init_params(CONFIG, key=jax.random.key(0))


@pytest.fixture(scope="module")
def compiled_once() -> Iterator[None]:
  """Caches the compiled step for all trainings of a file."""
  mesh = sharding.make_mesh(data=1, fsdp=1)
  optimizer = optimization.make_optimizer(weight_decay=0.0, grad_clip=1.0)
  step = training_step.make_train_step(CONFIG, optimizer, Computation(mesh, jnp.float32))
  patch = pytest.MonkeyPatch()
  patch.setattr(trainer, "make_train_step", lambda *args, **options: step)
  yield
  patch.undo()
