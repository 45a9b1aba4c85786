"""Interventions in SFT against forgetting, the baselines of the paper's table 5.

The paper gives each of the three one number and no definition; the docstrings state our interpretation.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from imm_jax.merging import kernels
from imm_jax.model.decoder import Params
from imm_jax.model.sharding import path_name
from imm_jax.training.step import TrainState


class Intervention(NamedTuple):
  """Describes changes to `trainer.train`; the defaults change nothing.

  Attributes:
    grad_clip: global norm at which the gradient is clipped, instead of `sft.grad_clip`.
    transform: applied to the updates of AdamW.
    top_p: share of each weight matrix's entries to train, by importance on the data; `transform` holds the mask.
  """

  grad_clip: float | None = None
  transform: optax.GradientTransformation | None = None
  top_p: float | None = None


class MaskState(NamedTuple):
  """Holds a bool tree like the parameters: True for the entries to train."""

  mask: Params


def gradient_decay(gamma: float = 0.9) -> Intervention:
  """Scales the updates of layer n of N by gamma^(N-1-n): the nearer a layer is to the input, the less it moves.

  Our interpretation: the paper only gives gamma. AdamW normalizes gradients by their magnitude, so that scaling them
  would have almost no effect; as in layer-wise learning-rate decay, the factor scales AdamW's update instead.
  Embeddings, final norm and head are not scaled.

  Args:
    gamma: in (0, 1].

  >>> transform, updates = gradient_decay(0.5).transform, {"layers": {"norm": jnp.ones(3)}}
  >>> transform.update(updates, transform.init(updates))[0]["layers"]["norm"].tolist()
  [0.25, 0.5, 1.0]
  """

  def scale(leaf: jax.Array) -> jax.Array:
    factors = gamma ** np.arange(leaf.shape[0] - 1, -1, -1)
    return leaf * jnp.asarray(factors, leaf.dtype).reshape(-1, *[1] * (leaf.ndim - 1))

  change = lambda updates, _: {**updates, "layers": jax.tree.map(scale, updates["layers"])}
  return Intervention(transform=optax.stateless(change))


def gradient_clipping(max_norm: float = 2.0) -> Intervention:
  """Clips the gradient's global norm at `max_norm` > 0 instead of `sft.grad_clip`."""
  return Intervention(grad_clip=max_norm)


def weight_masking(top_p: float = 0.3) -> Intervention:
  """Trains the share `top_p` of each weight matrix's entries with the largest importance |g W|; freezes the others.

  Our interpretation: the paper only gives the share. g is the gradient of the loss over all data at the start of SFT
  (eq. 3); a matrix is one projection of one layer, the embeddings or the head. Norms and biases are trained as usual.
  Frozen entries stay bitwise the same, under weight decay too; the gradient's norm and AdamW's moments ignore the mask.

  The mask is part of the optimizer's state: it is sharded like the parameters, is not a constant of the compiled step,
  and is saved with the moments, one byte per parameter. A resumed run therefore needs neither the initial model nor
  another pass over the data, and has the same mask on another mesh, where the gradient would be rounded differently.

  Args:
    top_p: in (0, 1].
  """

  def init(params: Params) -> MaskState:
    return MaskState(jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params))

  def update(updates: Params, state: MaskState, params: Params | None = None) -> tuple[Params, MaskState]:
    del params
    # x + -0.0 is x for every x, while -0.0 + 0.0 is 0.0.
    return jax.tree.map(lambda mask, u: jnp.where(mask, u, -0.0), state.mask, updates), state

  return Intervention(transform=optax.GradientTransformation(init, update), top_p=top_p)


INTERVENTIONS: Mapping[str, Callable[..., Intervention]] = {
    f.__name__: f for f in (gradient_decay, gradient_clipping, weight_masking)}
# Intervention -> the key of config.sft that holds its argument.
SETTINGS = {"gradient_decay": "gradient_decay", "gradient_clipping": "max_norm", "weight_masking": "top_share"}


def set_mask(state: TrainState, mask: Params) -> TrainState:
  """Returns the state of a `weight_masking` run with its mask replaced."""
  return state | {"opt_state": optax.tree.set(state["opt_state"], mask=mask)}


def importance_mask(params: Params, grads: Params, top_p: float) -> Params:
  """Selects the share `top_p` of each weight matrix's entries with the largest |g W|.

  Selects exactly max(1, round(top_p * size)) entries of each matrix; ties at the threshold go to the first in row-major
  order. The same parameters and gradients give the same mask on every mesh.

  Args:
    params: W, with stacked layers; a matrix has fewer than 2**32 entries.
    grads: g, a tree like `params`.
    top_p: in (0, 1].

  Returns:
    A bool tree like `params`, sharded like them; all True for norms and biases.

  >>> head = lambda rows: {"lm_head": {"weight": jnp.array(rows)}}
  >>> importance_mask(head([[1., -2.], [3., 4.]]), head([[1., 1.], [1., 0.]]), 0.5)["lm_head"]["weight"].tolist()
  [[False, True], [True, False]]
  """

  def mask(path: tuple, weight: jax.Array, grad: jax.Array) -> jax.Array:
    stacked = path_name(path).startswith("layers.")
    if weight.ndim - stacked < 2:
      return jnp.ones(weight.shape, bool)
    top = lambda pair: _top_share(pair[0] * pair[1], top_p)
    # One matrix at a time, so that the search only needs scratch memory for one.
    return jax.lax.map(top, (weight, grad)) if stacked else top((weight, grad))

  shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
  return jax.jit(lambda *trees: jax.tree_util.tree_map_with_path(mask, *trees), out_shardings=shardings)(params, grads)


def _top_share(scores: jax.Array, share: float) -> jax.Array:
  """Returns a mask of the entries of a matrix [out, in] with the largest magnitudes.

  Searches for the threshold bit by bit, counting the entries at or above it. Each count is an integer sum over all
  shards of the matrix, hence exact, and nothing is sorted, moved or scattered.
  """
  bits = kernels.magnitude_bits(scores)
  count = lambda entries: jnp.sum(entries, dtype=jnp.uint32)
  wanted = jnp.uint32(max(1, round(share * scores.size)))
  limit = _binary_search(lambda value: count(bits >= value) >= wanted)
  # Ties are common: embeddings of tokens that do not occur have zero gradients.
  row, column = (jax.lax.broadcasted_iota(jnp.uint32, scores.shape, axis) for axis in (0, 1))
  index = row * scores.shape[1] + column
  ties, missing = bits == limit, wanted - count(bits > limit)
  end = _binary_search(lambda value: count(ties & (index < value)) <= missing)
  return (bits > limit) | ties & (index < end)


def _binary_search(holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """Finds the largest uint32 that satisfies a monotone predicate, which is true for 0, by binary search."""

  def try_bit(i: jax.Array, value: jax.Array) -> jax.Array:
    higher = value | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
    return jnp.where(holds(higher), higher, value)

  return jax.lax.fori_loop(0, 32, try_bit, jnp.uint32(0))
