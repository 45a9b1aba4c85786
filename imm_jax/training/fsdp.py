"""Fully sharded data parallelism (ZeRO-3) written out: who holds, gathers and adds up what.

A device holds a part of each weight. It gathers a layer in the compute dtype when it uses it, again in the backward
pass, and of its gradient keeps the sum of its own part: gradients are float32, scattered as they are added, and never
whole. Left to XLA's partitioner they become all-reduces, or products cut into slivers that travel around a ring.

The `tensor` axis, which splits the products themselves, is left to the partitioner: `constrained` says where weights
lie when they are used, and the rest follows.
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

# (path of a parameter, the part that is stored) -> the parameter as it is used
Gather = Callable[[str, jax.Array], jax.Array]
_ROWS = ("data", "fsdp")


def map_gradients(gradients: Callable[..., tuple[Any, Params, Any]], params: Params, batch: dict[str, jax.Array],
                  sums: Params | None = None, frozen: Mapping[str, Params] = MappingProxyType({}), *, mesh: Mesh,
                  dtype: jnp.dtype) -> tuple[jax.Array, Params, dict[str, jax.Array]]:
  """Runs `gradients` on every device's rows and adds up what comes out.

  Args:
    gradients: of (params, batch, sums, frozen, gather=, add_up=): a device's parts of the parameters, its rows, its
      parts of `sums` and of `frozen`, how to gather a parameter, how to add a number up over devices; gives (loss,
      gradients added to sums, numbers that are equal everywhere).
    params: placed by `sharding.param_sharding`.
    batch: rows split over `data` and `fsdp`.
    sums: what gradients are added to, placed as the parameters are; None for zeros.
    frozen: more trees of parameters, which are used and not trained, placed as those of the same paths are.
    mesh: with a `tensor` axis of 1.
    dtype: weights travel in it.

  Returns:
    (the sum of the losses, the sum of the gradients, placed as the parameters are, the numbers).
  """
  specs_of = lambda tree: jax.tree_util.tree_map_with_path(
      lambda path, leaf: sharding.param_sharding(mesh, sharding.path_name(path), leaf.shape).spec, tree)
  frozen = dict(frozen)
  specs, frozen_specs = specs_of(params), {name: specs_of(tree) for name, tree in frozen.items()}
  split = {sharding.path_name(path): _axis(spec) for tree in (specs, *frozen_specs.values())
           for path, spec in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, P))}
  # Over which devices a gradient is still to be added up once it is scattered.
  apart = lambda axis: _ROWS if axis is None else ("data",)

  def gather(path: str, part: jax.Array) -> jax.Array:
    axis = split[path]
    if sums is not None:  # they hold what all devices gave before, so each layer's gradient joins them added up
      part = _added_up(part, apart(axis))
    # A layer's own weights lack the axis that layers are stacked on.
    return part if axis is None else _gather(part, dtype, axis - path.startswith("layers."))

  def local(params: Params, batch: dict[str, jax.Array], sums: Params | None, frozen: Mapping[str, Params],
            ) -> tuple[jax.Array, Params, dict[str, jax.Array]]:
    loss, grads, numbers = gradients(params, batch, sums, frozen, gather=gather,
                                     add_up=lambda x: jax.lax.psum(x, _ROWS))
    if sums is None:
      grads = jax.tree.map(lambda spec, g: jax.lax.psum(g, apart(_axis(spec))), specs, grads,
                           is_leaf=lambda x: isinstance(x, P))
    return jax.lax.psum(loss, _ROWS), grads, numbers

  # Nothing is differentiated across the boundary, so nothing need be known about what varies over which axis.
  given = (specs, sharding.BATCH, specs if sums is not None else None, frozen_specs)
  return jax.shard_map(local, mesh=mesh, in_specs=given, out_specs=(P(), specs, P()), check_vma=False)(
      params, batch, sums, frozen)


def gather_layer(gather: Gather, layer: Layer) -> Layer:
  """A layer with its weights gathered."""
  name = lambda path: ".".join(["layers", *(key.name for key in path if key.name != "value")])
  return jax.tree_util.tree_map_with_path(lambda path, leaf: gather(name(path), leaf), layer)


def constrained(mesh: Mesh, dtype: jnp.dtype) -> Gather:
  """Gathers by constraint: XLA sees where a parameter has to lie, and where its gradient."""

  def gather(path: str, part: jax.Array) -> jax.Array:
    path = path.replace("layers.", "layers.0.")
    return _constrain(part, dtype, NamedSharding(mesh, sharding.gathered_spec(path)),
                      sharding.param_sharding(mesh, path, part.shape))

  return gather


def _axis(spec: P) -> int | None:
  """Which axis of a parameter `fsdp` splits."""
  return next((i for i, axes in enumerate(spec) if axes == "fsdp" or "fsdp" in (axes or ())), None)


# `_gather` and `_constrain` say float32 of what has travelled in the compute dtype: the cast back costs nothing, for
# the next one undoes it, and with it the gradient arrives in float32, not rounded before it is added up.
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
def _added_up(part: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """The part itself; its gradient is the sum over these axes."""
  del axes
  return part


_added_up.defvjp(lambda part, axes: (part, None), lambda axes, _, g: (jax.lax.psum(g, axes),))
