"""Which layers matter for a data set (the paper's eq. 3, and eq. 2 of second order).

Axes: L layers, out and in of a weight matrix.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from imm_jax import progress
from imm_jax.analysis import MODULES
from imm_jax.errors import UserError
from imm_jax.model import sharding
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params, abstract_params
from imm_jax.training.input import Input
from imm_jax.training.packing import PackedBatches
from imm_jax.training.step import gradient_function, jit_step

# Of the gradients, with order 2 of their squares, and of the learned tokens.
Sums = tuple[Params | jax.Array, ...]


def add_function(config: ModelConfig, *, order: int = 1, **options: Any,
                 ) -> Callable[[Sums, Params, dict[str, jax.Array]], tuple[Sums, jax.Array]]:
  """A function (sums, params, batch) -> (sums with the batch's, its loss), to be jitted; `options` are those of
  `gradient_function`."""
  of_batch = gradient_function(config, mean=False, **options)

  def add(sums: Sums, params: Params, batch: dict[str, jax.Array]) -> tuple[Sums, jax.Array]:
    if order == 1:
      loss, total, numbers = of_batch(params, batch, sums[0])
      return (total, sums[1] + numbers["tokens"].astype(jnp.int32)), loss
    loss, grads, numbers = of_batch(params, batch)
    tokens = numbers["tokens"].astype(jnp.int32)
    return jax.tree.map(jnp.add, sums, (grads, jax.tree.map(jnp.square, grads), tokens)), loss

  return add


class LayerImportance(NamedTuple):
  """Scores by layer: `total` is a float64 [L], the sum over `modules`, each a float64 [L] by its name (`q_proj`)."""

  total: np.ndarray
  modules: dict[str, np.ndarray]

  def to_json(self) -> dict[str, Any]:
    """`layers` and `modules`, as analysis.json holds them."""
    return {"layers": self.total.tolist(), "modules": {name: scores.tolist() for name, scores in self.modules.items()}}


def gradient(config: ModelConfig, params: Params, batches: PackedBatches, *, mesh: Mesh, compute_dtype: jnp.dtype,
             remat: str = "full", attention: str = "xla", accumulation: int = 1, label: str = "gradient") -> Params:
  """The gradient of the loss over a whole data set: of the mean of -log p over all its learned tokens.

  It is added up in float32, batch by batch in the order of `batches`: for one order and mesh always the same bits. On
  top of the parameters a device holds its part of one gradient, which every layer of every batch is added to.

  Args:
    config: of the model.
    params: float32, stacked layers, placed by `sharding.RULES`; they are left as they are.
    batches: the data set, once: packed with `epochs=1`.
    mesh: devices.
    compute_dtype: dtype of activations.
    remat: one of `decoder.REMAT`.
    attention: what `attention.choose_backend` gave.
    accumulation: parts that a batch is run in.
    label: what the progress bar says.

  Returns:
    A float32 tree like `params`, placed as they are.

  Raises:
    UserError: when it is not finite.
  """
  grads, = _means(config, params, batches, mesh, label, order=1, compute_dtype=compute_dtype, remat=remat,
                  attention=attention, accumulation=accumulation)
  return grads


def gradient_and_squares(config: ModelConfig, params: Params, batches: PackedBatches, *, mesh: Mesh,
                         compute_dtype: jnp.dtype, remat: str = "full", attention: str = "xla",
                         label: str = "gradient") -> tuple[Params, Params]:
  """What eq. 2 needs: `gradient`, and the squares of every single example's gradient, added up.

  With T learned tokens in all and G_j the gradient of -log p of the whole response of example j, a sum over its tokens:
  (sum of G_j / T, sum of G_j^2 / T). Both are divided by T alone, so that the second, which stands for the curvature
  (the empirical Fisher information), is that of the same mean loss whose gradient the first is.

  Each example runs in a batch of its own; where a mesh splits batches, the other rows are empty and their devices add
  nothing. On top of the parameters a device holds its parts of the two sums and of one example's gradient.

  Args:
    config: of the model.
    params: as for `gradient`.
    batches: the data set, however it is packed.
    mesh: devices.
    compute_dtype: dtype of activations.
    remat: one of `decoder.REMAT`.
    attention: what `attention.choose_backend` gave.
    label: what the progress bar says.

  Returns:
    Two float32 trees like `params`, placed as they are.

  Raises:
    UserError: when one is not finite.
  """
  return _means(config, params, batches.one_by_one(sharding.num_batch_shards(mesh)), mesh, label, order=2,
                compute_dtype=compute_dtype, remat=remat, attention=attention)


def _means(config: ModelConfig, params: Params, batches: PackedBatches, mesh: Mesh, label: str, *, order: int,
           **options: Any) -> tuple[Params, ...]:
  """The sums of all batches, divided by the learned tokens."""
  zeros, add, finish = _programs(config, mesh, order, tuple(options.items()))
  sums, before = zeros(), None
  with progress.bar(len(batches), label, "batch") as bar:
    for batch in Input(batches, mesh):
      sums, loss = add(sums, params, batch)
      jax.block_until_ready(before)  # the host is one batch ahead, no more: batches take memory
      before = loss
      bar.update()
  means, finite = finish(sums)
  if not finite:
    raise UserError(f"{label}: the gradient of the loss over the data is not finite, so the model cannot be trained on "
                    "it; look for weights that are not finite")
  return means


@functools.lru_cache(maxsize=8)  # a run comes here in every round
def _programs(config: ModelConfig, mesh: Mesh, order: int, options: tuple[tuple[str, Any], ...],
              ) -> tuple[Callable[..., Any], ...]:
  """Compiled: first sums, a batch's are added, the means of the sums and whether they are finite."""
  shapes = abstract_params(config)
  where = jax.tree_util.tree_map_with_path(
      lambda path, leaf: sharding.param_sharding(mesh, sharding.path_name(path), leaf.shape), shapes)
  placed = (*(where,) * order, NamedSharding(mesh, P()))

  def zeros() -> Sums:
    return (*(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes) for _ in range(order)),
            jnp.zeros((), jnp.int32))

  def finish(sums: Sums) -> tuple[tuple[Params, ...], jax.Array]:
    *totals, tokens = sums
    means = jax.tree.map(lambda total: total / tokens, tuple(totals))
    return means, jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(means)]))

  abstract = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
                          jax.eval_shape(zeros), placed)
  return (jax.jit(zeros, out_shardings=placed),
          jit_step(add_function(config, order=order, mesh=mesh, **dict(options)), abstract),
          jax.jit(finish, donate_argnums=0, out_shardings=((where,) * order, None)))


def layer_importance(params: Params, grads: Params, squares: Params | None = None) -> LayerImportance:
  """I^n, the sum of |g W| over all entries of layer n's q, k, v, o, gate, up and down weights (eq. 3).

  With `squares` it is the sum of |g W - 1/2 sum_j (g_j W)^2| (eq. 2; LLM-Pruner, Ma et al., 2023): what the loss is
  expected to change by where an entry is set to 0, to second order.

  The absolute value is taken of the gradient over the whole data set: what single batches disagree on cancels first.
  Rows are summed in float32, the rows' sums in float64.

  Args:
    params: W, stacked layers.
    grads: g, as `gradient` gives it.
    squares: sum_j g_j^2, as `gradient_and_squares` gives it beside g.

  Returns:
    Scores of each layer, by module and in total.

  >>> matrices = lambda **of: {name: {"weight": jnp.asarray(of.get(name, np.zeros((2, 1, 1))))} for name in MODULES}
  >>> tree = lambda **of: {"layers": {"self_attn": matrices(**of), "mlp": matrices(**of)}}
  >>> weights, grads = tree(q_proj=[[[1., -2.]], [[3., 0.]]]), tree(q_proj=[[[1., 2.]], [[-1., 9.]]])
  >>> scores = layer_importance(weights, grads)
  >>> scores.total.tolist(), scores.modules["up_proj"].tolist()
  ([5.0, 3.0], [0.0, 0.0])
  >>> layer_importance(weights, grads, tree(q_proj=[[[4., 2.]], [[2., 0.]]])).total.tolist()
  [9.0, 12.0]
  """
  weights = lambda tree: {name: tree["layers"][block][name]["weight"] for name, block in MODULES.items()}
  trees = [weights(tree) for tree in (params, grads, squares) if tree is not None]
  where = trees[0]["q_proj"].sharding
  # Whole on every device, so that each process has them.
  whole = NamedSharding(where.mesh, P()) if isinstance(where, NamedSharding) else None
  rows = jax.device_get(_row_sums(whole)(*trees))
  modules = {name: rows[name].astype(np.float64).sum(axis=1) for name in MODULES}  # jax sorts names
  return LayerImportance(sum(modules.values()), modules)


@functools.lru_cache(maxsize=8)
def _row_sums(where: NamedSharding | None) -> Callable[..., dict[str, jax.Array]]:
  """Compiled: the sums of the rows' scores [L, out]."""

  def score(w: jax.Array, g: jax.Array, squares: jax.Array | None = None) -> jax.Array:
    w = w.astype(jnp.float32)
    change = g.astype(jnp.float32) * w
    return jnp.sum(jnp.abs(change if squares is None else change - 0.5 * squares * w * w), axis=2)

  return jax.jit(lambda *trees: jax.tree.map(score, *trees), out_shardings=where)
