"""Computes the gradient of the loss over a whole data set, and the sum of the squares of each example's."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from imm_jax.errors import UserError
from imm_jax.model import sharding
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params, abstract_params
from imm_jax.runtime import progress
from imm_jax.training.computation import Computation
from imm_jax.training.input import Input
from imm_jax.training.packing import PackedBatches
from imm_jax.training.step import gradient_function, jit_step

# Sums of the gradients, with order 2 also of their squares, and the number of learned tokens.
Sums = tuple[Params | jax.Array, ...]


def make_accumulate(config: ModelConfig, computation: Computation, *, order: int = 1,
                    ) -> Callable[[Sums, Params, dict[str, jax.Array]], tuple[Sums, jax.Array]]:
  """Returns a function (sums, params, batch) -> (updated sums, the batch's loss) to be jitted."""
  gradient_of_batch = gradient_function(config, computation, mean=False)

  def add(sums: Sums, params: Params, batch: dict[str, jax.Array]) -> tuple[Sums, jax.Array]:
    if order == 1:
      loss, total, numbers = gradient_of_batch(params, batch, sums[0])
      return (total, sums[1] + numbers["tokens"].astype(jnp.int32)), loss
    loss, grads, numbers = gradient_of_batch(params, batch)
    tokens = numbers["tokens"].astype(jnp.int32)
    return jax.tree.map(jnp.add, sums, (grads, jax.tree.map(jnp.square, grads), tokens)), loss

  return add


def gradient(config: ModelConfig, params: Params, batches: PackedBatches, computation: Computation, *,
             label: str = "gradient") -> Params:
  """Computes the gradient of the loss over a whole data set, the mean of -log p over all its learned tokens.

  It is accumulated in float32 in the order of `batches`, so that a given order and mesh always give the same bits.
  Besides the parameters a device holds its shard of one gradient.

  Args:
    config: the model's config.
    params: float32 parameters with stacked layers, sharded by `sharding.RULES`; they are not donated.
    batches: the data set, packed with `epochs=1`.
    computation: how the passes are computed.
    label: label of the progress bar.

  Returns:
    A float32 tree with the structure and shardings of `params`.

  Raises:
    UserError: if the gradient is not finite.
  """
  grads, = _mean_gradients(config, params, batches, computation, label, order=1)
  return grads


def gradient_and_squares(config: ModelConfig, params: Params, batches: PackedBatches, computation: Computation, *,
                         label: str = "gradient") -> tuple[Params, Params]:
  """Computes `gradient` and the sum of squared per-example gradients, which eq. 2 needs.

  With T learned tokens in all, and G_j the gradient of -log p of the whole response of example j, a sum over its
  tokens: (sum of G_j / T, sum of G_j^2 / T). Both are divided by T only, so that the second, an estimate of the
  curvature (the empirical Fisher information), belongs to the same mean loss as the first.

  Each example runs in a batch of its own; if the mesh shards batches, the other rows are empty. Besides the parameters
  a device holds its shards of the two sums and of one example's gradient.

  Args:
    config: the model's config.
    params: see `gradient`.
    batches: the data set, in any packing.
    computation: how the passes are computed; its `accumulation` does not matter.
    label: label of the progress bar.

  Returns:
    Two float32 trees with the structure and shardings of `params`.

  Raises:
    UserError: if one of them is not finite.
  """
  examples = batches.to_single_examples(sharding.num_batch_shards(computation.mesh))
  return _mean_gradients(config, params, examples, computation._replace(accumulation=1), label, order=2)


def _mean_gradients(config: ModelConfig, params: Params, batches: PackedBatches, computation: Computation,
                    label: str, *, order: int) -> tuple[Params, ...]:
  """Computes the sums over all batches, divided by the number of learned tokens."""
  zeros, add, finish = _programs(config, computation, order)
  sums, previous_loss = zeros(), None
  with progress.make_bar(len(batches), label, "batch") as bar:
    for batch in Input(batches, computation.mesh):
      sums, loss = add(sums, params, batch)
      jax.block_until_ready(previous_loss)  # the host may be only one batch ahead, as batches take memory
      previous_loss = loss
      bar.update()
  means, finite = finish(sums)
  if not finite:
    raise UserError(f"{label}: the gradient of the loss over the data is not finite, so the model cannot be trained on "
                    "it; look for weights that are not finite")
  return means


@functools.lru_cache(maxsize=8)  # reused in every round of a run
def _programs(config: ModelConfig, computation: Computation, order: int) -> tuple[Callable[..., Any], ...]:
  """Compiles functions that make zero sums, add a batch to them, and return means and whether they are finite."""
  shapes, mesh = abstract_params(config), computation.mesh
  param_shardings = jax.tree_util.tree_map_with_path(
      lambda path, leaf: sharding.param_sharding(mesh, sharding.path_name(path), leaf.shape), shapes)
  shardings = (*(param_shardings,) * order, NamedSharding(mesh, P()))

  def zeros() -> Sums:
    return (*(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes) for _ in range(order)),
            jnp.zeros((), jnp.int32))

  def finish(sums: Sums) -> tuple[tuple[Params, ...], jax.Array]:
    *totals, tokens = sums
    means = jax.tree.map(lambda total: total / tokens, tuple(totals))
    return means, jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(means)]))

  abstract = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
                          jax.eval_shape(zeros), shardings)
  return (jax.jit(zeros, out_shardings=shardings),
          jit_step(make_accumulate(config, computation, order=order), abstract),
          jax.jit(finish, donate_argnums=0, out_shardings=((param_shardings,) * order, None)))
