"""Shared code of the task-vector methods: base + scale * combine_i(w_i sparsify_i(t_i - base)).

They differ in how a task vector is sparsified (not at all, by magnitude, at random, at random by rank), and in whether
signs are elected first. A method's file chooses the parts; the arithmetic is here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax.merging import kernels, masks, statistics
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option, Settings
from imm_jax.merging.registry import TensorNumbers
from imm_jax.merging.statistics import Source

# (task vector, index of its model) -> sparse task vector
Sparsify = Callable[[jax.Array, int], jax.Array]
WEIGHTS = Option("weights", "w; negative weights remove a task", per_model=True, key="weight")
DENSITIES = Option("densities", "the share of a task vector that stays", per_model=True, low=0, high=1, key="density")
SCALE = Option("scale", "factor of what is added to the base, the papers' lambda", 1.0, key="lambda")
RESCALE = Option("rescale", "divide what stays of a random choice by the probability that it stays", True, "flag")
NORMALIZE = Option("normalize", "divide by the sum of the weights; where signs are elected, of those that agree", False,
                   "flag")


def combine(tensors: Tensors, numbers: Numbers, shared: Shared, *, sparsify: Sparsify | None, normalize: bool,
            elect_signs: bool = False) -> jax.Array:
  """Computes base + scale * combine_i(w_i sparsify_i(t_i - base)) for (base, t_1, ..., t_n).

  Args:
    tensors: base first.
    numbers: `weights`, `total` (their sum, not 0) and `scale`.
    shared: see `kernels`.
    sparsify: makes a task vector sparse; None keeps all entries.
    normalize: divide by the sum of the weights, with `elect_signs` by that of the agreeing models.
    elect_signs: keep only entries whose sign is that of the entrywise sum (TIES).
  """
  base, *others = tensors
  weights = numbers["weights"]
  vectors = [other - base for other in others]
  if sparsify is not None:
    vectors = [sparsify(vector, i) for i, vector in enumerate(vectors)]
  vectors = [kernels.pin(weight * vector, shared) for weight, vector in zip(weights, vectors, strict=True)]
  if elect_signs:
    positive = kernels.add(vectors) >= 0
    agree = [(v != 0) & ((v > 0) == positive) for v in vectors]
    mixed = kernels.add([jnp.where(a, v, 0.0) for a, v in zip(agree, vectors, strict=True)])
    if normalize:
      total = kernels.add([jnp.where(a, w, 0.0) for a, w in zip(agree, weights, strict=True)])
      mixed = mixed / jnp.where(total == 0, 1.0, total)
  else:
    mixed = kernels.add(vectors)
    if normalize:
      mixed = kernels.divide(mixed, numbers["total"], shared)
  return base + kernels.pin(mixed * numbers["scale"], shared)


def keep_by_magnitude(numbers: Numbers) -> Sparsify:
  """Returns a `sparsify` that keeps entries whose magnitude, as bits, lies in [`low`, `high`]."""

  def sparsify(vector: jax.Array, i: int) -> jax.Array:
    bits = kernels.magnitude_bits(vector)
    return jnp.where((bits >= numbers["low"][i]) & (bits <= numbers["high"][i]), vector, 0.0)

  return sparsify


def drop_at_random(numbers: Numbers, shared: Shared, *, rescale: bool,
                   steps_by_entry: Callable[[jax.Array, int], jax.Array] | None = None) -> Sparsify:
  """Returns a `sparsify` that drops entries with probability `steps` / 65536 and, if asked, rescales the others.

  `steps_by_entry` computes `steps` for each entry; by default `numbers` has one for each model.
  """

  def sparsify(vector: jax.Array, i: int) -> jax.Array:
    steps = numbers["steps"][i] if steps_by_entry is None else steps_by_entry(vector, i)
    uniform = kernels.draw_uint16(vector.shape, numbers["code"], shared, i)
    if rescale:
      kept = jnp.maximum(masks.STEPS - steps.astype(jnp.float32), 1)  # at a density of 0 all is dropped
      vector = kernels.pin(vector * (masks.STEPS / kept), shared)
    return jnp.where(uniform < steps, 0.0, vector)

  return sparsify


def prepare(source: Source, settings: Settings, extra: Callable[[str], Mapping[str, Any]] = lambda _: {},
            flags: Sequence[str] = ("normalize",)) -> tuple[Callable[[str], TensorNumbers], dict[str, Any]]:
  """Prepares the numbers that `combine` needs for a tensor, extended by `extra`, and the method's flags."""
  del source

  def numbers(name: str) -> TensorNumbers:
    weights = settings.value("weights", name)
    total = weights.sum(dtype=np.float32)
    safe = (jnp if isinstance(total, jax.Array) else np).where(abs(total) > 1e-8, total, np.float32(1))
    return {"weights": weights, "total": safe, "scale": settings.value("scale", name), **extra(name)}

  return numbers, {flag: settings[flag] for flag in flags}


def drop_steps(source: Source, settings: Settings) -> Callable[[str], TensorNumbers]:
  """Returns a function from a tensor's name to its `steps` (one for each model) and `code`, for `drop_at_random`."""
  steps = {name: np.array([_quantize_density(density, name) for density in settings.concrete_values("densities", name)],
                          np.uint32) for name in source.names}
  return lambda name: {"steps": steps[name], "code": masks.tensor_code(name)}


def _quantize_density(density: float, tensor: str) -> int:
  """Quantizes a density to steps of 1/65536 that are dropped: all of them only if it is 0."""
  steps = round((1 - density) * masks.STEPS)
  if steps == masks.STEPS and density > 0:
    raise ValueError(f"densities={density:g} at {tensor!r}: rounds to 0, as draws have steps of 1/65536; expected 0 or "
                     "more than that")
  return steps


def magnitude_bounds(source: Source, bands: Mapping[Any, tuple[int, int]], group_of: Mapping[str, Sequence[Any]],
                     names: Sequence[str]) -> Callable[[str], TensorNumbers]:
  """Returns a function from a tensor's name to `low` and `high` for `keep_by_magnitude`.

  Args:
    source: a base and n models.
    bands: group -> ranks of the smallest and the largest magnitude to keep; keeps none if the second is less.
    group_of: tensor -> group for each of the n models.
    names: the tensors over which ranks are counted.
  """
  ranks = {group: np.maximum(band, 0) for group, band in bands.items()}
  bits = statistics.select_magnitudes(source, ranks, group_of, names)

  empty = np.array((0xFFFFFFFF, 0), np.uint32)

  def bounds(name: str) -> TensorNumbers:
    rows = [empty if bands[group][1] < bands[group][0] else bits[group, i] for i, group in enumerate(group_of[name])]
    stacked = statistics.namespace(*rows).stack(rows)
    return {"low": stacked[:, 0], "high": stacked[:, 1]}

  return bounds
