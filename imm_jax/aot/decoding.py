"""Estimates the cost of sampling on a TPU slice that is not attached, by compiling a decoding step.

Each host of a slice samples its share of the questions on its own chips. On these, `tensor` shards weights and cache by
heads, and `data` shards rows; all sizes that divide the key/value heads are compared. As layers are alike, models of
two and four layers are compiled and the costs extrapolated.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from imm_jax.aot import costs, hlo, topology
from imm_jax.model import sharding
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import abstract_params
from imm_jax.sampling.native import decode, queue

# Numbers of layers that are compiled.
_FEW_LAYERS, _MORE_LAYERS = 2, 4
# Share of the memory bandwidth that a step is assumed to reach.
BANDWIDTH = 0.6
# Tokens of the shared prefix, and of a question.
_PREFIX, _QUESTION = 1024, 128
_GIB = 2**30


class Step(NamedTuple):
  """Costs of a decoding step on the chips of one host.

  Attributes:
    mesh: mesh over the host's chips.
    rows: rows that the host decodes at once.
    weights: bytes on a chip.
    cache: bytes on a chip, including the prefix.
    temporaries: bytes on a chip.
    collectives: (kind, number in a step, bytes in a step).
    links: seconds of collectives in a step.
    flops: FLOPs of a step on one chip.
  """

  mesh: Mesh
  rows: int
  weights: float
  cache: float
  temporaries: float
  collectives: tuple[tuple[str, int, float], ...]
  links: float
  flops: float

  def seconds(self, chip: topology.Chip) -> float:
    """Estimates a step's time: reading weights and cache at BANDWIDTH overlaps with products, but not collectives."""
    return max((self.weights + self.cache) / (BANDWIDTH * chip.hbm_rate), self.flops / chip.flops) + self.links

  def fits(self, chip: topology.Chip) -> bool:
    """Returns whether everything fits in a chip's memory."""
    return self.weights + self.cache + self.temporaries < chip.hbm


def host_slice(slice_: topology.Slice) -> topology.Slice:
  """Returns the chips of one host as a slice of their own; all hosts of a slice have equally many."""
  chips = [d for d in slice_.devices if d.process_index == slice_.devices[0].process_index]
  sizes = "x".join(str(len({d.coords[axis] for d in chips})) for axis in range(len(slice_.sizes)))
  return topology.describe_slice(f"{slice_.name.partition(':')[0]}:{sizes}")


def candidate_meshes(model: ModelConfig, devices: Sequence[jax.Device]) -> list[Mesh]:
  """Lists sampling's default mesh, then others whose `tensor` divides the key/value heads, largest first."""
  default = sharding.decoding_mesh(sharding.make_mesh(data=1, fsdp=1, tensor=-1, devices=devices), model.num_kv_heads)
  largest = math.gcd(model.num_kv_heads, len(devices))
  others = [Mesh(np.array(devices).reshape(-1, 1, n), sharding.AXES, axis_types=default.axis_types)
            for n in range(largest, 0, -1) if largest % n == 0]
  return [default, *(m for m in others if m.shape["tensor"] != default.shape["tensor"])]


def compile_decoding_step(model: ModelConfig, mesh: Mesh, slice_: topology.Slice, *, rows: int, new_tokens: int,
                          dtype: jnp.dtype) -> Step:
  """Compiles a decoding step for a mesh and extrapolates its costs to all layers."""
  few, more = (_compile_and_measure(model, mesh, slice_, layers, rows, new_tokens, dtype)
               for layers in (_FEW_LAYERS, _MORE_LAYERS))
  extrapolate = lambda few, more: few + (more - few) * (model.num_layers - _FEW_LAYERS) / (_MORE_LAYERS - _FEW_LAYERS)
  kinds = tuple((kind, round(extrapolate(few[3].get(kind, (0, 0.0))[0], count)),
                 extrapolate(few[3].get(kind, (0, 0.0))[1], size)) for kind, (count, size) in sorted(more[3].items()))
  return Step(mesh, rows, *(extrapolate(few[i], more[i]) for i in range(3)), kinds, extrapolate(few[4], more[4]),
              extrapolate(few[5], more[5]))


def _compile_and_measure(model: ModelConfig, mesh: Mesh, slice_: topology.Slice, layers: int, rows: int,
                         new_tokens: int, dtype: jnp.dtype) -> tuple:
  model = dataclasses.replace(model, num_layers=layers)
  static = decode.Static(model, dtype, (0,), 1.0, False, mesh)
  replicated = NamedSharding(mesh, P())
  params = _abstract_layer_list(model, mesh, dtype)
  slots = queue.most_slots(_QUESTION + new_tokens)
  state = jax.eval_shape(functools.partial(decode.init, rows, slots, new_tokens, static))
  caches = sharding.cache_sharding(mesh, rows)
  shardings = {name: caches if name == "caches" else replicated for name in state}
  state = {name: jax.tree.map(lambda x, sharding=shardings[name]: _with_sharding(x, sharding), leaf)
           for name, leaf in state.items()}
  prefix = jax.tree.map(lambda x: _with_sharding(x, NamedSharding(mesh, P("tensor")) if x.ndim else replicated),
                        jax.eval_shape(functools.partial(decode.no_prefix, _PREFIX, static)))
  allowed = jax.ShapeDtypeStruct((model.vocab_size,), bool, sharding=replicated)
  traced = jax.jit(decode.extend, static_argnames="static", donate_argnames="state").trace(
      params, prefix, state, allowed, static=static)
  with topology.quiet_libtpu():
    compiled = traced.lower().compile()
  module = hlo.Module(compiled.as_text())
  kinds: dict[str, tuple[int, float]] = collections.defaultdict(lambda: (0, 0.0))
  for c in module.collectives():
    count, size = kinds[c.kind]
    kinds[c.kind] = (count + c.times, size + c.size * c.times)
  on_chip = lambda tree: sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
                             for x in jax.tree.leaves(tree))
  devices = mesh.devices.ravel().tolist()
  links = sum(c.times * slice_.seconds(c.kind, c.size, [devices[i] for i in c.group]) for c in module.collectives())
  return (on_chip(params), on_chip((state["caches"], prefix.caches)), compiled.memory_analysis().temp_size_in_bytes,
          dict(kinds), links, costs.flops(traced.jaxpr) / mesh.size)


def _abstract_layer_list(model: ModelConfig, mesh: Mesh, dtype: jnp.dtype) -> dict[str, Any]:
  """Returns shapes and shardings of parameters with layers as a list."""
  shapes = abstract_params(model, dtype=dtype)
  single = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes["layers"])
  shapes = {**shapes, "layers": dict.fromkeys(range(model.num_layers), single)}
  return jax.tree_util.tree_map_with_path(
      lambda path, x: _with_sharding(x, sharding.param_sharding(mesh, ".".join(str(p.key) for p in path), x.shape)),
      shapes)


def _with_sharding(x: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def describe(model: ModelConfig, slice_: topology.Slice, *, rows: int, new_tokens: int, dtype: jnp.dtype,
             ) -> Iterator[str]:
  """Yields a line for the default sharding of a decoding step over a host's chips, and one for the next."""
  host = host_slice(slice_)
  hosts = len(slice_.devices) // len(host.devices)
  yield (f"sampling, {rows} rows on each of {hosts} hosts with {len(host.devices)} chips, {dtype}, a shared prefix of "
         f"{_PREFIX} tokens and {queue.most_slots(_QUESTION + new_tokens)} slots a row, {BANDWIDTH:.0%} of the "
         "memory's bandwidth assumed")
  for mesh in candidate_meshes(model, host.devices)[:2]:
    if rows % mesh.shape["data"]:
      continue
    step = compile_decoding_step(model, mesh, host, rows=rows, new_tokens=new_tokens, dtype=dtype)
    duration = step.seconds(slice_.chip)
    moved = ", ".join(f"{count} {kind} of {size / 1e6:.2f} MB in all" for kind, count, size in step.collectives)
    yield (f"  data {mesh.shape['data']} x tensor {mesh.shape['tensor']}: on a chip weights {step.weights / _GIB:.2f} "
           f"GiB, cache {step.cache / _GIB:.2f}, temporaries {step.temporaries / _GIB:.2f} of "
           f"{slice_.chip.hbm / _GIB:.2f}{'' if step.fits(slice_.chip) else ': DOES NOT FIT'}; a step "
           f"{1e3 * duration:.2f} ms, of it links {1e3 * step.links:.2f} ({moved or 'no collectives'}); "
           f"{rows / duration:,.0f} tokens/s a host, {hosts * rows / duration:,.0f} in all")
