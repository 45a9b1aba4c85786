"""Which layers matter for a data set (the paper's eq. 3).

Axes: L layers, out and in of a weight matrix.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from imm_jax import progress
from imm_jax.errors import UserError
from imm_jax.model import sharding
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params
from imm_jax.training.input import Input
from imm_jax.training.packing import PackedBatches
from imm_jax.training.step import gradient_function, jit_step

# The weights of a layer that eq. 3 sums over.
_MODULES = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
            "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}


Sums = tuple[Params, jax.Array]  # of the gradients, and of the learned tokens


def add_function(config: ModelConfig, **options: Any,
                 ) -> Callable[[Sums, Params, dict[str, jax.Array]], tuple[Sums, jax.Array]]:
  """A function (sums, params, batch) -> (sums with the batch's, its loss), to be jitted; `options` are those of
  `gradient_function`."""
  of_batch = gradient_function(config, mean=False, **options)

  def add(sums: Sums, params: Params, batch: dict[str, jax.Array]) -> tuple[Sums, jax.Array]:
    loss, grads, tokens = of_batch(params, batch)
    return jax.tree.map(jnp.add, sums, (grads, tokens.astype(jnp.int32))), loss

  return add


class LayerImportance(NamedTuple):
  """Eq. 3 by layer: `total` is a float64 [L], the sum over `modules`, each one a float64 [L] by its name (`q_proj`)."""

  total: np.ndarray
  modules: dict[str, np.ndarray]


def gradient(config: ModelConfig, params: Params, batches: PackedBatches, *, mesh: Mesh, compute_dtype: jnp.dtype,
             remat: str = "full", attention: str = "xla", accumulation: int = 1, label: str = "gradient") -> Params:
  """The gradient of the loss over a whole data set: of the mean of -log p over all its learned tokens.

  It is added up in float32, batch by batch in the order of `batches`: for one order and mesh always the same bits. On
  top of the parameters a device holds its parts of the sum and of one batch's gradient, less than a training step.

  Args:
    config: of the model.
    params: float32, stacked layers, placed by `sharding.RULES`; they are left as they are.
    batches: the data set, once: packed with `epochs=1`.
    mesh: devices.
    compute_dtype: dtype of activations.
    remat: one of `decoder.REMAT`.
    attention: what `attention.choose` gave.
    accumulation: parts that a batch is run in.
    label: what the progress bar says.

  Returns:
    A float32 tree like `params`, placed as they are.

  Raises:
    UserError: when it is not finite.
  """
  add = add_function(config, compute_dtype=compute_dtype, remat=remat, attention=attention, mesh=mesh,
                     accumulation=accumulation)

  def finish(sums: tuple) -> tuple[Params, jax.Array]:
    mean = jax.tree.map(lambda total: total / sums[1], sums[0])
    return mean, jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(mean)]))

  where = jax.tree_util.tree_map_with_path(
      lambda path, leaf: sharding.param_sharding(mesh, sharding.path_name(path), leaf.shape), params)
  zeros = lambda: (jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params), jnp.zeros((), jnp.int32))
  sums = jax.jit(zeros, out_shardings=(where, NamedSharding(mesh, P())))()
  add, before = jit_step(add, sums), None
  with progress.bar(len(batches), label, "batch") as bar:
    for batch in Input(batches, mesh):
      sums, loss = add(sums, params, batch)
      jax.block_until_ready(before)  # the host is one batch ahead, no more: batches take memory
      before = loss
      bar.update()
  grads, finite = jax.jit(finish, donate_argnums=0, out_shardings=(where, None))(sums)
  if not finite:
    raise UserError(f"{label}: the gradient of the loss over the data is not finite, so the model cannot be trained on "
                    "it; look for weights that are not finite")
  return grads


def layer_importance(params: Params, grads: Params) -> LayerImportance:
  """I^n, the sum of |g W| over all entries of layer n's q, k, v, o, gate, up and down weights (eq. 3).

  The absolute value is taken of the gradient over the whole data set: what single batches disagree on cancels first.
  Rows are summed in float32, the rows' sums in float64.

  Args:
    params: W, stacked layers.
    grads: g, as `gradient` gives it.

  Returns:
    Scores of each layer, by module and in total.

  >>> matrices = lambda **of: {name: {"weight": jnp.asarray(of.get(name, np.zeros((2, 1, 1))))} for name in _MODULES}
  >>> tree = lambda **of: {"layers": {"self_attn": matrices(**of), "mlp": matrices(**of)}}
  >>> scores = layer_importance(tree(q_proj=[[[1., -2.]], [[3., 0.]]]), tree(q_proj=[[[1., 2.]], [[-1., 9.]]]))
  >>> scores.total.tolist(), scores.modules["up_proj"].tolist()
  ([5.0, 3.0], [0.0, 0.0])
  """
  weights = lambda tree: {name: tree["layers"][block][name]["weight"] for name, block in _MODULES.items()}
  rows = jax.device_get(_rows(weights(params), weights(grads)))
  modules = {name: sums.astype(np.float64).sum(axis=1) for name, sums in rows.items()}
  return LayerImportance(sum(modules.values()), modules)


def _rows(weights: dict[str, jax.Array], grads: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """The sums of the rows [L, out], whole on every device so that each process has them."""
  where = next(iter(weights.values())).sharding
  whole = NamedSharding(where.mesh, P()) if isinstance(where, NamedSharding) else None
  sums = lambda weights, grads: jax.tree.map(
      lambda w, g: jnp.sum(jnp.abs(g.astype(jnp.float32) * w.astype(jnp.float32)), axis=2), weights, grads)
  return jax.jit(sums, out_shardings=whole)(weights, grads)
