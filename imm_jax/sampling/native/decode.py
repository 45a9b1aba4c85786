"""Device side of the sampler: jitted prefill and decoding with fixed shapes.

A state holds B rows, each with a running sample or free. Rows join and leave independently: `insert` puts prompts that
`prefill` has run into free rows, and `decode` extends all rows by one token per step. The common prefix of all prompts
is run and stored once; a row's cache slots hold only its own tokens.

Axes: B rows, R x T tokens of packed prompts, I prompts of a pack, J samples that join, N maximum of new tokens, K
key/value heads, S cache slots, P slots of the prefix, h head dim, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from imm_jax.model.cached import LayerCache, Prefix, scatter
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params, bind
from imm_jax.model.sharding import cache_sharding
from imm_jax.sampling.native.draws import sample


class Static(NamedTuple):
  """Holds the static arguments of compilation; `mesh` is None on a single device, `ends` are the end tokens' ids, and
  `kernel` is one of `decode_kernels.KERNELS`."""

  config: ModelConfig
  dtype: jnp.dtype
  ends: tuple[int, ...]
  top_p: float
  greedy: bool
  mesh: Mesh | None = None
  kernel: str = "xla"


# caches: (keys, values) [B, K, S, h] of each layer, keys [B, K, h, S] for the kernel `columns`. Per row, [B]: number of
# `used` cache slots; `last` token; `count` of drawn tokens; `done`; random `keys` [B, 2]; `temperatures`; the drawn
# `tokens` [B, N].
State = dict[str, Any]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def init(rows: int, slots: int, new_tokens: int, static: Static) -> State:
  """Returns a state of B free rows."""
  config = static.config
  empty = lambda *shape: jnp.zeros((rows, config.num_kv_heads, *shape), static.dtype)
  keys = (config.head_dim, slots) if static.kernel == "columns" else (slots, config.head_dim)
  integers = lambda *shape: jnp.zeros((rows, *shape), jnp.int32)
  return _constrain({
      "caches": [(empty(*keys), empty(slots, config.head_dim)) for _ in range(config.num_layers)],
      "used": integers(), "last": integers(),
      "count": integers(), "done": jnp.ones(rows, bool), "keys": jnp.zeros((rows, 2), jnp.uint32),
      "temperatures": jnp.zeros(rows), "tokens": integers(new_tokens)}, static)


@functools.partial(jax.jit, static_argnums=(0, 1))
def no_prefix(slots: int, static: Static) -> Prefix:
  """Returns an empty prefix with P slots."""
  empty = jnp.zeros((static.config.num_kv_heads, slots, static.config.head_dim), static.dtype)
  return _make_prefix([(empty, empty) for _ in range(static.config.num_layers)], jnp.int32(0), static)


@functools.partial(jax.jit, static_argnames=("slots", "static"))
def take_prefix(caches: list[LayerCache], length: jax.Array, *, slots: int, static: Static) -> Prefix:
  """Returns the first row of the caches of `prefill` as a prefix with P slots."""
  return _make_prefix(jax.tree.map(lambda x: x[0, :, :slots], caches), length, static)


def _make_prefix(caches: list[LayerCache], length: jax.Array, static: Static) -> Prefix:
  if static.mesh is not None:  # heads are sharded like those of the rows' caches
    where = NamedSharding(static.mesh, P("tensor"))
    caches = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, where), caches)
    length = jax.lax.with_sharding_constraint(length, NamedSharding(static.mesh, P()))
  return Prefix(caches, length)


@functools.partial(jax.jit, static_argnames="static")
def prefill(params: Params, prefix: Prefix, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array,
            last: jax.Array, *, static: Static) -> tuple[jax.Array, list[LayerCache]]:
  """Runs `Decoder.prefill`; returns the next tokens' logits [I, V] and the caches [R, K, T, h]."""
  if static.mesh is not None:
    split = NamedSharding(static.mesh, P("data" if tokens.shape[0] % static.mesh.shape["data"] == 0 else None))
    tokens, positions, segment_ids = (
        jax.lax.with_sharding_constraint(x, split) for x in (tokens, positions, segment_ids))
  logits, caches = bind(static.config, params, scan=False).prefill(
      tokens, positions=positions, segment_ids=segment_ids, last=last, prefix=prefix, compute_dtype=static.dtype)
  placed = _constrain({"logits": logits, "caches": caches}, static)
  return placed["logits"], placed["caches"]


def insert(state: State, logits: jax.Array, caches: list[LayerCache], lengths: jax.Array, starts: jax.Array,
           sources: jax.Array, rows: jax.Array, keys: jax.Array, temperatures: jax.Array, allowed: jax.Array, *,
           static: Static) -> State:
  """Puts prompts of a pack into rows and draws their first tokens.

  Args:
    state: B rows.
    logits: from `prefill`.
    caches: from `prefill`.
    lengths: int32 [I], lengths of the prompts.
    starts: int32 [I], their offsets within the R T tokens of the pack.
    sources: int32 [J], the prompt that each joining sample continues.
    rows: int32 [J], the row that it goes to; B drops it.
    keys: uint32 [J, 2], random keys.
    temperatures: float32 [J].
    allowed: see `draws.sample`.
    static: see `Static`.
  """
  rest = {name: value for name, value in state.items() if name != "caches"}
  started = _start(rest, logits, lengths, sources, rows, keys, temperatures, allowed, static=static)
  layers = state["caches"]
  for i, new in enumerate(caches):  # layer by layer, because XLA copies all caches that one program writes to
    layers[i] = _join(layers[i], new, starts, sources, rows, static=static)
  return {**started, "caches": layers}


@functools.partial(jax.jit, static_argnames="static", donate_argnames="state")
def _start(state: State, logits: jax.Array, lengths: jax.Array, sources: jax.Array, rows: jax.Array, keys: jax.Array,
           temperatures: jax.Array, allowed: jax.Array, *, static: Static) -> State:
  """Draws the first tokens of rows; returns the state without its caches."""
  first = sample(logits[sources], keys, jnp.zeros_like(rows), temperatures, allowed, top_p=static.top_p,
                 greedy=static.greedy)
  done = _is_end(first, static) | (state["tokens"].shape[1] == 1)
  values = {"used": lengths[sources], "last": first, "count": jnp.ones_like(rows), "done": done, "keys": keys,
            "temperatures": temperatures}
  new = {name: state[name].at[rows].set(value, mode="drop") for name, value in values.items()}
  return _constrain({**new, "tokens": state["tokens"].at[rows, 0].set(first, mode="drop")}, static)


@functools.partial(jax.jit, static_argnames="static", donate_argnames="layer")
def _join(layer: LayerCache, new: LayerCache, starts: jax.Array, sources: jax.Array, rows: jax.Array, *, static: Static,
          ) -> LayerCache:
  total, slots = new[0].shape[2], min(new[0].shape[2], layer[1].shape[2])
  row, first = starts[sources] // total, starts[sources] % total
  # Slots beyond a prompt's end get padding or another prompt's tokens, but are overwritten before they are attended to.
  positions = jnp.minimum(first[:, None] + jnp.arange(slots), total - 1)

  def put(cache: jax.Array, new: jax.Array, columns: bool) -> jax.Array:
    if static.mesh is not None:  # rows may go anywhere
      new = jax.lax.with_sharding_constraint(new, NamedSharding(static.mesh, P(None, "tensor")))
    gathered = new[row[:, None], :, positions]  # [J, slots, K, h]
    gathered = jnp.moveaxis(gathered, 1, 3) if columns else gathered.swapaxes(1, 2)
    where = (rows, slice(None), slice(None), slice(slots)) if columns else (rows, slice(None), slice(slots))
    return scatter(cache, lambda old, new: old.at[where].set(new, mode="drop"), gathered)

  joined = put(layer[0], new[0], static.kernel == "columns"), put(layer[1], new[1], False)
  return _constrain({"caches": joined}, static)["caches"]


def shrink(state: State, rows: jax.Array, done: jax.Array, *, static: Static) -> State:
  """Returns the state with only the given rows [B'], of which those in `done` [B'] are marked as free."""
  caches = state["caches"]
  for i, layer in enumerate(caches):  # as in `grow`
    caches[i] = _take_rows({"caches": layer}, rows, static=static)["caches"]
  rest = _take_rows({name: value for name, value in state.items() if name != "caches"}, rows, static=static)
  return {**rest, "done": rest["done"] | done, "caches": caches}


@functools.partial(jax.jit, static_argnames="static")
def _take_rows(arrays: dict[str, Any], rows: jax.Array, *, static: Static) -> dict[str, Any]:
  return _constrain(jax.tree.map(lambda x: jnp.take(x, rows, axis=0), arrays), static)


def grow(state: State, slots: int, *, columns: bool = False) -> State:
  """Grows the caches to at least `slots` slots per row; `columns` tells that keys have the layout of that kernel."""
  caches = state["caches"]
  if caches[0][1].shape[2] < slots:
    for i, layer in enumerate(caches):  # layer by layer, so that only one exists twice at a time
      caches[i] = _widen(layer, slots=slots, columns=columns)
  return state


@functools.partial(jax.jit, static_argnames=("slots", "columns"))
def _widen(layer: LayerCache, *, slots: int, columns: bool) -> LayerCache:
  padding, none = (0, slots - layer[1].shape[2]), (0, 0)
  return (jnp.pad(layer[0], (none, none, none, padding) if columns else (none, none, padding, none)),
          jnp.pad(layer[1], (none, none, padding, none)))


@functools.partial(jax.jit, static_argnames="static", donate_argnames="state")
def decode(params: Params, prefix: Prefix, state: State, stopped: jax.Array, steps: jax.Array, max_done: jax.Array,
           allowed: jax.Array, *, static: Static) -> State:
  """Extends all rows except `stopped` [B] by at most `steps` tokens, until at least `max_done` rows are done."""
  body = lambda carry: (carry[0] + 1, extend(params, prefix, carry[1], allowed, static=static))
  running = lambda carry: (carry[0] < steps) & (jnp.sum(carry[1]["done"]) < max_done)
  state = state | {"done": state["done"] | stopped}
  return jax.lax.while_loop(running, body, (jnp.int32(0), state))[1]


def extend(params: Params, prefix: Prefix, state: State, allowed: jax.Array, *, static: Static) -> State:
  """Extends the state by one token; the draws of rows that are done are discarded."""
  rows, new_tokens = jnp.arange(state["done"].shape[0]), state["tokens"].shape[1]
  logits, caches = bind(static.config, params, scan=False).decode(
      state["last"], used=state["used"], caches=state["caches"], prefix=prefix, compute_dtype=static.dtype,
      kernel=static.kernel, mesh=static.mesh)
  token = sample(logits, state["keys"], state["count"], state["temperatures"], allowed, top_p=static.top_p,
                 greedy=static.greedy)
  running = ~state["done"]
  count = state["count"] + running
  tokens = state["tokens"].at[rows, jnp.where(running, state["count"], new_tokens)].set(token, mode="drop")
  return _constrain(state | {
      "caches": caches, "tokens": tokens, "count": count, "last": jnp.where(running, token, state["last"]),
      "used": state["used"] + running, "done": state["done"] | _is_end(token, static) | (count >= new_tokens)}, static)


def _constrain(arrays: State, static: Static) -> State:
  """Constrains the caches to be split over the mesh, and everything else to be replicated."""
  if static.mesh is None:
    return arrays
  everywhere = NamedSharding(static.mesh, P())
  where = lambda name, x: cache_sharding(static.mesh, x.shape[0]) if name == "caches" else everywhere
  return {name: jax.tree.map(lambda x, n=name: jax.lax.with_sharding_constraint(x, where(n, x)), value)
          for name, value in arrays.items()}


def _is_end(tokens: jax.Array, static: Static) -> jax.Array:
  """Returns whether each token ends its sample: an end token, or what `draws.sample` returns for broken logits."""
  return jnp.isin(tokens, jnp.array((-1, *static.ends), jnp.int32))
