"""Draws a token from each row's logits, in one or two passes over them.

On a CPU the head's product leaves logits as [V, B], see `products.weights_first`. What goes through all of them here
takes them so: the vocabulary in blocks, [N, n, B]. Read row by row instead, they would take a tenth of a step's time.

Axes: B rows, V vocabulary, N blocks of n tokens of it.
"""

import math

import jax
import jax.numpy as jnp

# Likeliest tokens that a nucleus is looked for among; where some row's is larger, all are sorted.
_LIKELIEST = 512


def sample(logits: jax.Array, keys: jax.Array, steps: jax.Array, temperatures: jax.Array, allowed: jax.Array, *,
           top_p: float, greedy: bool) -> jax.Array:
  """One token for each row.

  Args:
    logits: float32 [B, V].
    keys: uint32 [B, 2], a threefry key for each row.
    steps: int32 [B], the number of the token in its sample; with the key it decides the draw.
    temperatures: [B]; 0 takes the likeliest token, the first of equals.
    allowed: bool [V]; ids that the tokenizer does not have are never drawn.
    top_p: see `NativeSampler.generate`.
    greedy: all temperatures are 0.
  """
  blocks = _blocks(jnp.where(allowed[:, None], logits.T, -jnp.inf))
  size, tops = blocks.shape[1], jnp.max(blocks, axis=1)
  first = jnp.argmax(tops, axis=0)
  best = first * size + jnp.argmax(_of(blocks, first), axis=-1)
  if greedy:
    return best.astype(jnp.int32)
  scaled = (blocks - jnp.max(tops, axis=0)) / jnp.maximum(temperatures, 1e-6)
  if top_p < 1.0:
    scaled = jnp.where(scaled >= nucleus(scaled.reshape(-1, scaled.shape[-1]).T, top_p), scaled, -jnp.inf)
  step_keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys), steps)
  uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(step_keys)
  # A block by the first number, one of its tokens by the second: that is one pass over the weights and two numbers a
  # row, where the Gumbel trick takes as many as there are tokens.
  which = draw(jnp.sum(jnp.exp(scaled), axis=1).T, uniform[:, 0])
  drawn = which * size + draw(jnp.exp(_of(scaled, which)), uniform[:, 1])
  return jnp.where(temperatures > 0, drawn, best).astype(jnp.int32)


def nucleus(scaled: jax.Array, top_p: float) -> jax.Array:
  """The least logit [B] of the smallest set of tokens that holds a share `top_p` of the probability.

  >>> least = nucleus(jnp.log(jnp.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])), 0.7)
  >>> [round(p, 3) for p in jnp.exp(least).tolist()]
  [0.3, 0.8]
  """
  total = jnp.sum(jnp.exp(scaled), axis=-1, keepdims=True)

  def least(order: jax.Array) -> tuple[jax.Array, jax.Array]:
    mass = jnp.cumsum(jnp.exp(order) / total, axis=-1)
    before = jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))  # a token stays while that is below top_p, so the first always
    return jnp.min(jnp.where(before < top_p, order, jnp.inf), axis=-1), mass[:, -1] >= top_p

  found, within = least(jax.lax.top_k(scaled, min(_LIKELIEST, scaled.shape[-1]))[0])
  if scaled.shape[-1] <= _LIKELIEST:
    return found
  # A row's own result does not depend on whether another's is looked for among all.
  everywhere = lambda: least(jnp.sort(scaled, axis=-1, descending=True))[0]
  return jnp.where(within, found, jax.lax.cond(jnp.all(within), lambda: found, everywhere))


def draw(weights: jax.Array, uniform: jax.Array) -> jax.Array:
  """The index whose stretch of the cumulated weights [B, N] holds this share [B] of their sum."""
  # However it is rounded, what has no weight is not drawn.
  ends = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), -jnp.inf)
  last = jnp.max(ends, axis=-1)
  return jnp.argmax(ends > jnp.minimum(uniform * last, jnp.nextafter(last, -jnp.inf))[:, None], axis=-1)


def _blocks(logits: jax.Array) -> jax.Array:
  """[V, B] -> [N, n, B], n near the root of V; what is added at the end, where nothing near it divides V, is -inf.

  N is a multiple of 8, 4 or 2 where it can be: a vocabulary that is split over so many chips then stays where it is.
  """
  vocab = logits.shape[0]
  root = math.isqrt(vocab)
  size = next((n for parts in (8, 4, 2, 1) for n in range(root, root // 16, -1) if vocab % (n * parts) == 0), root)
  padded = jnp.pad(logits, ((0, -vocab % size), (0, 0)), constant_values=-jnp.inf) if vocab % size else logits
  return padded.reshape(-1, size, logits.shape[1])


def _of(blocks: jax.Array, which: jax.Array) -> jax.Array:
  """Each row's own block: [N, n, B] and [B] -> [B, n]."""
  return blocks[which, :, jnp.arange(blocks.shape[2])]
