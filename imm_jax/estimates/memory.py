"""What a run needs, estimated from the shapes of the model and of what its programs keep, before anything is loaded."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh, NamedSharding

from imm_jax.estimates.shapes import Expected
from imm_jax.methods import merge_method, samples_answers
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import abstract_params, count_params
from imm_jax.model.sharding import decoding_mesh, num_batch_shards, param_sharding, path_name
from imm_jax.runtime import hardware, resident
from imm_jax.sampling.native import decode, queue
from imm_jax.scoring import likelihood
from imm_jax.stages import questions
from imm_jax.tasks import protocols
from imm_jax.training import lora, step
from imm_jax.training.additions import PLAIN, Additions, additions_of
from imm_jax.training.loss import chunk_of

# What compiling takes of this machine's memory and what the programs take then, beside their arrays: as measured, for
# they are as long for any model.
_PROGRAMS = 0.3 * 2**30
# And what is kept of the programs of each kind of stage that came before.
_EARLIER = 0.2 * 2**30
# The backward pass of a layer has what its forward pass kept, and the gradients of a part of that.
_BACKWARD = 4 / 3
# Tokens of a prompt, where nobody has counted them.
_PROMPT = 512


class Peak(NamedTuple):
  """The most bytes that a stage holds: `of` what, by name."""

  stage: str
  parts: dict[str, float]

  @property
  def total(self) -> float:
    """All of it."""
    return sum(self.parts.values())


def activation_bytes(model: ModelConfig, *, length: int, remat: str, dtype: jnp.dtype, attention: str = "xla",
                     widened: bool = False) -> int:
  """Bytes that the forward pass keeps of one row for the backward pass, all layers together.

  Args:
    model: of the checkpoint.
    length: tokens of the row.
    remat: one of `decoder.REMAT`.
    dtype: of activations.
    attention: what `attention.choose_backend` gave.
    widened: counts 2-byte activations as 4 bytes: XLA keeps them so on CPU, where it computes in float32.

  >>> model = ModelConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_layers=2, num_heads=2, num_kv_heads=1,
  ...     head_dim=2, rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=True, qkv_bias=True)
  >>> full, none = (activation_bytes(model, length=10, remat=remat, dtype=jnp.bfloat16) for remat in ("full", "none"))
  >>> full < none / 5
  True
  """
  params = abstract_params(model)

  def kept(rows: int) -> int:
    batch = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in ("tokens", "positions", "segment_ids")}
    batch["weights"] = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    hidden = lambda params, batch: step.head_inputs(model, params, batch, compute_dtype=dtype, remat=remat,
                                                    attention=attention)[0]
    return _size(jax.eval_shape(lambda params, batch: jax.vjp(lambda p: hidden(p, batch), params)[1], params, batch),
                 4 if widened else 1)

  return kept(2) - kept(1)  # what does not grow with the rows is the weights


def step_bytes(model: ModelConfig, mesh: Mesh, *, rows: int, length: int, accumulation: int, remat: str,
               dtype: jnp.dtype, attention: str, sums: bool = False, additions: Additions = PLAIN,
               ) -> dict[str, float]:
  """Bytes on one device that a training step takes beside its state, by name: `gradients`, `activations`, `logits`.

  Args:
    model: of the checkpoint.
    mesh: devices.
    rows: of a step, over all devices.
    length: tokens of a row.
    accumulation: parts that a batch is run in.
    remat: one of `decoder.REMAT`.
    dtype: of activations.
    attention: what `attention.choose_backend` gave.
    sums: whether gradients are added to sums that the caller holds, as for layer importance.
    additions: of the training.
  """
  options = {"length": length, "dtype": dtype, "attention": attention, "widened": _platform(mesh) == "cpu"}
  here = math.ceil(rows / accumulation / num_batch_shards(mesh))
  kept = here * activation_bytes(model, remat=remat, **options) / mesh.shape["tensor"]
  layer = here * activation_bytes(model, remat="none", **options) / mesh.shape["tensor"] / model.num_layers
  table = model.vocab_size * model.hidden_size
  # Of one model two arrays of the logits' size live at once, of two models five, as measured.
  arrays, at_once = (5, chunk_of(2 * here)) if additions.kl else (2, chunk_of(here))
  logits = arrays * here * min(length, at_once) * model.vocab_size * 4 / mesh.shape["tensor"]
  params, layers = (_on_device(model, mesh, of) for of in ("", "layers."))
  # The head's gradient is summed apart; the embedding's comes when activations are gone. Where there are sums, there is
  # no other gradient.
  gradients = (0 if sums else 4 * params if accumulation > 1 else 4 * layers) + 4 * table
  if additions.lora:  # of a layer's weights: W + s B A and its gradient
    gradients = 4 * count_trained(model, mesh, additions) + 8 * layers / model.num_layers
  gradients += 4 * params * (additions.l2_sp > 0)  # what is added to them
  gathered = (2 * table + 2 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(model)["layers"]))
              / model.num_layers) * jnp.dtype(dtype).itemsize if mesh.shape["fsdp"] > 1 else 0
  found = {"gradients": gradients, "activations": kept, "gathered weights": gathered}
  # Logits are gone when the layers' backward pass begins.
  found |= {"logits": logits} if logits > _BACKWARD * layer else {"a layer's backward pass": _BACKWARD * layer}
  return {name: size for name, size in found.items() if size}


def count_trained(model: ModelConfig, mesh: Mesh, additions: Additions) -> int:
  """Entries of what is trained that one device holds."""
  if not additions.lora:
    return _on_device(model, mesh)
  return sum(math.prod(param_sharding(mesh, path_name(path), leaf.shape).shard_shape(leaf.shape))
             for path, leaf in jax.tree_util.tree_leaves_with_path(lora.abstract(model, additions.lora)))


def state_bytes(model: ModelConfig, mesh: Mesh, *, dtype: jnp.dtype, additions: Additions = PLAIN, stops: bool = False,
                ) -> dict[str, int]:
  """Bytes on one device of a training's state, by name; of an anchor for L2-SP as for a base stored in bfloat16.

  Args:
    model: of the checkpoint.
    mesh: devices.
    dtype: of activations.
    additions: of the training.
    stops: whether the best epoch's weights are kept.
  """
  count, whole, width = count_trained(model, mesh, additions), _on_device(model, mesh), jnp.dtype(dtype).itemsize
  found = {"weights and moments": 12 * count, "average": 4 * count * bool(additions.ema),
           "best epoch": 4 * count * (1 + bool(additions.ema)) * stops,
           "frozen base": width * whole * bool(additions.lora),
           "anchor": whole * (width if additions.kl else 2) * additions.anchored}
  return {name: size for name, size in found.items() if size}


def sampling_bytes(model: ModelConfig, mesh: Mesh, *, rows: int, prompt: int, new_tokens: int, dtype: jnp.dtype,
                   ) -> dict[str, float]:
  """Bytes on one device that the native sampler takes, by name: `weights`, `cache`, and the larger of `prompts`, while
  they are read, and `decoding`, while answers are drawn.

  Args:
    model: of the checkpoint.
    mesh: devices.
    rows: samples decoded at once.
    prompt: tokens of the longest prompt.
    new_tokens: tokens of an answer at most.
    dtype: of weights, activations and cache.
  """
  where = decoding_mesh(mesh, model.num_kv_heads)
  copies, parts, cpu = where.shape["tensor"], where.shape["data"], _platform(mesh) == "cpu"
  static = decode.Static(model, dtype, (), 1.0, True)
  state = lambda rows, slots: _size(jax.eval_shape(lambda: decode.init(rows, slots, new_tokens, static)))
  pack = queue.pack_shape([prompt] * rows, parts=parts, cpu=cpu)
  caches = pack.rows * pack.length * (state(1, 2) - state(1, 1))
  layer = activation_bytes(model, length=pack.length, remat="none", dtype=dtype, widened=cpu)
  logits = 3 * pack.prompts * model.vocab_size * 4
  width = jnp.dtype(dtype).itemsize
  slots = queue.most_slots(prompt + new_tokens)
  found = {"weights": count_params(model) * width / copies, "cache": state(rows, slots) / mesh.size}
  reading = (caches + pack.rows * layer / model.num_layers + logits) / mesh.size
  # XLA's CPU backend widens 2-byte numbers: the keys of all layers, and a head.
  drawing = (found["cache"] + 4 * model.vocab_size * model.hidden_size) * (cpu and width < 4)
  drawing += 2 * rows * model.vocab_size * 4 / mesh.size
  return found | ({"prompts": reading} if reading > drawing else {"decoding": drawing})


def scoring_bytes(model: ModelConfig, mesh: Mesh, *, dtype: jnp.dtype) -> dict[str, float]:
  """Bytes on one device that `scoring.Scorer` takes, by name: `weights`, `activations` of a layer, `logits`.

  Args:
    model: of the checkpoint.
    mesh: devices.
    dtype: of weights and activations.
  """
  # About half of what a backward pass would need lives at once, as measured.
  layer = likelihood.TOKENS // likelihood.ROW * activation_bytes(
      model, length=likelihood.ROW, remat="none", dtype=dtype, widened=_platform(mesh) == "cpu") / model.num_layers / 2
  return {"weights": _on_device(model, mesh) * jnp.dtype(dtype).itemsize,
          "activations": layer / mesh.shape["tensor"],
          "logits": 2 * 4 * likelihood.LOGITS * model.vocab_size / mesh.shape["tensor"]}


def comparison_bytes(model: ModelConfig, mesh: Mesh, *, rows: int, length: int, accumulation: int, dtype: jnp.dtype,
                     attention: str) -> dict[str, float]:
  """Bytes on one device that comparing a model with the base takes, by name; arguments as of `step_bytes`."""
  here = math.ceil(rows / accumulation / num_batch_shards(mesh))
  # Nothing is kept of a layer; about half of what its backward pass would need lives at once, as in scoring.
  layer = here * activation_bytes(model, length=length, remat="none", dtype=dtype, attention=attention,
                                  widened=_platform(mesh) == "cpu") / model.num_layers / 2
  logits = 4 * here * min(length, chunk_of(here)) * model.vocab_size * 4
  return {"weights": 2 * _on_device(model, mesh) * dtype.itemsize, "activations": layer / mesh.shape["tensor"],
          "logits": logits / mesh.shape["tensor"]}


def estimate(config: ml_collections.ConfigDict, model: ModelConfig, mesh: Mesh, expected: Expected,
             sampler: ModelConfig | None = None) -> list[Peak]:
  """What the stages of a run hold at most: each device, or on CPU this process, with what it holds anyhow.

  Args:
    config: of the run.
    model: its shape.
    mesh: devices.
    expected: `shapes.estimate`.
    sampler: the shape of the model that samples for training, where it is another.
  """
  sft, stages = config.sft, []
  dtype = jnp.dtype(hardware.compute_dtype(config.sample.compute_dtype))
  if config.sampler.kind == "native":
    asked, tests = questions.counts(config)
    settings = [("evaluation", model, config.eval.batch_size, protocols.max_new_tokens(config),
                 tests * max(1, config.eval.num_samples))]
    if samples_answers(config):
      settings.append(("sampling", sampler or model, config.sample.batch_size, config.sample.max_new_tokens,
                       asked * config.sample.num_samples))
    prompt = expected.prompt or _PROMPT
    stages = [Peak(name, sampling_bytes(sampled, mesh, rows=queue.rows_of(batch_size, count), prompt=prompt,
                                        new_tokens=new_tokens, dtype=dtype))
              for name, sampled, batch_size, new_tokens, count in settings]
  if questions.scores_texts(config):
    stages.append(Peak("likelihood", scoring_bytes(model, mesh, dtype=dtype)))
  options = {"rows": expected.rows, "length": sft.row_length, "accumulation": sft.accumulation, "remat": sft.remat,
             "dtype": jnp.dtype(hardware.compute_dtype(sft.compute_dtype)), "attention": expected.attention}
  given = additions_of(config)
  held = state_bytes(model, mesh, dtype=options["dtype"], additions=given, stops=sft.stop_share > 0)
  stages.append(Peak("SFT", held | step_bytes(model, mesh, additions=given, **options)))
  if config.analysis.examples or merge_method(config) == "iimm":
    stages.append(Peak("importance", {"weights and sums": 8 * _on_device(model, mesh),
                                      **step_bytes(model, mesh, sums=True, **options)}))
  if count := questions.drift_questions(config):
    few = math.ceil(expected.rows * min(1, count / sft.global_batch))
    stages.append(Peak("drift", comparison_bytes(model, mesh, **{k: v for k, v in options.items() if k != "remat"} | {
        "rows": few})))
  if _platform(mesh) != "cpu":
    return stages
  here, held = len(mesh.local_devices), resident.read_current() + _PROGRAMS
  add_programs = lambda peak, stage, earlier: Peak(stage, {
      name: here * size for name, size in peak.parts.items()} | {"programs": held + earlier * _EARLIER})
  sft_index = next(i for i, peak in enumerate(stages) if peak.stage == "SFT")
  # The stages before SFT are run again after it, when the programs of all other kinds are in memory.
  later = [add_programs(peak, f"later {peak.stage}", sft_index) for peak in stages[:sft_index]
           if peak.stage != "sampling" or config.rounds > 1]
  return [add_programs(peak, peak.stage, i) for i, peak in enumerate(stages)] + later


def describe(config: ml_collections.ConfigDict, model: ModelConfig, mesh: Mesh, expected: Expected,
             sampler: ModelConfig | None = None) -> str:
  """A line for each of `estimate`, with what takes most first; before them the number of parameters."""
  count, peaks = count_params(model), estimate(config, model, mesh, expected, sampler)
  where = "of this process" if _platform(mesh) == "cpu" else "of each device"
  lines = [f"{count:,} parameters",
           f"most memory {where}: about {format_bytes(max(p.total for p in peaks))} (SFT: {expected.rows} rows a step)"]
  for peak in peaks:
    parts = ", ".join(f"{name} {format_bytes(size)}"
                      for name, size in sorted(peak.parts.items(), key=lambda item: -item[1]))
    lines.append(f"  {peak.stage:<18}{format_bytes(peak.total):>10}  {parts}")
  return "\n".join(lines)


def _placed(model: ModelConfig, mesh: Mesh) -> dict[str, tuple[NamedSharding, tuple[int, ...]]]:
  """Where each parameter lies, and its shape."""
  return {path_name(path): (param_sharding(mesh, path_name(path), leaf.shape), leaf.shape)
          for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(model))}


def _on_device(model: ModelConfig, mesh: Mesh, prefix: str = "") -> int:
  """Entries of the parameters of this prefix that one device holds."""
  return sum(math.prod(where.shard_shape(shape)) for path, (where, shape) in _placed(model, mesh).items()
             if path.startswith(prefix))


def _platform(mesh: Mesh) -> str:
  return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else ""


def _size(tree: Any, least: int = 1) -> int:
  """Bytes of a tree of shapes, a floating-point entry counted as `least` bytes or more."""
  width = lambda dtype: max(least, dtype.itemsize) if jnp.issubdtype(dtype, jnp.floating) else dtype.itemsize
  return sum(math.prod(leaf.shape) * width(leaf.dtype) for leaf in jax.tree.leaves(tree))


def format_bytes(num_bytes: float) -> str:
  """A number of bytes for a user.

  >>> format_bytes(3 << 19)
  '1.5 MiB'
  """
  for unit in ("B", "KiB", "MiB"):
    if num_bytes < 1024:
      return f"{num_bytes:.1f} {unit}"
    num_bytes /= 1024
  return f"{num_bytes:.1f} GiB"
