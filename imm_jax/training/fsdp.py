"""Fully sharded data parallelism (ZeRO-3) with explicit collectives.

Each device stores a shard of every weight. A layer is all-gathered in the compute dtype when it is used, and again in
the backward pass; its gradient is reduce-scattered in float32, so that no device ever holds a whole gradient. XLA's
partitioner would choose all-reduces instead, or matrix products cut into slivers that travel around a ring.

The `tensor` axis, which splits the products themselves, is left to the partitioner: `constrained` only states the
sharding of the weights in use.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from imm_jax.model import sharding
from imm_jax.model.decoder import Layer, Params

# (path of a parameter, its stored shard) -> the parameter as it is used
Gather = Callable[[str, jax.Array], jax.Array]
_ROWS = ("data", "fsdp")


def map_gradients(gradients: Callable[..., tuple[Any, Params, Any]], params: Params, batch: dict[str, jax.Array],
                  sums: Params | None = None, frozen: Mapping[str, Params] = MappingProxyType({}), *, mesh: Mesh,
                  dtype: jnp.dtype) -> tuple[jax.Array, Params, dict[str, jax.Array]]:
  """Runs `gradients` on each device's rows and sums the results over devices.

  Args:
    gradients: function (params, batch, sums, frozen, gather=, add_up=) -> (loss, gradients added to `sums`, numbers
      that are equal on all devices). It gets a device's shards of `params`, `sums` and `frozen`, its rows, a function
      that gathers a parameter, and one that sums a number over devices.
    params: sharded by `sharding.param_sharding`.
    batch: rows split over `data` and `fsdp`.
    sums: tree that the gradients are added to, sharded like the parameters; None for zeros.
    frozen: trees of parameters that are used but not trained, sharded like parameters of the same paths.
    mesh: has a `tensor` axis of 1.
    dtype: dtype in which weights are gathered.

  Returns:
    The sum of the losses, the sum of the gradients (sharded like the parameters), and the numbers.
  """
  get_specs = lambda tree: jax.tree_util.tree_map_with_path(
      lambda path, leaf: sharding.param_sharding(mesh, sharding.path_name(path), leaf.shape).spec, tree)
  frozen = dict(frozen)
  specs, frozen_specs = get_specs(params), {name: get_specs(tree) for name, tree in frozen.items()}
  split_axes = {sharding.path_name(path): _axis(spec) for tree in (specs, *frozen_specs.values())
                for path, spec in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, P))}
  # Mesh axes over which a gradient still has to be summed after the reduce-scatter.
  unsummed_axes = lambda axis: _ROWS if axis is None else ("data",)

  def gather(path: str, part: jax.Array) -> jax.Array:
    axis = split_axes[path]
    if sums is not None:  # `sums` are totals over all devices, so a layer's gradient must be summed before it is added
      part = _sum_gradient(part, unsummed_axes(axis))
    # The weights of a single layer lack the leading axis on which layers are stacked.
    return part if axis is None else _gather(part, dtype, axis - path.startswith("layers."))

  def run_on_device(params: Params, batch: dict[str, jax.Array], sums: Params | None, frozen: Mapping[str, Params],
                    ) -> tuple[jax.Array, Params, dict[str, jax.Array]]:
    loss, grads, numbers = gradients(params, batch, sums, frozen, gather=gather,
                                     add_up=lambda x: jax.lax.psum(x, _ROWS))
    if sums is None:
      grads = jax.tree.map(lambda spec, g: jax.lax.psum(g, unsummed_axes(_axis(spec))), specs, grads,
                           is_leaf=lambda x: isinstance(x, P))
    return jax.lax.psum(loss, _ROWS), grads, numbers

  # check_vma=False: nothing is differentiated across this boundary, so JAX need not track which axes values vary over.
  in_specs = (specs, sharding.BATCH, specs if sums is not None else None, frozen_specs)
  return jax.shard_map(run_on_device, mesh=mesh, in_specs=in_specs, out_specs=(P(), specs, P()), check_vma=False)(
      params, batch, sums, frozen)


def gather_layer(gather: Gather, layer: Layer) -> Layer:
  """Returns a layer with all its weights gathered."""
  name = lambda path: ".".join(["layers", *(key.name for key in path if key.name != "value")])
  return jax.tree_util.tree_map_with_path(lambda path, leaf: gather(name(path), leaf), layer)


def constrained(mesh: Mesh, dtype: jnp.dtype) -> Gather:
  """Returns a `Gather` that works by sharding constraints on a parameter and on its gradient, for XLA to satisfy."""

  def gather(path: str, part: jax.Array) -> jax.Array:
    path = path.replace("layers.", "layers.0.")
    return _constrain(part, dtype, NamedSharding(mesh, sharding.gathered_spec(path)),
                      sharding.param_sharding(mesh, path, part.shape))

  return gather


def _axis(spec: P) -> int | None:
  """Returns the axis of a parameter that `fsdp` splits, or None."""
  return next((i for i, axes in enumerate(spec) if axes == "fsdp" or "fsdp" in (axes or ())), None)


# `_gather` and `_constrain` cast back to float32 after communicating in the compute dtype. The cast is free, as the
# next one undoes it, and it makes the gradient arrive in float32 instead of being rounded before the sum.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(part: jax.Array, dtype: jnp.dtype, axis: int) -> jax.Array:
  return jax.lax.all_gather(part.astype(dtype), "fsdp", axis=axis, tiled=True).astype(part.dtype)


_gather.defvjp(lambda part, dtype, axis: (_gather(part, dtype, axis), None),
               lambda dtype, axis, _, g: (jax.lax.psum_scatter(g, "fsdp", scatter_dimension=axis, tiled=True),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _constrain(part: jax.Array, dtype: jnp.dtype, used: NamedSharding, stored: NamedSharding) -> jax.Array:
  return jax.lax.with_sharding_constraint(part.astype(dtype), used).astype(part.dtype)


_constrain.defvjp(lambda part, dtype, used, stored: (_constrain(part, dtype, used, stored), None),
                  lambda dtype, used, stored, _, g: (jax.lax.with_sharding_constraint(g, stored),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum_gradient(part: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Returns `part` unchanged; sums its gradient over `axes`."""
  del axes
  return part


_sum_gradient.defvjp(lambda part, axes: (part, None), lambda axes, _, g: (jax.lax.psum(g, axes),))
