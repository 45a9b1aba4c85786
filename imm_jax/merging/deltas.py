"""What the methods on task vectors share: base + scale * combine_i(w_i sparsify_i(t_i - base)).

They differ in how a task vector is thinned (not at all, by magnitude, at random, at random by rank), and in whether
signs are elected first. A method's file names its parts; the arithmetic stands here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax.merging import kernels, masks, statistics
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option, Settings
from imm_jax.merging.registry import Scalars
from imm_jax.merging.statistics import Source

WEIGHTS = Option("weights", "w, any sign; a negative one takes a task away", per_model=True, key="weight")
DENSITIES = Option("densities", "the share of a task vector that stays", per_model=True, low=0, high=1, key="density")
SCALE = Option("scale", "factor of what is added to the base, the papers' lambda", 1.0, key="lambda")
RESCALE = Option("rescale", "divide what stays of a random choice by the probability that it stays", True, "flag")
NORMALIZE = Option("normalize", "divide by the sum of the weights; where signs are elected, of those that agree", False,
                   "flag")


def combine(tensors: Tensors, numbers: Numbers, shared: Shared, *, thin: Callable[[jax.Array, int], jax.Array] | None,
            normalize: bool, elect: bool = False) -> jax.Array:
  """base + scale * combine_i(w_i thin_i(t_i - base)) for (base, t_1, ..., t_n).

  Args:
    tensors: base first.
    numbers: `weights` and `total` (their sum, not 0), `scale`.
    shared: see `kernels`.
    thin: (task vector, model) -> what stays of it; None for all.
    normalize: divide by the sum of weights, with `elect` of those that stay.
    elect: keep, entry by entry, what has the sign of the sum (TIES).
  """
  base, *others = tensors
  weights = numbers["weights"]
  vectors = [other - base for other in others]
  if thin is not None:
    vectors = [thin(vector, i) for i, vector in enumerate(vectors)]
  vectors = [kernels.pin(weight * vector, shared) for weight, vector in zip(weights, vectors, strict=True)]
  if elect:
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


def by_magnitude(numbers: Numbers) -> Callable[[jax.Array, int], jax.Array]:
  """Keeps the magnitudes from `low` to `high`, as bits."""

  def thin(vector: jax.Array, i: int) -> jax.Array:
    bits = kernels.magnitude_bits(vector)
    return jnp.where((bits >= numbers["low"][i]) & (bits <= numbers["high"][i]), vector, 0.0)

  return thin


def at_random(numbers: Numbers, shared: Shared, *, rescale: bool,
              steps_of: Callable[[jax.Array, int], jax.Array] | None = None) -> Callable[[jax.Array, int], jax.Array]:
  """Drops with a probability of `steps` / 65536, which `steps_of` may compute by entry, and rescales."""

  def thin(vector: jax.Array, i: int) -> jax.Array:
    steps = numbers["steps"][i] if steps_of is None else steps_of(vector, i)
    draws = kernels.draws(vector.shape, numbers["code"], shared, i)
    if rescale:
      kept = masks.STEPS - steps.astype(jnp.float32)
      vector = kernels.pin(vector * (masks.STEPS / kept), shared)
    return jnp.where(draws < steps, 0.0, vector)

  return thin


def prepare(source: Source, settings: Settings, extra: Callable[[str], Mapping[str, Any]] = lambda _: {},
            flags: Sequence[str] = ("normalize",)) -> tuple[Callable[[str], Scalars], dict[str, Any]]:
  """What `combine` needs of a tensor, with what `extra` adds; and the method's flags."""
  del source

  def scalars(name: str) -> Scalars:
    weights = settings.of("weights", name)
    total = weights.sum(dtype=np.float32)
    safe = (jnp if isinstance(total, jax.Array) else np).where(abs(total) > 1e-8, total, np.float32(1))
    return {"weights": weights, "total": safe, "scale": settings.of("scale", name), **extra(name)}

  return scalars, {flag: settings[flag] for flag in flags}


def drop_steps(source: Source, settings: Settings) -> Callable[[str], Scalars]:
  """`steps` of each model and `code` of a tensor, for `at_random`."""
  steps = {name: np.array([masks.drop_steps(1 - density, name, "1 - density")
                           for density in settings.each("densities", name)], np.uint32) for name in source.names}
  return lambda name: {"steps": steps[name], "code": masks.tensor_code(name)}


def limits(source: Source, bands: Mapping[Any, tuple[int, int]], group_of: Mapping[str, Sequence[Any]],
           names: Sequence[str]) -> Callable[[str], Scalars]:
  """`low` and `high` for `by_magnitude`, where the ranks of a band of each group stay.

  Args:
    source: a base and n models.
    bands: group -> ranks of the least and the greatest magnitude that stay; none where the second is less.
    group_of: tensor -> group for each of the n models.
    names: the tensors to count.
  """
  ranks = {group: np.maximum(band, 0) for group, band in bands.items()}
  bits = statistics.magnitudes_of_rank(source, ranks, group_of, names)

  def of(name: str) -> Scalars:
    found = [bits[group, i] for i, group in enumerate(group_of[name])]
    none = np.array((0xFFFFFFFF, 0), np.uint32)
    found = [none if bands[group][1] < bands[group][0] else f for group, f in zip(group_of[name], found, strict=True)]
    rows = (jnp if any(isinstance(f, jax.Array) for f in found) else np).stack(found)
    return {"low": rows[:, 0], "high": rows[:, 1]}

  return of
