"""Compiles the SFT step, layer importance, merge and sampling for a TPU slice that is not attached; prints their costs.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imm_jax import merging
from imm_jax.aot import costs, decoding, hlo, topology
from imm_jax.errors import UserError
from imm_jax.model import attention, published, sharding
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params, abstract_params, count_params
from imm_jax.training import gradients, optimization, step as training
from imm_jax.training.additions import PLAIN, Additions, get_additions
from imm_jax.training.computation import Computation
from imm_jax.training.throughput import train_flops

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class StepPlan:
  """Holds what to compile.

  Attributes:
    model: the model's config.
    slice_: the slice to compile for.
    mesh: mesh over the chips of the slice.
    rows: rows of one forward pass on a chip, or on a group of chips along `tensor`.
    length: tokens in a row.
    accumulation: forward passes in a step.
    remat: one of `decoder.REMAT`.
    attention: one of `attention.BACKENDS`.
    compute_dtype: dtype of activations.
    weight_decay: AdamW's weight decay.
    grad_clip: largest norm of the gradient.
    additions: additions to SFT.
  """

  model: ModelConfig
  slice_: topology.TpuSlice
  mesh: Mesh
  rows: int
  length: int
  accumulation: int
  remat: str
  attention: str
  compute_dtype: jnp.dtype
  weight_decay: float = 0.0
  grad_clip: float = 1.0
  additions: Additions = PLAIN

  @property
  def step_rows(self) -> int:
    """Returns the number of rows in an optimizer step over all chips."""
    return self.rows * self.accumulation * self.mesh.size // self.mesh.shape["tensor"]

  @property
  def tokens(self) -> float:
    """Returns the number of tokens in an optimizer step for each chip."""
    return self.step_rows * self.length / self.mesh.size

  def get_computation(self, backend: str) -> Computation:
    """Returns how a step is computed with an attention backend that `attention.choose_backend` returned."""
    return Computation(self.mesh, self.compute_dtype, self.accumulation, self.remat, backend)


@dataclasses.dataclass(frozen=True)
class Report:
  """Holds the result of compiling a plan.

  Attributes:
    attention: the chosen backend.
    memory: bytes on a chip: `arguments`, `outputs`, `aliased`, `temporaries`, `peak`; empty if it does not fit.
    excess: the compiler's message if it does not fit.
    flops: FLOPs of a step on one chip.
    estimate: time and traffic of a step on one chip.
    ideal: seconds for 6 N tokens at peak FLOP/s.
    mfu: model FLOPs divided by those of the peak in the estimated time.
    seconds: compilation time.
  """

  attention: str
  memory: dict[str, float]
  excess: str = ""
  flops: float = 0.0
  estimate: costs.Estimate | None = None
  ideal: float = 0.0
  mfu: float = 0.0
  seconds: float = 0.0


def run(config: ml_collections.ConfigDict, *, topology_name: str, slices: int, rows_per_chip: int) -> None:
  """Prints the costs of the SFT step, layer importance, the merge and sampling; needs no weights.

  Raises:
    UserError: for an invalid slice, mesh or model; and after the report if the step does not fit.
  """
  plan = make_plan(config, topology_name=topology_name, slices=slices, rows_per_chip=rows_per_chip)
  params = count_params(plan.model)
  shape = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.shape.items())
  print(f"{config.model}: {params:,} parameters; {slices} x {topology_name} = {plan.mesh.size} chips "
        f"({plan.mesh.devices.flat[0].device_kind}), mesh {shape}\n"
        "estimates of the compiler and a roofline; nothing runs on a TPU", flush=True)
  report = compile_step(plan)
  for line in describe(plan, report):
    print(line, flush=True)
  if report.excess:
    raise UserError(f"the step does not fit a chip's memory ({report.excess}); {suggest_fit(plan, report.excess)}")
  sample = config.sample
  for line in itertools.chain(
      _describe_importance(plan, report.attention), _describe_merge(plan),
      decoding.describe(plan.model, plan.slice_, rows=sample.batch_size, new_tokens=sample.max_new_tokens,
                        dtype=_resolve_dtype(sample.compute_dtype), attention=config.sampler.attention)):
    print(line, flush=True)


def make_plan(config: ml_collections.ConfigDict, *, topology_name: str, slices: int, rows_per_chip: int) -> StepPlan:
  """Makes the plan of a config; raises UserError as `run` does."""
  if rows_per_chip < 1:
    raise UserError(f"--rows_per_chip={rows_per_chip}: expected 1 or more")
  model = _find_model_config(config.model)
  slice_ = topology.describe_slice(topology_name, slices=slices)
  mesh = slice_.mesh(**config.mesh, hidden_size=model.hidden_size)
  sft = config.sft
  return StepPlan(model, slice_, mesh, rows_per_chip, sft.row_length, sft.accumulation, sft.remat, sft.attention,
                  _resolve_dtype(sft.compute_dtype), sft.weight_decay, sft.grad_clip, get_additions(config))


def _resolve_dtype(name: str) -> jnp.dtype:
  """Resolves a `compute_dtype` setting for TPUs; `hardware.compute_dtype` does so for the devices of this machine."""
  return jnp.dtype("bfloat16" if name == "auto" else name)


def _find_model_config(model: str) -> ModelConfig:
  """Finds the model's config without a download."""
  config = published.find_config(model)
  if config is None:
    raise UserError(f"--config.model={model}: its shape is not known here; --compile_only reads only config.json, so "
                    f"`hf download {model} config.json --local-dir=DIR` and --config.model=DIR suffice")
  return config


def compile_step(plan: StepPlan) -> Report:
  """Compiles the SFT step of a plan and estimates its costs."""
  backend = attention.choose_backend(plan.attention, plan.model, dtype=plan.compute_dtype, length=plan.length,
                                     rows=plan.step_rows // plan.accumulation, mesh=plan.mesh)
  optimizer = optimization.make_optimizer(weight_decay=plan.weight_decay, grad_clip=plan.grad_clip)
  state = training.abstract_state(plan.model, optimizer, plan.mesh, additions=plan.additions,
                                  frozen_dtype=plan.compute_dtype)
  step = training.step_function(plan.model, optimizer, plan.get_computation(backend), additions=plan.additions)
  started = time.monotonic()
  traced = training.jit_step(step, state).trace(state, _make_batch(plan), jax.ShapeDtypeStruct((), jnp.float32))
  try:
    compiled = topology.compile_program(traced)
  except MemoryError as e:
    return Report(backend, {}, excess=str(e), seconds=time.monotonic() - started)
  module = hlo.Module(compiled.as_text())
  estimate = costs.estimate(module, plan.slice_, plan.mesh)
  peak = plan.slice_.chip.flops
  ideal = 6 * count_params(plan.model) * plan.tokens / peak
  needed = train_flops(plan.model, tokens=plan.tokens, squares=plan.tokens * plan.length)
  return Report(backend, _read_memory(compiled), "", costs.count_flops(traced.jaxpr) / plan.mesh.size, estimate, ideal,
                needed / (peak * estimate.seconds), time.monotonic() - started)


def _make_batch(plan: StepPlan) -> dict[str, jax.ShapeDtypeStruct]:
  rows = NamedSharding(plan.mesh, sharding.BATCH)
  return {name: jax.ShapeDtypeStruct((plan.step_rows, plan.length), dtype, sharding=rows) for name, dtype in (
      ("tokens", jnp.int32), ("positions", jnp.int32), ("segment_ids", jnp.int32), ("weights", jnp.float32))}


def _read_memory(compiled: Any) -> dict[str, float]:
  stats = compiled.memory_analysis()
  return {"arguments": stats.argument_size_in_bytes, "outputs": stats.output_size_in_bytes,
          "aliased": stats.alias_size_in_bytes, "temporaries": stats.temp_size_in_bytes,
          "peak": stats.peak_memory_in_bytes}


def describe(plan: StepPlan, report: Report) -> Iterator[str]:
  """Yields the lines of a report."""
  chip = plan.slice_.chip
  yield (f"SFT step: {plan.rows * plan.accumulation} x {plan.length} tokens a chip, remat {plan.remat}, attention "
         f"{report.attention}, compiled in {report.seconds:.0f} s")
  if report.excess:
    return
  memory = {name: size / _GIB for name, size in report.memory.items()}
  yield (f"memory a chip, GiB: arguments {memory['arguments']:.2f}, outputs {memory['outputs']:.2f} (of which "
         f"{memory['aliased']:.2f} in place), temporaries {memory['temporaries']:.2f}; peak {memory['peak']:.2f} of "
         f"{chip.hbm / _GIB:.2f}: fits")
  e = report.estimate
  yield (f"a step on a chip: {report.flops / 1e12:.1f} TFLOP (6 N tokens: {report.ideal * chip.flops / 1e12:.1f}), "
         f"{e.traffic / 1e9:.0f} GB of HBM traffic")
  yield from _describe_collectives(plan, e.collectives)
  longest, terms = e.compute_roofline(plan.slice_, report.flops)
  yield (f"roofline, the longest of {', '.join(f'{name} {1e3 * t:.0f}' for name, t in terms.items())}: "
         f"{1e3 * longest:.0f} ms")
  yield (f"step time, the sum over all loops of max(compute + kernels, overlapped collectives) + exposed collectives: "
         f"{1e3 * e.seconds:.0f} ms")
  yield f"  compute, from XLA's cycles  {1e3 * e.compute:6.0f} ms"
  yield f"  splash kernels              {1e3 * e.kernels:6.0f} ms (at {costs.KERNEL_EFFICIENCY:.0%} of the peak)"
  yield f"  overlapped collectives      {1e3 * e.overlapped:6.0f} ms"
  yield f"  exposed collectives         {1e3 * e.exposed:6.0f} ms"
  yield (f"that is {e.seconds / report.ideal:.2f} times 6 N tokens at the peak ({1e3 * report.ideal:.0f} ms), an MFU "
         f"of {report.mfu:.1%}, {plan.tokens / e.seconds:,.0f} tokens/s a chip")


def _describe_collectives(plan: StepPlan, collectives: list[hlo.Collective]) -> Iterator[str]:
  kinds: dict[str, list[hlo.Collective]] = collections.defaultdict(list)
  for c in collectives:
    kinds[c.kind].append(c)
  for kind, group in sorted(kinds.items()):
    yield (f"{kind}: {sum(c.times for c in group)} a step, {sum(c.size * c.times for c in group) / 1e9:.2f} GB, the "
           f"largest {max(c.size for c in group) / 1e6:.1f} MB")
  largest = max((c.size for c in collectives if c.kind == "all-gather"), default=0.0)
  limit = largest_working_set(plan.model, plan.compute_dtype)
  yield (f"weights are gathered {'layer by layer' if largest <= limit else 'WHOLE'}: a layer or a table has up to "
         f"{limit / 1e6:.1f} MB")


def largest_working_set(config: ModelConfig, dtype: jnp.dtype) -> float:
  """Returns the bytes of the largest group of weights gathered at once: a layer, the embeddings, or the head."""
  params = abstract_params(config)
  layer = sum(math.prod(leaf.shape) // config.num_layers for leaf in jax.tree.leaves(params["layers"]))
  return jnp.dtype(dtype).itemsize * max(layer, config.vocab_size * config.hidden_size)


def suggest_fit(plan: StepPlan, excess: str) -> str:
  """Tries smaller plans (more rematerialization, fewer rows, more sharding) and describes the first that fits."""
  match = re.match(r"([\d.]+)([KMGT]) of ([\d.]+)([KMGT])", excess)
  scale = {"K": 1, "M": 2**10, "G": 2**20, "T": 2**30}
  factor = float(match[1]) * scale[match[2]] / (float(match[3]) * scale[match[4]]) if match else 2.0
  fewer = max(1, min(plan.rows // 2, int(plan.rows / factor)))
  changes = [{"remat": "full"}, {"rows": fewer}, {"rows": 1, "remat": "full"}]
  if plan.mesh.shape["data"] > plan.slice_.slices:
    changes.append({"rows": 1, "remat": "full", "mesh": plan.slice_.mesh(
        data=plan.slice_.slices, fsdp=-1, tensor=plan.mesh.shape["tensor"])})
  tried = []
  for change in changes:
    other = dataclasses.replace(plan, **change)
    if other in (plan, *tried):
      continue
    tried.append(other)
    report = compile_step(other)
    if not report.excess:
      return f"tried, and fits with {_format_options(other)}: peak {report.memory['peak'] / _GIB:.2f} GiB"
  options = "; ".join(map(_format_options, tried)) or "nothing smaller"
  return f"tried {options}, which do not fit either: take more chips"


def _format_options(plan: StepPlan) -> str:
  return (f"--rows_per_chip={plan.rows} --config.sft.remat={plan.remat} "
          f"--config.mesh.data={plan.mesh.shape['data']} --config.mesh.fsdp={plan.mesh.shape['fsdp']}")


def _describe_importance(plan: StepPlan, backend: str) -> Iterator[str]:
  """Describes the addition of a batch's gradient to the sum over a data set (eq. 3)."""
  params = _add_shardings(abstract_params(plan.model), plan.mesh)
  sums = (params, jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(plan.mesh, PartitionSpec())))
  add = gradients.make_accumulate(plan.model, plan.get_computation(backend))
  yield from _describe_program(f"layer importance, {plan.rows * plan.accumulation} x {plan.length} tokens a chip", plan,
                               training.jit_step(add, sums).trace(sums, params, _make_batch(plan)))


def _describe_merge(plan: StepPlan) -> Iterator[str]:
  """Describes the merge of three trees in the compute dtype with the shardings of the parameters."""
  tree = _add_shardings(abstract_params(plan.model, dtype=plan.compute_dtype), plan.mesh)
  merge = functools.partial(merging.imm, base_weight=0.5, drop_rate=0.2, key=jax.random.key(0))
  yield from _describe_program(
      f"merge imm of three {plan.compute_dtype} models in memory", plan,
      jax.jit(merge, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, tree)).trace(tree, tree, tree))


def _add_shardings(params: Params, mesh: Mesh) -> Params:
  """Adds shardings to the shapes of parameters."""
  return jax.tree.map(lambda leaf, placement: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement), params,
                      training.state_sharding(params, mesh))


def _describe_program(label: str, plan: StepPlan, traced: Any) -> Iterator[str]:
  started = time.monotonic()
  try:
    compiled = topology.compile_program(traced)
  except MemoryError as e:
    yield f"{label}: does not fit, {e}"
    return
  memory = {name: size / _GIB for name, size in _read_memory(compiled).items()}
  estimate = costs.estimate(hlo.Module(compiled.as_text()), plan.slice_, plan.mesh)
  moved = sum(c.size * c.times for c in estimate.collectives)
  yield (f"{label}, compiled in {time.monotonic() - started:.0f} s: on a chip arguments {memory['arguments']:.2f} GiB, "
         f"temporaries {memory['temporaries']:.2f}, peak {memory['peak']:.2f}; {moved / 1e9:.2f} GB of collectives, "
         f"{1e3 * estimate.seconds:.1f} ms")
