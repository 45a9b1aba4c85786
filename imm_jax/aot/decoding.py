"""What sampling takes on a TPU slice that is not here: a decoding step and the run of a pack of prompts, compiled.

Each host of a slice samples its share of the questions with its own chips. On those, `tensor` splits weights and cache
by heads, and `data` rows; all sizes that divide the key/value heads are compared. Layers are alike, so two and four of
them are compiled, and the rest is counted from the difference.
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

# Layers that are compiled.
_FEW, _MORE = 2, 4
# Of the memory's bandwidth, what a step is assumed to reach.
BANDWIDTH = 0.6
# Of the shared prefix, and of a question.
_PREFIX, _QUESTION = 1024, 128
_GIB = 2**30


class Step(NamedTuple):
  """A decoding step on the chips of one host.

  Attributes:
    mesh: of them.
    rows: at once, on the host.
    weights: bytes on a chip.
    cache: bytes on a chip, with the prefix.
    temporaries: bytes on a chip.
    collectives: (kind, how many a step, bytes a step).
    links: seconds of them a step.
    flops: of a step on one chip.
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
    """Of a step: weights and cache are read once, at BANDWIDTH; products run beside; collectives wait for them."""
    return max((self.weights + self.cache) / (BANDWIDTH * chip.hbm_rate), self.flops / chip.flops) + self.links

  def fits(self, chip: topology.Chip) -> bool:
    """Whether all is in a chip's memory at once."""
    return self.weights + self.cache + self.temporaries < chip.hbm


def host_of(slice_: topology.Slice) -> topology.Slice:
  """The chips of one host as a slice of their own; each host of a slice has as many."""
  chips = [d for d in slice_.devices if d.process_index == slice_.devices[0].process_index]
  sizes = "x".join(str(len({d.coords[axis] for d in chips})) for axis in range(len(slice_.sizes)))
  return topology.describe(f"{slice_.name.partition(':')[0]}:{sizes}")


def meshes(model: ModelConfig, devices: Sequence[jax.Device]) -> list[Mesh]:
  """The default of sampling first, then the others that divide the key/value heads, those that split most first."""
  default = sharding.decoding_mesh(sharding.make_mesh(data=1, fsdp=1, tensor=-1, devices=devices), model.num_kv_heads)
  most = math.gcd(model.num_kv_heads, len(devices))
  others = [Mesh(np.array(devices).reshape(-1, 1, n), sharding.AXES, axis_types=default.axis_types)
            for n in range(most, 0, -1) if most % n == 0]
  return [default, *(m for m in others if m.shape["tensor"] != default.shape["tensor"])]


def step_of(model: ModelConfig, mesh: Mesh, slice_: topology.Slice, *, rows: int, new_tokens: int, dtype: jnp.dtype,
            ) -> Step:
  """Compiles a decoding step for a mesh."""
  found = [_compiled(model, mesh, slice_, layers, rows, new_tokens, dtype) for layers in (_FEW, _MORE)]
  extrapolate = lambda few, more: few + (more - few) * (model.num_layers - _FEW) / (_MORE - _FEW)
  few, more = found
  kinds = tuple((kind, round(extrapolate(few[3].get(kind, (0, 0.0))[0], count)),
                 extrapolate(few[3].get(kind, (0, 0.0))[1], size)) for kind, (count, size) in sorted(more[3].items()))
  return Step(mesh, rows, *(extrapolate(few[i], more[i]) for i in range(3)), kinds, extrapolate(few[4], more[4]),
              extrapolate(few[5], more[5]))


def _compiled(model: ModelConfig, mesh: Mesh, slice_: topology.Slice, layers: int, rows: int, new_tokens: int,
              dtype: jnp.dtype) -> tuple:
  model = dataclasses.replace(model, num_layers=layers)
  static = decode.Static(model, dtype, (0,), 1.0, False, mesh)
  everywhere = NamedSharding(mesh, P())
  params = _params(model, mesh, dtype)
  slots = queue.most_slots(_QUESTION + new_tokens)
  state = jax.eval_shape(functools.partial(decode.init, rows, slots, new_tokens, static))
  where = sharding.cache_sharding(mesh, rows)
  state = {name: jax.tree.map(lambda x, n=name: _shape(x, where if n == "caches" else everywhere), leaf)
           for name, leaf in state.items()}
  prefix = jax.tree.map(lambda x: _shape(x, NamedSharding(mesh, P("tensor")) if x.ndim else everywhere),
                        jax.eval_shape(functools.partial(decode.no_prefix, _PREFIX, static)))
  allowed = jax.ShapeDtypeStruct((model.vocab_size,), bool, sharding=everywhere)
  traced = jax.jit(decode.extend, static_argnames="static", donate_argnames="state").trace(
      params, prefix, state, allowed, static=static)
  with topology.quiet():
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


def _params(model: ModelConfig, mesh: Mesh, dtype: jnp.dtype) -> dict[str, Any]:
  """Shapes of the list form of parameters, placed."""
  shapes = abstract_params(model, dtype=dtype)
  single = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes["layers"])
  shapes = {**shapes, "layers": dict.fromkeys(range(model.num_layers), single)}
  return jax.tree_util.tree_map_with_path(
      lambda path, x: _shape(x, sharding.param_sharding(mesh, ".".join(str(p.key) for p in path), x.shape)), shapes)


def _shape(x: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def describe(model: ModelConfig, slice_: topology.Slice, *, rows: int, new_tokens: int, dtype: jnp.dtype,
             ) -> Iterator[str]:
  """A line for the default way to split a decoding step over a host's chips, and one for the next."""
  host = host_of(slice_)
  hosts = len(slice_.devices) // len(host.devices)
  yield (f"sampling, {rows} rows on each of {hosts} hosts with {len(host.devices)} chips, {dtype}, a shared prefix of "
         f"{_PREFIX} tokens and {queue.most_slots(_QUESTION + new_tokens)} slots a row, {BANDWIDTH:.0%} of the "
         "memory's bandwidth assumed")
  for mesh in meshes(model, host.devices)[:2]:
    if rows % mesh.shape["data"]:
      continue
    step = step_of(model, mesh, host, rows=rows, new_tokens=new_tokens, dtype=dtype)
    taken = step.seconds(slice_.chip)
    moved = ", ".join(f"{count} {kind} of {size / 1e6:.2f} MB in all" for kind, count, size in step.collectives)
    yield (f"  data {mesh.shape['data']} x tensor {mesh.shape['tensor']}: on a chip weights {step.weights / _GIB:.2f} "
           f"GiB, cache {step.cache / _GIB:.2f}, temporaries {step.temporaries / _GIB:.2f} of "
           f"{slice_.chip.hbm / _GIB:.2f}{'' if step.fits(slice_.chip) else ': DOES NOT FIT'}; a step "
           f"{1e3 * taken:.2f} ms, of it links {1e3 * step.links:.2f} ({moved or 'no collectives'}); "
           f"{rows / taken:,.0f} tokens/s a host, {hosts * rows / taken:,.0f} in all")
