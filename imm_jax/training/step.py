"""The loss, the optimizer, and one training step."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from imm_jax.model import attention as attention_lib, sharding
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Layer, Params, abstract_params, bind
from imm_jax.training import fsdp, lora
from imm_jax.training.additions import PLAIN, Additions, follow, pull
from imm_jax.training.loss import anchored_loss, chunk_of, head_loss

# Has XLA gather weights and add up gradients on a TPU while it computes, one weight at a time. Left alone it collects a
# layer's gradients and sends them when nothing else runs; benchmarks/README.md says what that takes.
_TPU_OPTIONS = {"xla_enable_async_all_gather": "true",
                "xla_enable_async_all_reduce": "true",
                "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
                "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
                "xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions": "true",
                "xla_jf_crs_combiner_threshold_in_bytes": "0"}

# params: float32 master weights; opt_state: optax's, which also counts the steps; halted: whether a loss or a gradient
# was not finite, after which nothing changes any more. With additions: average, of the weights; frozen: weights that
# are used and stay as they are, by what they are for (`base`, that LoRA adds to, `anchor`).
TrainState = dict[str, Any]
Metrics = dict[str, jax.Array]
Frozen = Mapping[str, Params]
_STATE = ("params", "opt_state", "halted", "average", "frozen", "base", "anchor")
_NONE: Frozen = MappingProxyType({})


def token_losses(config: ModelConfig, params: Params, batch: dict[str, jax.Array], *, chunk: int = 0,
                 frozen: Frozen = _NONE, additions: Additions = PLAIN, **options: Any,
                 ) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of -log p over the learned tokens of a packed batch, and of what is added to it; and what it is made of.

  Args:
    config: of the model.
    params: parameters with stacked layers.
    batch: see `packing.PackedBatches`.
    chunk: see `loss.head_loss`; 0 for `loss.chunk_of` a device's rows.
    frozen: of the state.
    additions: of which `kl` and `lora` count here.
    **options: of `head_inputs`.

  Returns:
    The sum, and `tokens`, the number of learned ones, with `additions.kl` also `kl`, the sum of the KL of each: float32
    scalars.
  """
  if additions.lora:
    inputs = head_inputs(config, frozen["base"], batch, adapters=params, adding=additions.lora, **options)
  else:
    inputs = head_inputs(config, params, batch, **options)
  x, head, targets, weights = inputs
  # Two models' logits, and what is made of them, at half as many positions take the memory of one's.
  chunk = chunk or chunk_of((2 if additions.kl else 1) * rows_of_device(x.shape[0], options.get("mesh")))
  tokens = {"tokens": jnp.sum(weights)}
  if not additions.kl:
    return head_loss(x, head, targets, weights, chunk), tokens
  # Nothing of it is kept for a backward pass, for there is none.
  base = jax.lax.stop_gradient(head_inputs(config, frozen["anchor"], batch, **options | {"remat": "none"})[:2])
  loss, kl = anchored_loss(x, head, *base, targets, weights, chunk, additions.kl)
  return loss, tokens | {"kl": kl}


def rows_of_device(rows: int, mesh: Mesh | None) -> int:
  """How many of the rows of a batch a device has, where the mesh splits them; None means that it has them all."""
  return -(-rows // sharding.num_batch_shards(mesh)) if mesh is not None else rows


def head_inputs(config: ModelConfig, params: Params, batch: dict[str, jax.Array], *, attention: str = "xla",
                mesh: Mesh | None = None, **options: Any) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """What a loss over the next tokens of a packed batch is computed from.

  Args:
    config: of the model.
    params: parameters with stacked layers.
    batch: see `packing.PackedBatches`.
    attention: what `attention.choose_backend` gave.
    mesh: as in `hidden_states`.
    **options: of `hidden_states`.

  Returns:
    What the head reads [B, T, D] in the compute dtype, the head's weight [V, D], the next token at each position int32
    [B, T], and float32 [B, T], 1 where that token is learned.
  """
  attend = attention_lib.packed(batch["segment_ids"], backend=attention, mesh=mesh)
  x, head = hidden_states(config, params, batch["tokens"], batch["positions"], attend=attend, mesh=mesh, **options)
  # Token t+1 is predicted at t; a segment's first token is never learned, so no loss crosses segments.
  targets, weights = (jnp.pad(batch[name][:, 1:], ((0, 0), (0, 1))) for name in ("tokens", "weights"))
  return x, head, targets, weights


def hidden_states(config: ModelConfig, params: Params, tokens: jax.Array, positions: jax.Array, *,
                  attend: attention_lib.Attend, compute_dtype: jnp.dtype, remat: str = "none",
                  mesh: Mesh | None = None, gather: fsdp.Gather | None = None, adapters: Params | None = None,
                  adding: lora.Lora | None = None) -> tuple[jax.Array, jax.Array]:
  """What the head reads [B, T, D] in the compute dtype, and its weight [V, D].

  Args:
    config: of the model.
    params: parameters with stacked layers.
    tokens: int32 [B, T].
    positions: int32 [B, T], of each token in its own text.
    attend: who sees whom.
    compute_dtype: dtype of products.
    remat: one of `decoder.REMAT`.
    mesh: where rows stay; None where this runs on one device's rows.
    gather: gives a parameter as it is used: the layers' one by one, the others at the start.
    adapters: see `lora.init`; they are added to the layers' weights.
    adding: what the adapters are.
  """
  hooks: dict[str, Any] = {}
  if gather is not None:
    params = {name: tree if name == "layers" else {"weight": gather(f"{name}.weight", tree["weight"])}
              for name, tree in params.items()}
    hooks["transform_layer"] = functools.partial(fsdp.gather_layer, gather)
  if adapters is not None:
    hooks |= {"transform_layer": functools.partial(_adapted, adding, gather), "extra_params": adapters["layers"]}
  if mesh is not None:
    hooks["constrain"] = lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, sharding.BATCH))
  model = bind(config, params)
  x = model.hidden(tokens, positions=positions, attend=attend, compute_dtype=compute_dtype, remat=remat, **hooks)
  return x, model.head


def _adapted(settings: lora.Lora, gather: fsdp.Gather | None, layer: Layer, adapters: Params) -> Layer:
  """A layer with W + s B A for each W that has adapters."""
  if gather is not None:
    layer = fsdp.gather_layer(gather, layer)
    adapters = jax.tree_util.tree_map_with_path(
        lambda path, leaf: gather(f"layers.{sharding.path_name(path)}", leaf), adapters)
  return lora.add(layer, adapters, settings)


def make_schedule(kind: str, *, peak: float, total_steps: int, warmup_ratio: float) -> optax.Schedule:
  """Learning rate by step: linear warm-up from 0, then `cosine` or `linear` decay to 0, or `constant`.

  The warm-up leaves at least one step at the peak, so that the shortest training trains.

  >>> schedule = make_schedule("cosine", peak=1.0, total_steps=100, warmup_ratio=0.1)
  >>> float(schedule(5)), float(schedule(10)), round(float(schedule(55)), 3)
  (0.5, 1.0, 0.5)
  """
  warmup = min(max(1, round(total_steps * warmup_ratio)), total_steps - 1) if warmup_ratio > 0 else 0
  decay = {"cosine": optax.cosine_decay_schedule(peak, max(1, total_steps - warmup)),
           "linear": optax.linear_schedule(peak, 0.0, max(1, total_steps - warmup)),
           "constant": optax.constant_schedule(peak)}[kind]
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup]) if warmup else decay


def make_optimizer(schedule: optax.Schedule, *, weight_decay: float, grad_clip: float,
                   transform: optax.GradientTransformation | None = None) -> optax.GradientTransformation:
  """AdamW (b1 0.9, b2 0.999, eps 1e-8) after clipping the gradient's global norm; `grad_clip` 0 does not clip.

  `transform` changes the update that AdamW gives, weight decay and learning rate included.
  """
  clip = _clip(grad_clip) if grad_clip else optax.identity()
  return optax.chain(clip, _adamw(schedule, weight_decay), *([transform] if transform else []))


def _clip(largest: float) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm`, which divides entry by entry and so has XLA keep a second gradient."""

  def clip(grads: Params, _: Params | None) -> Params:
    norm = optax.tree.norm(grads)
    scale = jnp.where(norm < largest, 1.0, largest / norm)
    return jax.tree.map(lambda g: g * scale, grads)

  return optax.stateless(clip)


def _adamw(schedule: optax.Schedule, weight_decay: float, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
           ) -> optax.GradientTransformationExtraArgs:
  """`optax.adamw` with the same state, whose moments are updated in place; `halted` in `update` keeps the state.

  The moments are finished before the update reads them. Left to itself XLA computes them twice, once for the update,
  and keeps a copy of both old ones for that: on CPU twice the parameters' memory.
  """
  moments, after = optax.scale_by_adam(b1, b2, eps), optax.chain(
      optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(schedule))

  def update(grads: Params, state: Any, params: Params | None = None, *, halted: jax.Array | bool = False,
             **_: Any) -> tuple[Params, Any]:
    first, *rest = state
    keep = lambda old, new: jax.tree.map(lambda o, n: jnp.where(halted, o, n), old, new)
    first = jax.lax.optimization_barrier(keep(first, moments.update(grads, first)[1]))
    means = (optax.tree.bias_correction(m, b, first.count) for m, b in ((first.mu, b1), (first.nu, b2)))
    updates, new = after.update(jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), *means), tuple(rest), params)
    return updates, (first, *keep(tuple(rest), new))

  return optax.GradientTransformationExtraArgs(lambda params: (moments.init(params), *after.init(params)), update)


def state_sharding(state: Any, mesh: Mesh) -> Any:
  """Where a state lies: its parameters, and moments where their parameters lie; the rest is whole everywhere."""

  def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    name = sharding.path_name([key for key in path if getattr(key, "key", None) not in _STATE])
    return sharding.param_sharding(mesh, name, leaf.shape) if name else NamedSharding(mesh, P())

  return jax.tree_util.tree_map_with_path(place, state)


def init_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh, *,
               additions: Additions = PLAIN, frozen: Frozen = _NONE) -> TrainState:
  """The first state, which takes the parameters and what is frozen over; moments lie where their parameters lie."""
  params = jax.tree.map(own, params)
  shardings = state_sharding(jax.eval_shape(optimizer.init, params), mesh)
  state = {"params": params, "opt_state": jax.jit(optimizer.init, out_shardings=shardings)(params),
           "halted": not_halted(mesh)}
  state |= {"average": jax.tree.map(jnp.copy, params)} if additions.ema else {}
  return state | ({"frozen": jax.tree.map(own, dict(frozen))} if frozen else {})


def own(leaf: jax.Array) -> jax.Array:
  """The array in memory of XLA's: on CPU a loaded one is numpy's, which the first step would copy, not write to."""
  if next(iter(leaf.devices())).platform != "cpu":
    return leaf
  own = jax.block_until_ready(jnp.copy(leaf))
  leaf.delete()
  return own


def not_halted(mesh: Mesh) -> jax.Array:
  """The flag of a state that training goes on from."""
  return jax.jit(lambda: jnp.zeros((), bool), out_shardings=NamedSharding(mesh, P()))()


def abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, *,
                   additions: Additions = PLAIN, frozen_dtype: jnp.dtype = jnp.bfloat16) -> TrainState:
  """Shapes, dtypes and shardings of a model's training state, without allocating any."""
  params = lora.abstract(config, additions.lora) if additions.lora else abstract_params(config)
  state = {"params": params, "opt_state": jax.eval_shape(optimizer.init, params),
           "halted": jax.ShapeDtypeStruct((), bool)}
  state |= {"average": params} if additions.ema else {}
  names = ["base"] * bool(additions.lora) + ["anchor"] * additions.anchored
  state |= {"frozen": {name: abstract_params(config, dtype=frozen_dtype) for name in names}} if names else {}
  return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), state,
                      state_sharding(state, mesh))


def make_train_step(*args: Any, **options: Any) -> Callable[[TrainState, dict[str, jax.Array]],
                                                            tuple[TrainState, Metrics]]:
  """`step_function` jitted, compiled at the first call."""
  step = step_function(*args, **options)
  compiled = None

  def run(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
    nonlocal compiled
    compiled = compiled or jit_step(step, state)
    return compiled(state, batch)

  return run


def jit_step(step: Callable[..., tuple[TrainState, Metrics]], state: TrainState) -> jax.stages.Wrapped:
  """Jits a step that donates its state; `state` may be shapes with shardings.

  The new state lies where the old one lay; left to itself XLA moves some, and the second step compiles again.
  """
  where = jax.tree.map(lambda leaf: leaf.sharding, state)
  platform = next(iter(jax.tree.leaves(where)[0].device_set)).platform
  return jax.jit(step, donate_argnums=0, out_shardings=(where, None),
                 compiler_options=_TPU_OPTIONS if platform == "tpu" else None)


def gradient_function(config: ModelConfig, *, compute_dtype: jnp.dtype, accumulation: int = 1, remat: str = "none",
                      attention: str = "xla", mesh: Mesh | None = None, chunk: int = 0, mean: bool = True,
                      additions: Additions = PLAIN,
                      ) -> Callable[..., tuple[jax.Array, Params, dict[str, jax.Array]]]:
  """A function (params, batch, sums=None, frozen={}) -> (loss, its gradient, numbers), to be jitted.

  The loss is the mean over the learned tokens of the whole batch, or with `mean=False` their sum; with `accumulation`
  the batch runs in that many parts, which gives the same gradient. The gradient lies where the parameters lie. Where
  `sums` is given, a tree of that form, the gradient is added to it layer by layer, as the backward pass comes to them:
  where the caller donates it, there is no second tree. Over the `data` axis each part of a batch is then added up.
  Numbers: `tokens`, how many are learned; with `additions.kl`, which is then part of the loss, also `kl`, its mean (or
  sum). Of `additions` this and `lora` count, whose gradient is that of the adapters; `frozen` is the state's.
  """
  options = {"compute_dtype": compute_dtype, "remat": remat, "attention": attention, "chunk": chunk,
             "additions": additions}

  def gradients(params: Params, batch: dict[str, jax.Array], sums: Params | None = None, frozen: Frozen = _NONE, *,
                gather: fsdp.Gather | None = None, add_up: Callable[[jax.Array], jax.Array] = lambda x: x,
                mesh: Mesh | None = None) -> tuple[jax.Array, Params, dict[str, jax.Array]]:
    total = add_up(jnp.sum(batch["weights"][:, 1:]))

    def loss(params: Params, part: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
      summed, numbers = token_losses(config, params, part, mesh=mesh, gather=gather, frozen=frozen, **options)
      numbers = {name: value for name, value in numbers.items() if name != "tokens"}
      return jax.tree.map(lambda x: x / total if mean else x, (summed, numbers))

    def add(carry: tuple[Any, Params], part: dict[str, jax.Array]) -> tuple[tuple[Any, Params], None]:
      value, backward, numbers = jax.vjp(lambda params: loss(params, part), params, has_aux=True)
      refs = jax.tree.map(jax.new_ref, carry[1])
      backward.with_refs(refs)(jnp.ones_like(value))
      return (jax.tree.map(jnp.add, carry[0], (value, numbers)), jax.tree.map(jax.freeze, refs)), None

    def finish(found: tuple[jax.Array, dict[str, jax.Array]], grads: Params) -> tuple[jax.Array, Params, Any]:
      return found[0], grads, {"tokens": total} | jax.tree.map(add_up, found[1])

    if accumulation == 1 and sums is None:
      return finish(*jax.value_and_grad(loss, has_aux=True)(params, batch))
    parts = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)
    none = (jnp.zeros(()), {"kl": jnp.zeros(())} if additions.kl else {})
    first = (none, jax.tree.map(jnp.zeros_like, params) if sums is None else sums)
    return finish(*jax.lax.scan(add, first, parts)[0])

  if mesh is None or mesh.size == 1:
    return gradients
  if mesh.shape["tensor"] == 1:
    return functools.partial(fsdp.map_gradients, gradients, mesh=mesh, dtype=compute_dtype)
  return functools.partial(gradients, gather=fsdp.constrained(mesh, compute_dtype), mesh=mesh)


def step_function(config: ModelConfig, optimizer: optax.GradientTransformation, *,
                  additions: Additions = PLAIN, **options: Any,
                  ) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
  """A step (state, batch) -> (state, metrics), to be jitted; `options` are those of `gradient_function`.

  `optimizer` is one of `make_optimizer`'s, which keeps its state where it is told to halt. A step whose loss or
  gradient is not finite changes nothing, and neither do the steps after it. Metrics: `loss` (with what is added to it),
  `grad_norm` (before clipping), `tokens` (learned ones), and the parts of the loss that are added: `kl` (not yet
  weighted), `l2_sp`.
  """
  gradients = gradient_function(config, additions=additions, **options)

  def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
    params = state["params"]
    loss, grads, numbers = gradients(params, batch, None, state.get("frozen", {}))
    if additions.l2_sp:
      numbers["l2_sp"], grads = pull(params, state["frozen"]["anchor"], additions.l2_sp, grads)
      loss += numbers["l2_sp"]
    norm = optax.tree.norm(grads)
    # The host looks at the loss now and then; until it does, the last good state stays.
    halted = state["halted"] | ~jnp.isfinite(loss) | ~jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state["opt_state"], params, halted=halted)
    new = jax.tree.map(lambda n, old: jnp.where(halted, old, n), optax.apply_updates(params, updates), params)
    changed = {"params": new, "opt_state": opt_state, "halted": halted}
    if additions.ema:
      average = follow(state["average"], new, additions.ema)
      changed["average"] = jax.tree.map(lambda a, old: jnp.where(halted, old, a), average, state["average"])
    return state | changed, {"loss": loss, "grad_norm": norm, **numbers}

  return step
