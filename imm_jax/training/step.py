"""The loss, the training state, and one training step."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from imm_jax.model import attention as attention_lib, sharding
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Layer, Params, abstract_params, bind
from imm_jax.training import fsdp, lora
from imm_jax.training.additions import PLAIN, Additions, add_l2_sp, update_average
from imm_jax.training.computation import Computation
from imm_jax.training.loss import anchored_loss, choose_chunk, head_loss

# Makes XLA overlap gathering of weights and summing of gradients with computation on TPUs, one weight at a time. By
# default it combines a layer's gradients and sends them when nothing else runs; benchmarks/README.md has the cost.
_TPU_OPTIONS = {"xla_enable_async_all_gather": "true",
                "xla_enable_async_all_reduce": "true",
                "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
                "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
                "xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions": "true",
                "xla_jf_crs_combiner_threshold_in_bytes": "0"}

# params: float32 master weights; opt_state: optax's state, which also counts the steps; halted: whether a loss or
# gradient was not finite, after which the state no longer changes. With additions also average: the weights' moving
# average; frozen: weights that are used but not trained, by role (`base`, which LoRA adapts, and `anchor`).
TrainState = dict[str, Any]
Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, dict[str, jax.Array], Any], tuple[TrainState, Metrics]]
Frozen = Mapping[str, Params]
_STATE = ("params", "opt_state", "halted", "average", "frozen", "base", "anchor")
_NO_FROZEN: Frozen = MappingProxyType({})


def token_losses(config: ModelConfig, params: Params, batch: dict[str, jax.Array], *, chunk: int = 0,
                 frozen: Frozen = _NO_FROZEN, additions: Additions = PLAIN, **options: Any,
                 ) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sums -log p over the learned tokens of a packed batch, plus the weighted KL to the base if `additions.kl`.

  Args:
    config: model config.
    params: parameters with stacked layers.
    batch: see `packing.PackedBatches`.
    chunk: see `loss.head_loss`; 0 chooses `loss.choose_chunk` a device's rows.
    frozen: the state's frozen weights.
    additions: only `kl` and `lora` matter here.
    **options: passed on to `head_inputs`.

  Returns:
    The sum, and a dict of `tokens`, the number of learned tokens, and with `additions.kl` also `kl`, the sum of their
    KLs: float32 scalars.
  """
  if additions.lora:
    inputs = head_inputs(config, frozen["base"], batch, adapters=params, lora_config=additions.lora, **options)
  else:
    inputs = head_inputs(config, params, batch, **options)
  x, head, targets, loss_mask = inputs
  # Half the positions, so that the logits of two models take as much memory as those of one.
  chunk = chunk or choose_chunk((2 if additions.kl else 1) * count_device_rows(x.shape[0], options.get("mesh")))
  tokens = {"tokens": jnp.sum(loss_mask)}
  if not additions.kl:
    return head_loss(x, head, targets, loss_mask, chunk), tokens
  # The base model has no backward pass, hence nothing to rematerialize.
  base = jax.lax.stop_gradient(head_inputs(config, frozen["anchor"], batch, **options | {"remat": "none"})[:2])
  loss, kl = anchored_loss(x, head, *base, targets, loss_mask, chunk, additions.kl)
  return loss, tokens | {"kl": kl}


def forward_options(computation: Computation) -> dict[str, Any]:
  """Returns the arguments of `head_inputs` for a pass without gradients, which the partitioner splits over a mesh."""
  mesh, dtype = computation.mesh, computation.compute_dtype
  split = {"mesh": mesh, "gather": fsdp.constrained(mesh, dtype)} if mesh.size > 1 else {}
  return {"compute_dtype": dtype, "attention": computation.attention, **split}


def count_device_rows(rows: int, mesh: Mesh | None) -> int:
  """Returns how many of a batch's rows one device of the mesh has; without a mesh, all of them."""
  return -(-rows // sharding.num_batch_shards(mesh)) if mesh is not None else rows


def head_inputs(config: ModelConfig, params: Params, batch: dict[str, jax.Array], *, attention: str = "xla",
                mesh: Mesh | None = None, **options: Any) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Computes the inputs of a next-token loss on a packed batch.

  Args:
    config: model config.
    params: parameters with stacked layers.
    batch: see `packing.PackedBatches`.
    attention: backend, from `attention.choose_backend`.
    mesh: as in `hidden_states`.
    **options: passed on to `hidden_states`.

  Returns:
    The head's inputs [B, T, D] in the compute dtype, the head's weight [V, D], the next token at each position, int32
    [B, T], and the loss mask, float32 [B, T], 1 where that token is learned.
  """
  attend = attention_lib.packed(batch["segment_ids"], backend=attention, mesh=mesh)
  x, head = hidden_states(config, params, batch["tokens"], batch["positions"], attend=attend, mesh=mesh, **options)
  # Token t+1 is predicted at position t. A segment's first token has weight 0, so no prediction crosses segments.
  targets, loss_mask = (jnp.pad(batch[name][:, 1:], ((0, 0), (0, 1))) for name in ("tokens", "weights"))
  return x, head, targets, loss_mask


def hidden_states(config: ModelConfig, params: Params, tokens: jax.Array, positions: jax.Array, *,
                  attend: attention_lib.Attend, compute_dtype: jnp.dtype, remat: str = "none",
                  mesh: Mesh | None = None, gather: fsdp.Gather | None = None, adapters: Params | None = None,
                  lora_config: lora.Lora | None = None) -> tuple[jax.Array, jax.Array]:
  """Returns the head's inputs [B, T, D] in the compute dtype, and its weight [V, D].

  Args:
    config: model config.
    params: parameters with stacked layers.
    tokens: int32 [B, T].
    positions: int32 [B, T], of each token in its own text.
    attend: attention function.
    compute_dtype: dtype of matrix products.
    remat: one of `decoder.REMAT`.
    mesh: mesh over which the rows are split; None when this runs on the rows of one device.
    gather: gathers a parameter for use: layers one by one, the other parameters at the start.
    adapters: see `lora.init`; they are added to the layers' weights.
    lora_config: rank and alpha of the adapters.
  """
  hooks: dict[str, Any] = {}
  if gather is not None:
    params = {name: tree if name == "layers" else {"weight": gather(f"{name}.weight", tree["weight"])}
              for name, tree in params.items()}
    hooks["transform_layer"] = functools.partial(fsdp.gather_layer, gather)
  if adapters is not None:
    hooks |= {"transform_layer": functools.partial(_add_adapters, lora_config, gather),
              "extra_params": adapters["layers"]}
  if mesh is not None:
    hooks["constrain"] = lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, sharding.BATCH))
  model = bind(config, params)
  x = model.hidden(tokens, positions=positions, attend=attend, compute_dtype=compute_dtype, remat=remat, **hooks)
  return x, model.head


def _add_adapters(settings: lora.Lora, gather: fsdp.Gather | None, layer: Layer, adapters: Params) -> Layer:
  """Returns a layer, gathered if needed, with W + s B A for each W that has adapters."""
  if gather is not None:
    layer = fsdp.gather_layer(gather, layer)
    adapters = jax.tree_util.tree_map_with_path(
        lambda path, leaf: gather(f"layers.{sharding.path_name(path)}", leaf), adapters)
  return lora.add(layer, adapters, settings)


def state_sharding(state: Any, mesh: Mesh) -> Any:
  """Returns the shardings of a state: moments are sharded like their parameters, the rest is replicated."""

  def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    name = sharding.path_name([key for key in path if getattr(key, "key", None) not in _STATE])
    return sharding.param_sharding(mesh, name, leaf.shape) if name else NamedSharding(mesh, P())

  return jax.tree_util.tree_map_with_path(place, state)


def init_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh, *,
               additions: Additions = PLAIN, frozen: Frozen = _NO_FROZEN) -> TrainState:
  """Creates the initial state; takes ownership of `params` and `frozen`, and shards moments like their parameters."""
  params = place(params, mesh)
  shardings = state_sharding(jax.eval_shape(optimizer.init, params), mesh)
  state = {"params": params, "opt_state": jax.jit(optimizer.init, out_shardings=shardings)(params),
           "halted": halt_flag(mesh)}
  state |= {"average": jax.tree.map(jnp.copy, params)} if additions.ema else {}
  return state | ({"frozen": {role: place(weights, mesh) for role, weights in frozen.items()}} if frozen else {})


def place(params: Params, mesh: Mesh) -> Params:
  """Shards parameters over a mesh, in memory that XLA can donate; takes ownership of them.

  Those that are not on the mesh would make the second step, which gets the first one's results, compile again.
  """
  return jax.tree.map(lambda leaf, where: jax.device_put(to_xla_memory(leaf), where), params,
                      state_sharding(params, mesh))


def to_xla_memory(leaf: jax.Array) -> jax.Array:
  """Moves a CPU array out of numpy's memory, which XLA cannot donate and the first step would copy; deletes it."""
  if next(iter(leaf.devices())).platform != "cpu":
    return leaf
  copy = jax.block_until_ready(jnp.copy(leaf))
  leaf.delete()
  return copy


def halt_flag(mesh: Mesh) -> jax.Array:
  """Returns a false `halted` flag, replicated over the mesh."""
  return jax.jit(lambda: jnp.zeros((), bool), out_shardings=NamedSharding(mesh, P()))()


def abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, *,
                   additions: Additions = PLAIN, frozen_dtype: jnp.dtype = jnp.bfloat16) -> TrainState:
  """Returns the shapes, dtypes and shardings of a training state without allocating it."""
  params = lora.abstract(config, additions.lora) if additions.lora else abstract_params(config)
  state = {"params": params, "opt_state": jax.eval_shape(optimizer.init, params),
           "halted": jax.ShapeDtypeStruct((), bool)}
  state |= {"average": params} if additions.ema else {}
  names = ["base"] * bool(additions.lora) + ["anchor"] * additions.anchored
  state |= {"frozen": {name: abstract_params(config, dtype=frozen_dtype) for name in names}} if names else {}
  return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), state,
                      state_sharding(state, mesh))


def make_train_step(config: ModelConfig, optimizer: optax.GradientTransformation, computation: Computation, *,
                    additions: Additions = PLAIN, chunk: int = 0) -> Step:
  """Jits `step_function`; it compiles at the first call, when the state's shardings are known."""
  step = step_function(config, optimizer, computation, additions=additions, chunk=chunk)
  compiled = None

  def run(state: TrainState, batch: dict[str, jax.Array], learning_rate: float) -> tuple[TrainState, Metrics]:
    nonlocal compiled
    compiled = compiled or jit_step(step, state)
    return compiled(state, batch, np.float32(learning_rate))

  return run


def jit_step(step: Callable[..., tuple[Any, Any]], state: Any) -> jax.stages.Wrapped:
  """Jits a step that donates its state; `state` may be shapes with shardings.

  The new state keeps the shardings of the old one; otherwise XLA changes some, and the second step compiles again.
  """
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  platform = next(iter(jax.tree.leaves(shardings)[0].device_set)).platform
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None),
                 compiler_options=_TPU_OPTIONS if platform == "tpu" else None)


def gradient_function(config: ModelConfig, computation: Computation, *, chunk: int = 0, mean: bool = True,
                      additions: Additions = PLAIN,
                      ) -> Callable[..., tuple[jax.Array, Params, dict[str, jax.Array]]]:
  """Returns a function (params, batch, sums=None, frozen={}) -> (loss, gradient, numbers), to be jitted.

  The loss is the mean over the learned tokens of the whole batch, in however many parts that is run, or their sum with
  `mean=False`. The gradient is sharded like the parameters. If `sums`, a tree like the parameters, is given, the
  gradient is added to it layer by layer during the backward pass, which needs no second tree if the caller donates it;
  each part of a batch is then summed over the `data` axis. `numbers` holds `tokens`, the number of learned tokens, and
  with `additions.kl`, which is then part of the loss, also `kl`, its mean (or sum). With `additions.lora` the gradient
  is that of the adapters; other additions are ignored. `frozen` holds the state's frozen weights. `chunk` is that of
  `token_losses`.
  """
  mesh, accumulation = computation.mesh, computation.accumulation
  options = {"compute_dtype": computation.compute_dtype, "remat": computation.remat,
             "attention": computation.attention, "chunk": chunk, "additions": additions}

  def gradients(params: Params, batch: dict[str, jax.Array], sums: Params | None = None,
                frozen: Frozen = _NO_FROZEN, *, gather: fsdp.Gather | None = None,
                add_up: Callable[[jax.Array], jax.Array] = lambda x: x, mesh: Mesh | None = None,
                ) -> tuple[jax.Array, Params, dict[str, jax.Array]]:
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

    def finish(value: tuple[jax.Array, dict[str, jax.Array]], grads: Params) -> tuple[jax.Array, Params, Any]:
      return value[0], grads, {"tokens": total} | jax.tree.map(add_up, value[1])

    if accumulation == 1 and sums is None:
      return finish(*jax.value_and_grad(loss, has_aux=True)(params, batch))
    parts = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)
    zeros = (jnp.zeros(()), {"kl": jnp.zeros(())} if additions.kl else {})
    first = (zeros, jax.tree.map(jnp.zeros_like, params) if sums is None else sums)
    return finish(*jax.lax.scan(add, first, parts)[0])

  if mesh.size == 1:
    return gradients
  if mesh.shape["tensor"] == 1:
    return functools.partial(fsdp.map_gradients, gradients, mesh=mesh, dtype=computation.compute_dtype)
  return functools.partial(gradients, gather=fsdp.constrained(mesh, computation.compute_dtype), mesh=mesh)


def step_function(config: ModelConfig, optimizer: optax.GradientTransformation, computation: Computation, *,
                  additions: Additions = PLAIN, chunk: int = 0) -> Step:
  """Returns a step (state, batch, learning_rate) -> (state, metrics), to be jitted.

  A step whose loss or gradient is not finite changes nothing but the `halted` flag, and neither do later steps. The
  optimizer must come from `make_optimizer`, whose `update` takes `learning_rate` and `halted`. Metrics: `loss` (with
  additions), `grad_norm` (before clipping), `tokens` (learned ones), and the additions to the loss: `kl` (not yet
  weighted) and `l2_sp`.
  """
  gradients = gradient_function(config, computation, additions=additions, chunk=chunk)

  def step(state: TrainState, batch: dict[str, jax.Array], learning_rate: jax.Array) -> tuple[TrainState, Metrics]:
    params = state["params"]
    loss, grads, numbers = gradients(params, batch, None, state.get("frozen", {}))
    if additions.l2_sp:
      numbers["l2_sp"], grads = add_l2_sp(params, state["frozen"]["anchor"], additions.l2_sp, grads)
      loss += numbers["l2_sp"]
    norm = optax.tree.norm(grads)
    # The host only reads the loss every few steps; until then the last good state must survive.
    halted = state["halted"] | ~jnp.isfinite(loss) | ~jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state["opt_state"], params, learning_rate=learning_rate,
                                          halted=halted)
    new = jax.tree.map(lambda n, old: jnp.where(halted, old, n), optax.apply_updates(params, updates), params)
    changed = {"params": new, "opt_state": opt_state, "halted": halted}
    if additions.ema:
      average = update_average(state["average"], new, additions.ema)
      changed["average"] = jax.tree.map(lambda a, old: jnp.where(halted, old, a), average, state["average"])
    return state | changed, {"loss": loss, "grad_norm": norm, **numbers}

  return step
