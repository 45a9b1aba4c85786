"""Estimates the cost of sampling on a TPU slice that is not attached, by compiling a prefill and a decoding step.

Each host of a slice samples its share of the questions on its own chips. On these, `tensor` shards weights and cache by
heads, and `data` shards rows; the sampler's split is compared with another. As layers are alike, models of two and four
layers are compiled and the costs extrapolated. The programs are those of the native sampler, with the attention that it
has on TPUs by default.
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
from imm_jax.model.cached import Prefix
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import abstract_params
from imm_jax.sampling.native import decode, queue

# Numbers of layers that are compiled.
_FEW_LAYERS, _MORE_LAYERS = 2, 4
# Share of the memory bandwidth that a step is assumed to reach.
BANDWIDTH = 0.6
# Tokens of the shared prefix, and of a question.
_PREFIX, _QUESTION = 1024, 128
# Questions that fill any pack.
_MANY = 1024
_GIB = 2**30


class Step(NamedTuple):
  """Holds the costs of sampling on the chips of one host: of a decoding step, and the memory of a prefill.

  Attributes:
    mesh: mesh over the host's chips.
    rows: rows that the host decodes at once.
    weights: bytes on a chip.
    cache: bytes on a chip, including the prefix.
    prompts: bytes on a chip of a full pack of prompts that has been run and waits for rows: its caches and logits.
    temporaries: bytes on a chip of a decoding step.
    prefill_temporaries: bytes on a chip of the prefill of a full pack.
    collectives: (kind, number in a step, bytes in a step).
    links: seconds of collectives in a step.
    flops: FLOPs of a step on one chip.
  """

  mesh: Mesh
  rows: int
  weights: float
  cache: float
  prompts: float
  temporaries: float
  prefill_temporaries: float
  collectives: tuple[tuple[str, int, float], ...]
  links: float
  flops: float

  @property
  def peak(self) -> float:
    """Returns the most bytes on a chip; a pack is there while others are decoded, as its samples join bit by bit."""
    return self.weights + self.cache + self.prompts + max(self.temporaries, self.prefill_temporaries)

  def seconds(self, chip: topology.Chip) -> float:
    """Estimates a step's time: reading weights and cache at BANDWIDTH overlaps with products, but not collectives."""
    return max((self.weights + self.cache) / (BANDWIDTH * chip.hbm_rate), self.flops / chip.flops) + self.links

  def fits(self, chip: topology.Chip) -> bool:
    """Returns whether everything fits in a chip's memory."""
    return self.peak < chip.hbm


def host_slice(slice_: topology.TpuSlice) -> topology.TpuSlice:
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


def compile_sampling(model: ModelConfig, mesh: Mesh, slice_: topology.TpuSlice, *, rows: int, new_tokens: int,
                     dtype: jnp.dtype) -> Step:
  """Compiles prefill and decoding step for a mesh and extrapolates their costs to all layers.

  Raises:
    MemoryError: with one line, if a program does not fit a chip even with few layers.
  """
  few, more = (_compile_and_measure(model, mesh, slice_, layers, rows, new_tokens, dtype)
               for layers in (_FEW_LAYERS, _MORE_LAYERS))
  extrapolate = lambda few, more: few + (more - few) * (model.num_layers - _FEW_LAYERS) / (_MORE_LAYERS - _FEW_LAYERS)
  collectives = []
  for kind in sorted(few.collectives.keys() | more.collectives.keys()):
    (count, size), (more_count, more_size) = (c.get(kind, (0, 0.0)) for c in (few.collectives, more.collectives))
    collectives.append((kind, round(extrapolate(count, more_count)), extrapolate(size, more_size)))
  sizes = {name: extrapolate(getattr(few, name), getattr(more, name)) for name in _Measured._fields
           if name != "collectives"}
  return Step(mesh, rows, collectives=tuple(collectives), **sizes)


class _Measured(NamedTuple):
  """Holds what programs with few layers show: attributes of `Step`, and (number, bytes) of collectives by kind."""

  weights: float
  cache: float
  prompts: float
  temporaries: float
  prefill_temporaries: float
  links: float
  flops: float
  collectives: dict[str, tuple[int, float]]


def _compile_and_measure(model: ModelConfig, mesh: Mesh, slice_: topology.TpuSlice, layers: int, rows: int,
                         new_tokens: int, dtype: jnp.dtype) -> _Measured:
  model = dataclasses.replace(model, num_layers=layers)
  static = decode.Static(model, dtype, (0,), 1.0, False, mesh)
  replicated = NamedSharding(mesh, P())
  params = _abstract_layer_list(model, mesh, dtype)
  slots = queue.compute_max_slots(_QUESTION + new_tokens)
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
  compiled = topology.compile_program(traced)
  prefill = _compile_prefill(params, prefix, static).memory_analysis()
  module = hlo.Module(compiled.as_text())
  kinds: dict[str, tuple[int, float]] = collections.defaultdict(lambda: (0, 0.0))
  for c in module.collectives():
    count, size = kinds[c.kind]
    kinds[c.kind] = (count + c.times, size + c.size * c.times)
  on_chip = lambda tree: sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
                             for x in jax.tree.leaves(tree))
  devices = mesh.devices.ravel().tolist()
  links = sum(c.times * slice_.seconds(c.kind, c.size, [devices[i] for i in c.group]) for c in module.collectives())
  return _Measured(
      on_chip(params), on_chip((state["caches"], prefix.caches)), prefill.output_size_in_bytes,
      compiled.memory_analysis().temp_size_in_bytes, prefill.temp_size_in_bytes, links,
      costs.count_flops(traced.jaxpr) / mesh.size, dict(kinds))


def _compile_prefill(params: dict[str, Any], prefix: Prefix, static: decode.Static) -> Any:
  """Compiles the prefill of a pack that is as large as the sampler makes them."""
  pack = full_pack(static.mesh)
  tokens = jax.ShapeDtypeStruct((pack.rows, pack.length), jnp.int32)
  last = jax.ShapeDtypeStruct((pack.prompts,), jnp.int32)
  return topology.compile_program(decode.prefill.trace(params, prefix, tokens, tokens, tokens, last, static=static))


def full_pack(mesh: Mesh) -> queue.Shape:
  """Returns the shape of packs while many questions wait."""
  return queue.pack_shape([_QUESTION] * _MANY, parts=mesh.shape["data"], cpu=False)


def _abstract_layer_list(model: ModelConfig, mesh: Mesh, dtype: jnp.dtype) -> dict[str, Any]:
  """Returns shapes and shardings of parameters with layers as a list."""
  shapes = abstract_params(model, dtype=dtype)
  single = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes["layers"])
  shapes = {**shapes, "layers": dict.fromkeys(range(model.num_layers), single)}
  return jax.tree_util.tree_map_with_path(
      lambda path, x: _with_sharding(x, sharding.param_sharding(mesh, ".".join(str(p.key) for p in path), x.shape)),
      shapes)


def _with_sharding(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def describe(model: ModelConfig, slice_: topology.TpuSlice, *, rows: int, new_tokens: int, dtype: jnp.dtype,
             attention: str = "auto") -> Iterator[str]:
  """Yields a line for the default split of sampling over a host's chips, one for the next, and which is faster.

  Args:
    model: the model's config.
    slice_: the whole slice.
    rows: rows that each host decodes at once.
    new_tokens: largest number of tokens of an answer.
    dtype: dtype of weights, activations and cache.
    attention: as config.sampler.attention; others than the default are not estimated, which a line says.
  """
  host = host_slice(slice_)
  hosts, meshes = len(slice_.devices) // len(host.devices), candidate_meshes(model, host.devices)[:2]
  pack = full_pack(meshes[0])
  yield (f"sampling, {rows} rows on each of {hosts} hosts with {len(host.devices)} chips, {dtype}, a shared prefix of "
         f"{_PREFIX} tokens, {queue.compute_max_slots(_QUESTION + new_tokens)} slots a row, prompts run in packs of "
         f"{pack.rows} x {pack.length} tokens, {BANDWIDTH:.0%} of the memory's bandwidth assumed")
  if attention not in ("auto", "xla"):
    yield f"  of config.sampler.attention=xla: {attention} is not estimated"
  fitting = {}
  for mesh in meshes:
    name = f"data {mesh.shape['data']} x tensor {mesh.shape['tensor']}"
    if rows % mesh.shape["data"]:
      name += f" (which does not divide {rows} rows, so that all are decoded {mesh.shape['data']} times)"
    try:
      step = compile_sampling(model, mesh, host, rows=rows, new_tokens=new_tokens, dtype=dtype)
    except MemoryError as e:
      yield f"  {name}: DOES NOT FIT, {e} with {_MORE_LAYERS} layers or fewer"
      continue
    duration = step.seconds(slice_.chip)
    moved = ", ".join(f"{count} {kind} of {size / 1e6:.2f} MB in all" for kind, count, size in step.collectives)
    yield (f"  {name}: on a chip weights {step.weights / _GIB:.2f} GiB, cache {step.cache / _GIB:.2f}, a pack's caches "
           f"and logits {step.prompts / _GIB:.2f}, temporaries {step.temporaries / _GIB:.2f} in decoding and "
           f"{step.prefill_temporaries / _GIB:.2f} in prefill; peak {step.peak / _GIB:.2f} of "
           f"{slice_.chip.hbm / _GIB:.2f}: {'fits' if step.fits(slice_.chip) else 'DOES NOT FIT'}; a step "
           f"{1e3 * duration:.2f} ms, of it links {1e3 * step.links:.2f} ({moved or 'no collectives'}); "
           f"{rows / duration:,.0f} tokens/s a host, {hosts * rows / duration:,.0f} in all")
    if step.fits(slice_.chip):
      fitting[mesh] = duration
  if fitting and len(meshes) > 1:
    default, other = (fitting.get(mesh) for mesh in meshes)
    comparison = ("is the faster one by this estimate" if default and (not other or default <= other) else
                  f"takes {default / other:.2f} times as long as the other by this estimate" if default else
                  "does not fit, while the other does")
    yield f"  the sampler takes the first, which {comparison}"
