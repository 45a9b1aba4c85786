"""Device side of the sampler: prompts in, tokens out, in fixed shapes.

A state holds B rows, each a sample on its way or a free place. Rows join and leave on their own: `insert` puts prompts
that `prefill` has run into free rows, `decode` extends all rows by one token a step. Prompts begin at the cache's first
slot, whatever their length, so that a row's slots are those of its own tokens.

Axes: B rows, M prompts, P padded prompt length, N most new tokens, K key/value heads, S cache slots, h head dim,
V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import LayerCache, Params, bind
from imm_jax.model.sharding import cache_sharding


class Static(NamedTuple):
  """What is compiled in: the model, its dtype, ids that end a sample, how many ids exist, how tokens are drawn, and the
  devices where there are several."""

  config: ModelConfig
  dtype: jnp.dtype
  ends: tuple[int, ...]
  num_ids: int
  top_p: float
  greedy: bool
  mesh: Mesh | None = None


# caches: for each layer (keys, values) [B, K, S, h]. By row, [B]: `used` slots of the cache; the `last` token; `count`
# of tokens drawn; `done`; `keys` [B, 2]; `temperatures`; the `tokens` [B, N] drawn.
State = dict[str, Any]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def init(rows: int, slots: int, new_tokens: int, static: Static) -> State:
  """B free rows."""
  config = static.config
  empty = lambda: jnp.zeros((rows, config.num_kv_heads, slots, config.head_dim), static.dtype)
  integers = lambda *shape: jnp.zeros((rows, *shape), jnp.int32)
  return _placed({
      "caches": [(empty(), empty()) for _ in range(config.num_layers)], "used": integers(), "last": integers(),
      "count": integers(), "done": jnp.ones(rows, bool), "keys": jnp.zeros((rows, 2), jnp.uint32),
      "temperatures": jnp.zeros(rows), "tokens": integers(new_tokens)}, static)


@functools.partial(jax.jit, static_argnames="static")
def prefill(params: Params, tokens: jax.Array, lengths: jax.Array, *, static: Static,
            ) -> tuple[jax.Array, list[LayerCache]]:
  """Runs prompts, int32 [M, P] from the left; returns logits of what comes next [M, V] and the caches [M, K, P, h]."""
  logits, caches = bind(static.config, params, scan=False).prefill(tokens, lengths=lengths, compute_dtype=static.dtype)
  placed = _placed({"logits": logits, "caches": caches}, static)
  return placed["logits"], placed["caches"]


@functools.partial(jax.jit, static_argnames="static", donate_argnames="state")
def insert(state: State, logits: jax.Array, caches: list[LayerCache], lengths: jax.Array, sources: jax.Array,
           rows: jax.Array, keys: jax.Array, temperatures: jax.Array, *, static: Static) -> State:
  """Puts prompts `sources` [I] of those that were run into `rows` [I] and draws their first tokens; row B is none."""
  first = sample(logits[sources], keys, jnp.zeros_like(rows), temperatures, num_ids=static.num_ids, top_p=static.top_p,
                 greedy=static.greedy)
  length = caches[0][0].shape[2]
  put = lambda cache, new: cache.at[rows, :, :length].set(new[sources], mode="drop")
  done = _ends(first, static) | (state["tokens"].shape[1] == 1)
  values = {"used": lengths[sources], "last": first, "count": jnp.ones_like(rows), "done": done, "keys": keys,
            "temperatures": temperatures}
  new = {name: state[name].at[rows].set(value, mode="drop") for name, value in values.items()}
  return _placed({**new, "caches": jax.tree.map(put, state["caches"], caches),
                  "tokens": state["tokens"].at[rows, 0].set(first, mode="drop")}, static)


def grow(state: State, slots: int) -> State:
  """The state with at least this many slots a row."""
  caches = state["caches"]
  if caches[0][0].shape[2] < slots:
    for i, layer in enumerate(caches):  # one after the other, so that one layer at a time is held twice
      caches[i] = _widen(layer, slots=slots)
  return state


@functools.partial(jax.jit, static_argnames="slots")
def _widen(layer: LayerCache, *, slots: int) -> LayerCache:
  return jax.tree.map(lambda cache: jnp.pad(cache, ((0, 0), (0, 0), (0, slots - cache.shape[2]), (0, 0))), layer)


@functools.partial(jax.jit, static_argnames="static", donate_argnames="state")
def decode(params: Params, state: State, steps: jax.Array, most_done: jax.Array, *, static: Static) -> State:
  """Extends all rows for at most `steps` tokens, or until `most_done` rows are done."""
  model = bind(static.config, params, scan=False)
  rows = jnp.arange(state["done"].shape[0])
  new_tokens = state["tokens"].shape[1]

  def body(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
    step, s = carry
    logits, caches = model.decode(s["last"], positions=s["used"], caches=s["caches"], compute_dtype=static.dtype)
    token = sample(logits, s["keys"], s["count"], s["temperatures"], num_ids=static.num_ids, top_p=static.top_p,
                   greedy=static.greedy)
    going = ~s["done"]
    count = s["count"] + going
    # What a row that is done draws goes nowhere.
    tokens = s["tokens"].at[rows, jnp.where(going, s["count"], new_tokens)].set(token, mode="drop")
    return step + 1, _placed(s | {
        "caches": caches, "tokens": tokens, "count": count, "last": jnp.where(going, token, s["last"]),
        "used": s["used"] + going, "done": s["done"] | _ends(token, static) | (count >= new_tokens)}, static)

  going = lambda carry: (carry[0] < steps) & (jnp.sum(carry[1]["done"]) < most_done)
  return jax.lax.while_loop(going, body, (jnp.int32(0), state))[1]


def sample(logits: jax.Array, keys: jax.Array, steps: jax.Array, temperatures: jax.Array, *, num_ids: int,
           top_p: float, greedy: bool) -> jax.Array:
  """One token for each row; ids past the tokenizer's are never drawn.

  Args:
    logits: float32 [B, V].
    keys: uint32 [B, 2], a threefry key for each row.
    steps: int32 [B], the number of the token in its sample; with the key it decides the draw.
    temperatures: [B]; 0 takes the likeliest token.
    num_ids: V or less.
    top_p: see `NativeSampler.generate`.
    greedy: all temperatures are 0.
  """
  if num_ids < logits.shape[1]:
    logits = jnp.where(jnp.arange(logits.shape[1]) < num_ids, logits, -jnp.inf)
  # The first of the largest; two passes are faster than argmax, which no compiler vectorises on CPU.
  peak = jnp.max(logits, axis=-1, keepdims=True)
  best = jnp.min(jnp.where(logits == peak, jnp.arange(logits.shape[1], dtype=jnp.int32), num_ids - 1), axis=-1)
  if greedy:
    return best
  scaled = (logits - peak) / jnp.maximum(temperatures, 1e-6)[:, None]
  if top_p < 1.0:
    order = jnp.sort(scaled, axis=-1, descending=True)
    probabilities = jax.nn.softmax(order, axis=-1)
    # A token stays while the mass before it is below top_p, so the first always stays.
    kept = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
    floor = jnp.min(jnp.where(kept, order, jnp.inf), axis=-1, keepdims=True)
    scaled = jnp.where(scaled >= floor, scaled, -jnp.inf)
  uniform = jax.vmap(lambda key, step: jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), step)))
  return jnp.where(temperatures > 0, _inverse(jnp.exp(scaled), uniform(keys, steps)), best)


def _inverse(weights: jax.Array, uniform: jax.Array) -> jax.Array:
  """The index whose stretch of the cumulated weights [B, V] holds the share `uniform` [B] of their sum.

  In two levels, blocks and then the entries of one block: one pass over the weights and one random number a row, where
  the Gumbel trick takes as many as there are entries.
  """
  size = weights.shape[1]
  block = max(1, round(size**0.5))
  blocks = jnp.pad(weights, ((0, 0), (0, -size % block))).reshape(weights.shape[0], -1, block)
  sums = jnp.sum(blocks, axis=-1)
  ends = jnp.cumsum(sums, axis=-1)
  target = uniform * ends[:, -1]
  which = _first_above(sums, ends, target)
  before = jnp.where(which > 0, jnp.take_along_axis(ends, jnp.maximum(which - 1, 0)[:, None], axis=1)[:, 0], 0.0)
  inside = jnp.take_along_axis(blocks, which[:, None, None], axis=1)[:, 0]
  return (which * block + _first_above(inside, jnp.cumsum(inside, axis=-1), target - before)).astype(jnp.int32)


def _first_above(weights: jax.Array, ends: jax.Array, target: jax.Array) -> jax.Array:
  """The first index with weight whose stretch ends above the target; where rounding leaves none, one of the last."""
  ends = jnp.where(weights > 0, ends, -jnp.inf)  # however it is rounded, what has no weight is not drawn
  return jnp.argmax(ends > jnp.minimum(target, jnp.nextafter(jnp.max(ends, axis=-1), -jnp.inf))[:, None], axis=-1)


def _placed(arrays: State, static: Static) -> State:
  """Caches split over the devices, all else on each of them."""
  if static.mesh is None:
    return arrays
  everywhere = NamedSharding(static.mesh, P())
  where = lambda name, x: cache_sharding(static.mesh, *x.shape[:2]) if name == "caches" else everywhere
  return {name: jax.tree.map(lambda x, n=name: jax.lax.with_sharding_constraint(x, where(n, x)), value)
          for name, value in arrays.items()}


def _ends(tokens: jax.Array, static: Static) -> jax.Array:
  return jnp.isin(tokens, jnp.array(static.ends, jnp.int32))
