"""Measures the importance of layers for a data set (the paper's eq. 3, and the second-order eq. 2).

Axes: L layers, out and in of a weight matrix.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from imm_jax.model.config import PROJECTIONS
from imm_jax.model.decoder import Params


class LayerImportance(NamedTuple):
  """Holds importance scores: `total`, float64 [L], is the sum over `modules`, name (`q_proj`) -> float64 [L]."""

  total: np.ndarray
  modules: dict[str, np.ndarray]

  def to_json(self) -> dict[str, Any]:
    """Returns `layers` and `modules` in the form of analysis.json."""
    return {"layers": self.total.tolist(), "modules": {name: scores.tolist() for name, scores in self.modules.items()}}


def layer_importance(params: Params, grads: Params, squares: Params | None = None) -> LayerImportance:
  """Computes I^n, the sum of |g W| over all entries of layer n's q, k, v, o, gate, up and down weights (eq. 3).

  With `squares` it is the sum of |g W - 1/2 sum_j (g_j W)^2| (eq. 2; LLM-Pruner, Ma et al., 2023), a second-order
  estimate of the change of the loss if an entry is set to 0.

  The absolute value is that of the gradient over the whole data set, in which differences between batches cancel.
  Rows are summed in float32, the sums of rows in float64.

  Args:
    params: W, with stacked layers.
    grads: g, a result of `gradients.gradient`.
    squares: sum_j g_j^2, a result of `gradients.gradient_and_squares`.

  Returns:
    Scores of each layer, by module and in total.

  >>> matrices = lambda **of: {name: {"weight": jnp.asarray(of.get(name, np.zeros((2, 1, 1))))} for name in PROJECTIONS}
  >>> tree = lambda **of: {"layers": {"self_attn": matrices(**of), "mlp": matrices(**of)}}
  >>> weights, grads = tree(q_proj=[[[1., -2.]], [[3., 0.]]]), tree(q_proj=[[[1., 2.]], [[-1., 9.]]])
  >>> scores = layer_importance(weights, grads)
  >>> scores.total.tolist(), scores.modules["up_proj"].tolist()
  ([5.0, 3.0], [0.0, 0.0])
  >>> layer_importance(weights, grads, tree(q_proj=[[[4., 2.]], [[2., 0.]]])).total.tolist()
  [9.0, 12.0]
  """
  weights = lambda tree: {name: tree["layers"][block][name]["weight"] for name, block in PROJECTIONS.items()}
  trees = [weights(tree) for tree in (params, grads, squares) if tree is not None]
  param_shardings = trees[0]["q_proj"].sharding
  # Replicated, so that every process can read them.
  replicated = NamedSharding(param_shardings.mesh, P()) if isinstance(param_shardings, NamedSharding) else None
  rows = jax.device_get(_row_sums(replicated)(*trees))
  modules = {name: rows[name].astype(np.float64).sum(axis=1) for name in PROJECTIONS}  # jax sorts names
  return LayerImportance(sum(modules.values()), modules)


@functools.lru_cache(maxsize=8)
def _row_sums(param_shardings: NamedSharding | None) -> Callable[..., dict[str, jax.Array]]:
  """Compiles the sum of each row's scores [L, out]."""

  def score(w: jax.Array, g: jax.Array, squares: jax.Array | None = None) -> jax.Array:
    w = w.astype(jnp.float32)
    change = g.astype(jnp.float32) * w
    return jnp.sum(jnp.abs(change if squares is None else change - 0.5 * squares * w * w), axis=2)

  return jax.jit(lambda *trees: jax.tree.map(score, *trees), out_shardings=param_shardings)
