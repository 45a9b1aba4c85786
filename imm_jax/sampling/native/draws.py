"""Draws a token from each row's logits, in one or two passes over them.

On CPUs the head computes logits as [V, B], see `products.weights_first`. Passes over the logits keep that layout, with
the vocabulary in blocks: [N, n, B]. Reading them row by row would take a tenth of a step's time.

Axes: B rows, V vocabulary, N blocks of n tokens of it.
"""

import math

import jax
import jax.numpy as jnp

# The nucleus is searched among this many of the most likely tokens; if some row's is larger, all tokens are sorted.
_LIKELIEST = 512


def sample(logits: jax.Array, keys: jax.Array, steps: jax.Array, temperatures: jax.Array, allowed: jax.Array, *,
           top_p: float, greedy: bool) -> jax.Array:
  """Draws one token for each row; returns int32 [B], -1 where a row's logits have NaN or infinity.

  Args:
    logits: float32 [B, V].
    keys: uint32 [B, 2], a threefry key for each row.
    steps: int32 [B], the number of the token in its sample; determines the draw together with the key.
    temperatures: [B]; 0 takes the most likely token, the first in case of ties.
    allowed: bool [V]; other ids are never drawn, such as those that the tokenizer does not have.
    top_p: see `NativeSampler.generate`.
    greedy: whether all temperatures are 0.
  """
  blocks = _blocks(jnp.where(allowed[:, None], logits.T, -jnp.inf))
  size, tops = blocks.shape[1], jnp.max(blocks, axis=1)
  top_block = jnp.argmax(tops, axis=0)
  best = top_block * size + jnp.argmax(_take_blocks(blocks, top_block), axis=-1)
  top = jnp.max(tops, axis=0)
  checked = lambda tokens: jnp.where(jnp.isfinite(top), tokens, -1).astype(jnp.int32)  # NaN passes through maxima
  if greedy:
    return checked(best)
  scaled = (blocks - top) / jnp.maximum(temperatures, 1e-6)
  if top_p < 1.0:
    scaled = jnp.where(scaled >= nucleus(scaled.reshape(-1, scaled.shape[-1]).T, top_p), scaled, -jnp.inf)
  step_keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys), steps)
  uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(step_keys)
  # The first number draws a block, the second a token of it: one pass over the weights and two random numbers per row,
  # while the Gumbel trick takes one per token.
  block = draw(jnp.sum(jnp.exp(scaled), axis=1).T, uniform[:, 0])
  drawn = block * size + draw(jnp.exp(_take_blocks(scaled, block)), uniform[:, 1])
  return checked(jnp.where(temperatures > 0, drawn, best))


def nucleus(scaled: jax.Array, top_p: float) -> jax.Array:
  """Returns the smallest logit [B] within the nucleus, the smallest set of tokens with probability `top_p`.

  >>> threshold = nucleus(jnp.log(jnp.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])), 0.7)
  >>> [round(p, 3) for p in jnp.exp(threshold).tolist()]
  [0.3, 0.8]
  """
  total = jnp.sum(jnp.exp(scaled), axis=-1, keepdims=True)

  def search(order: jax.Array) -> tuple[jax.Array, jax.Array]:
    mass = jnp.cumsum(jnp.exp(order) / total, axis=-1)
    previous = jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))  # a token stays if this is below top_p: the first always
    return jnp.min(jnp.where(previous < top_p, order, jnp.inf), axis=-1), mass[:, -1] >= top_p

  threshold, within = search(jax.lax.top_k(scaled, min(_LIKELIEST, scaled.shape[-1]))[0])
  if scaled.shape[-1] <= _LIKELIEST:
    return threshold
  # Only rows that need it use the full sort, so a row's result does not depend on the other rows.
  full = lambda: search(jnp.sort(scaled, axis=-1, descending=True))[0]
  return jnp.where(within, threshold, jax.lax.cond(jnp.all(within), lambda: threshold, full))


def draw(weights: jax.Array, uniform: jax.Array) -> jax.Array:
  """Draws an index in proportion to `weights` [B, N] by the inverse CDF, with a `uniform` number [B] in [0, 1)."""
  # Entries of weight 0 must not be drawn, however the sums are rounded.
  ends = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), -jnp.inf)
  last = jnp.max(ends, axis=-1)
  return jnp.argmax(ends > jnp.minimum(uniform * last, jnp.nextafter(last, -jnp.inf))[:, None], axis=-1)


def _blocks(logits: jax.Array) -> jax.Array:
  """Reshapes [V, B] to [N, n, B] with n near the root of V, padded with -inf if no such n divides V.

  N is a multiple of 8, 4 or 2 if possible, so that a vocabulary split over that many chips is not moved.
  """
  vocab = logits.shape[0]
  root = math.isqrt(vocab)
  size = next((n for parts in (8, 4, 2, 1) for n in range(root, root // 16, -1) if vocab % (n * parts) == 0), root)
  padded = jnp.pad(logits, ((0, -vocab % size), (0, 0)), constant_values=-jnp.inf) if vocab % size else logits
  return padded.reshape(-1, size, logits.shape[1])


def _take_blocks(blocks: jax.Array, block: jax.Array) -> jax.Array:
  """Selects one block per row: [N, n, B] and indices [B] -> [B, n]."""
  return blocks[block, :, jnp.arange(blocks.shape[2])]
