"""Estimates the memory of a run from the shapes of the model and of its programs' arrays, before anything is loaded."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from imm_jax.estimates.shapes import Expected
from imm_jax.formatting import format_size
from imm_jax.methods import is_sampling
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import abstract_params, count_params
from imm_jax.model.sharding import decoding_mesh, num_batch_shards, param_sharding, path_name
from imm_jax.runtime import hardware, resident_memory
from imm_jax.sampling.native import decode, queue
from imm_jax.scoring import likelihood
from imm_jax.stages import merge_settings
from imm_jax.stages.task_entries import get_tasks
from imm_jax.training import lora, step
from imm_jax.training.additions import PLAIN, Additions, get_additions
from imm_jax.training.computation import Computation
from imm_jax.training.loss import choose_chunk

# Bytes that compilation and programs take besides their arrays, as measured; they do not depend on the model's size.
_PROGRAM_BYTES = 0.3 * 2**30
# Bytes that remain of the programs of each kind of stage that ran before.
_EARLIER_PROGRAM_BYTES = 0.2 * 2**30
# Memory of a layer's backward pass as a multiple of its activations: these, and the gradients of some of them.
_BACKWARD = 4 / 3
# Tokens of a prompt, if unknown.
_PROMPT_TOKENS = 512


class Peak(NamedTuple):
  """Holds the largest number of bytes that a stage needs.

  Attributes:
    stage: name of the kind of stage.
    parts: bytes by name of what takes them.
  """

  stage: str
  parts: dict[str, float]

  @property
  def total(self) -> float:
    """Returns the sum of the parts."""
    return sum(self.parts.values())


@functools.lru_cache  # tracing takes a third of a second, and several stages ask for the same
def activation_bytes(model: ModelConfig, *, length: int, remat: str, dtype: jnp.dtype, attention: str = "xla",
                     widened: bool = False) -> int:
  """Returns the bytes that a forward pass keeps of one row for the backward pass, over all layers.

  Args:
    model: config of the model.
    length: tokens of the row.
    remat: one of `decoder.REMAT`.
    dtype: dtype of activations.
    attention: the result of `attention.choose_backend`.
    widened: whether 2-byte activations count as 4 bytes, as on CPU, where XLA computes in float32.

  >>> model = ModelConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_layers=2, num_heads=2, num_kv_heads=1,
  ...     head_dim=2, rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=True, qkv_bias=True)
  >>> full, none = (activation_bytes(model, length=10, remat=remat, dtype=jnp.bfloat16) for remat in ("full", "none"))
  >>> full < none / 5
  True
  """
  params = abstract_params(model)

  def residual_bytes(rows: int) -> int:
    batch = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in ("tokens", "positions", "segment_ids")}
    batch["weights"] = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    hidden = lambda params, batch: step.head_inputs(model, params, batch, compute_dtype=dtype, remat=remat,
                                                    attention=attention)[0]
    return _size(jax.eval_shape(lambda params, batch: jax.vjp(lambda p: hidden(p, batch), params)[1], params, batch),
                 4 if widened else 1)

  return residual_bytes(2) - residual_bytes(1)  # the weights, which do not grow with the rows, cancel


def step_bytes(model: ModelConfig, computation: Computation, *, rows: int, length: int, sums: bool = False,
               additions: Additions = PLAIN) -> dict[str, float]:
  """Returns the bytes on one device that a training step takes besides its state, by name.

  Args:
    model: config of the model.
    computation: how the step is computed.
    rows: rows of a step, over all devices.
    length: tokens of a row.
    sums: whether gradients are added to sums that the caller holds, as for layer importance.
    additions: additions of the training.
  """
  mesh, accumulation, dtype = computation.mesh, computation.accumulation, computation.compute_dtype
  options = {"length": length, "dtype": dtype, "attention": computation.attention, "widened": _platform(mesh) == "cpu"}
  device_rows = math.ceil(rows / accumulation / num_batch_shards(mesh))
  activations = device_rows * activation_bytes(model, remat=computation.remat, **options) / mesh.shape["tensor"]
  layer = device_rows * activation_bytes(model, remat="none", **options) / mesh.shape["tensor"] / model.num_layers
  table = model.vocab_size * model.hidden_size
  # With one model, two arrays of the logits' size are alive at a time; with two models, five, as measured.
  arrays, chunk = (5, choose_chunk(2 * device_rows)) if additions.kl else (2, choose_chunk(device_rows))
  logits = arrays * device_rows * min(length, chunk) * model.vocab_size * 4 / mesh.shape["tensor"]
  params, layers = (_count_on_device(model, mesh, prefix) for prefix in ("", "layers."))
  # The head's gradient is summed separately; the embedding's is computed when the activations are freed. With sums
  # there is no other gradient.
  gradients = (0 if sums else 4 * params if accumulation > 1 else 4 * layers) + 4 * table
  if additions.lora:  # and, of the weights of one layer, W + s B A and its gradient
    gradients = 4 * count_trained(model, mesh, additions) + 8 * layers / model.num_layers
  gradients += 4 * params * (additions.l2_sp > 0)  # the gradient of the L2-SP term
  gathered = (2 * table + 2 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(model)["layers"]))
              / model.num_layers) * jnp.dtype(dtype).itemsize if mesh.shape["fsdp"] > 1 else 0
  sizes = {"gradients": gradients, "activations": activations, "gathered weights": gathered}
  # Logits are freed before the layers' backward pass begins.
  sizes |= {"logits": logits} if logits > _BACKWARD * layer else {"a layer's backward pass": _BACKWARD * layer}
  return {name: size for name, size in sizes.items() if size}


def count_trained(model: ModelConfig, mesh: Mesh, additions: Additions) -> int:
  """Counts the trained parameters on one device."""
  if not additions.lora:
    return _count_on_device(model, mesh)
  return sum(math.prod(param_sharding(mesh, path_name(path), leaf.shape).shard_shape(leaf.shape))
             for path, leaf in jax.tree_util.tree_leaves_with_path(lora.abstract(model, additions.lora)))


def state_bytes(model: ModelConfig, mesh: Mesh, *, dtype: jnp.dtype, additions: Additions = PLAIN, stops: bool = False,
                ) -> dict[str, int]:
  """Returns the bytes of a training state on one device, by name; L2-SP's anchor counts as stored in bfloat16.

  Args:
    model: config of the model.
    mesh: the devices.
    dtype: dtype of activations.
    additions: additions of the training.
    stops: whether the best epoch's weights are kept.
  """
  count, whole, width = count_trained(model, mesh, additions), _count_on_device(model, mesh), jnp.dtype(dtype).itemsize
  sizes = {"weights and moments": 12 * count, "average": 4 * count * bool(additions.ema),
           "best epoch": 4 * count * (1 + bool(additions.ema)) * stops,
           "frozen base": width * whole * bool(additions.lora),
           "anchor": whole * (width if additions.kl else 2) * additions.anchored}
  return {name: size for name, size in sizes.items() if size}


def sampling_bytes(model: ModelConfig, mesh: Mesh, *, rows: int, prompt: int, new_tokens: int, dtype: jnp.dtype,
                   ) -> dict[str, float]:
  """Returns the bytes on one device that the native sampler takes, by name.

  The names are `weights`, `cache`, and the larger of `prompts` (while prompts are processed) and `decoding`.

  Args:
    model: config of the model.
    mesh: the devices.
    rows: samples that are decoded at a time.
    prompt: tokens of the longest prompt.
    new_tokens: largest number of tokens of an answer.
    dtype: dtype of weights, activations and cache.
  """
  sampling_mesh = decoding_mesh(mesh, model.num_kv_heads)
  shards, parts, cpu = sampling_mesh.shape["tensor"], sampling_mesh.shape["data"], _platform(mesh) == "cpu"
  static = decode.Static(model, dtype, (), 1.0, True)
  state = lambda rows, slots: _size(jax.eval_shape(lambda: decode.init(rows, slots, new_tokens, static)))
  pack = queue.pack_shape([prompt] * rows, parts=parts, cpu=cpu)
  caches = pack.rows * pack.length * (state(1, 2) - state(1, 1))
  layer = activation_bytes(model, length=pack.length, remat="none", dtype=dtype, widened=cpu)
  logits = 3 * pack.prompts * model.vocab_size * 4
  width = jnp.dtype(dtype).itemsize
  slots = queue.compute_max_slots(prompt + new_tokens)
  sizes = {"weights": count_params(model) * width / shards, "cache": state(rows, slots) / mesh.size}
  prompts = (caches + pack.rows * layer / model.num_layers + logits) / mesh.size
  # XLA's CPU backend converts 2-byte numbers to float32: the keys of all layers, and the head.
  decoding = (sizes["cache"] + 4 * model.vocab_size * model.hidden_size) * (cpu and width < 4)
  decoding += 2 * rows * model.vocab_size * 4 / mesh.size
  return sizes | ({"prompts": prompts} if prompts > decoding else {"decoding": decoding})


def scoring_bytes(model: ModelConfig, mesh: Mesh, *, dtype: jnp.dtype) -> dict[str, float]:
  """Returns the bytes on one device that `scoring.Scorer` takes: `weights`, `activations` of a layer, `logits`.

  Args:
    model: config of the model.
    mesh: the devices.
    dtype: dtype of weights and activations.
  """
  # About half of the activations that a backward pass would need are alive at a time, as measured.
  layer = likelihood.TOKENS // likelihood.ROW * activation_bytes(
      model, length=likelihood.ROW, remat="none", dtype=dtype, widened=_platform(mesh) == "cpu") / model.num_layers / 2
  return {"weights": _count_on_device(model, mesh) * jnp.dtype(dtype).itemsize,
          "activations": layer / mesh.shape["tensor"],
          "logits": 2 * 4 * likelihood.LOGITS * model.vocab_size / mesh.shape["tensor"]}


def comparison_bytes(model: ModelConfig, computation: Computation, *, rows: int, length: int) -> dict[str, float]:
  """Returns the bytes on one device that a comparison of a model with the base takes, by name.

  Args are those of `step_bytes`.
  """
  mesh, dtype = computation.mesh, computation.compute_dtype
  device_rows = math.ceil(rows / computation.accumulation / num_batch_shards(mesh))
  # Layers keep nothing; about half of the activations that a backward pass would need are alive, as in scoring.
  layer = device_rows * activation_bytes(
      model, length=length, remat="none", dtype=dtype, attention=computation.attention,
      widened=_platform(mesh) == "cpu") / model.num_layers / 2
  # Those of both models, their log-probabilities, and one array more: what XLA's memory analysis of it says.
  logits = 5 * device_rows * min(length, choose_chunk(device_rows)) * model.vocab_size * 4
  return {"weights": 2 * _count_on_device(model, mesh) * dtype.itemsize, "activations": layer / mesh.shape["tensor"],
          "logits": logits / mesh.shape["tensor"]}


def estimate(config: ml_collections.ConfigDict, model: ModelConfig, mesh: Mesh, expected: Expected,
             sampler: ModelConfig | None = None) -> list[Peak]:
  """Estimates the peak memory of each kind of stage: of each device or, on CPU, of this process and all it holds.

  Args:
    config: settings of the run.
    model: config of the model.
    mesh: the devices.
    expected: the result of `shapes.estimate`.
    sampler: config of the model that samples for training, if it is another.
  """
  sft, tasks, stages = config.sft, get_tasks(config), []
  dtype = jnp.dtype(hardware.compute_dtype(config.sample.compute_dtype))
  if config.sampler.kind == "native":
    num_questions, tests = tasks.count_questions()
    settings = [("evaluation", model, config.eval.batch_size, tasks.protocol.token_limit,
                 tests * max(1, config.eval.num_samples))]
    if is_sampling(config):
      settings.append(("sampling", sampler or model, config.sample.batch_size, config.sample.max_new_tokens,
                       num_questions * config.sample.num_samples))
    prompt = expected.prompt or _PROMPT_TOKENS
    stages = [Peak(name, sampling_bytes(sampled, mesh, rows=queue.choose_rows(batch_size, count), prompt=prompt,
                                        new_tokens=new_tokens, dtype=dtype))
              for name, sampled, batch_size, new_tokens, count in settings]
  if tasks.needs_likelihood:
    stages.append(Peak("likelihood", scoring_bytes(model, mesh, dtype=dtype)))
  computation = Computation(mesh, jnp.dtype(hardware.compute_dtype(sft.compute_dtype)), sft.accumulation, sft.remat,
                            expected.attention)
  additions, shape = get_additions(config), {"rows": expected.rows, "length": sft.row_length}
  state = state_bytes(model, mesh, dtype=computation.compute_dtype, additions=additions, stops=sft.stop_share > 0)
  stages.append(Peak("SFT", state | step_bytes(model, computation, additions=additions, **shape)))
  if config.analysis.examples or merge_settings.get_settings(config).needs_importance:
    stages.append(Peak("importance", {"weights and sums": 8 * _count_on_device(model, mesh),
                                      **step_bytes(model, computation, sums=True, **shape)}))
  if tasks.drift:
    # A passage of a text fills a row.
    passages = min(tasks.drift, tasks.passages or tasks.drift, sft.global_batch) if tasks.texts else 0
    rows = max(passages, math.ceil(expected.rows * min(1, tasks.drift / sft.global_batch)))
    stages.append(Peak("drift", comparison_bytes(model, computation, rows=rows, length=sft.row_length)))
  if _platform(mesh) != "cpu":
    return stages
  num_devices, resident_bytes = len(mesh.local_devices), resident_memory.read_current() + _PROGRAM_BYTES
  add_programs = lambda peak, stage, earlier: Peak(stage, {
      name: num_devices * size for name, size in peak.parts.items()} | {
          "programs": resident_bytes + earlier * _EARLIER_PROGRAM_BYTES})
  sft_index = next(i for i, peak in enumerate(stages) if peak.stage == "SFT")
  # The stages before SFT are run again after it, when the programs of all other kinds are in memory.
  repeated = [add_programs(peak, f"{peak.stage} after SFT", sft_index) for peak in stages[:sft_index]
              if peak.stage != "sampling" or config.rounds > 1]
  return [add_programs(peak, peak.stage, i) for i, peak in enumerate(stages)] + repeated


def describe(config: ml_collections.ConfigDict, model: ModelConfig, mesh: Mesh, expected: Expected,
             sampler: ModelConfig | None = None) -> str:
  """Describes the result of `estimate`: the number of parameters, then a line per stage with its largest part first."""
  count, peaks = count_params(model), estimate(config, model, mesh, expected, sampler)
  owner = "of this process" if _platform(mesh) == "cpu" else "of each device"
  lines = [f"{count:,} parameters",
           f"peak memory {owner}: about {format_size(max(p.total for p in peaks))} (SFT: {expected.rows} rows a step)"]
  for peak in peaks:
    parts = ", ".join(f"{name} {format_size(size)}"
                      for name, size in sorted(peak.parts.items(), key=lambda item: -item[1]))
    lines.append(f"  {peak.stage:<21}{format_size(peak.total):>10}  {parts}")
  return "\n".join(lines)


def _count_on_device(model: ModelConfig, mesh: Mesh, prefix: str = "") -> int:
  """Counts the parameters on one device whose name has this prefix."""
  named = ((path_name(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(model)))
  return sum(math.prod(param_sharding(mesh, name, shape).shard_shape(shape)) for name, shape in named
             if name.startswith(prefix))


def _platform(mesh: Mesh) -> str:
  return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else ""


def _size(tree: Any, min_width: int = 1) -> int:
  """Returns the bytes of a tree of shapes, with at least `min_width` bytes per floating-point number."""
  width = lambda dtype: max(min_width, dtype.itemsize) if jnp.issubdtype(dtype, jnp.floating) else dtype.itemsize
  return sum(math.prod(leaf.shape) * width(leaf.dtype) for leaf in jax.tree.leaves(tree))
