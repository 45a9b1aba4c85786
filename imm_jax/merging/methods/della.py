"""`della` and `della_linear`: drop small entries with a higher probability than large ones."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax.merging import deltas, kernels, masks
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option, Settings
from imm_jax.merging.registry import method
from imm_jax.merging.statistics import Source

OPTIONS = (deltas.WEIGHTS, deltas.DENSITIES, Option(
    "epsilons", "half the range of probabilities; density - epsilon and density + epsilon lie between 0 and 1", 0.15,
    per_model=True, low=0, high=1, key="epsilon"), deltas.SCALE, deltas.NORMALIZE, deltas.RESCALE)
PAPER = "https://arxiv.org/abs/2406.11617"


def _prepare(source: Source, settings: Settings) -> tuple[Any, dict[str, Any]]:
  ranges: dict[str, dict[str, np.ndarray]] = {}
  for name in source.names:
    densities, epsilons = settings.concrete_values("densities", name), settings.concrete_values("epsilons", name)
    for d, e in zip(densities, epsilons, strict=True):
      if not (d in (0, 1) or (d - e > 0 and d + e < 1)):
        raise ValueError(f"densities, epsilons: {d:g} and {e:g} at {name!r}; expected 0 < density - epsilon and "
                         "density + epsilon < 1, or a density of 0 or 1")
    spread = [0.0 if d in (0, 1) else e for d, e in zip(densities, epsilons, strict=True)]
    ranges[name] = {"least": np.array(densities, np.float32) - np.array(spread, np.float32),
                    "range": 2 * np.array(spread, np.float32)}
  extra = lambda name: {**ranges[name], "code": masks.tensor_code(name)}
  return deltas.prepare(source, settings, extra, ("normalize", "rescale"))


def _drop_steps(numbers: Numbers, shared: Shared) -> Callable[[jax.Array, int], jax.Array]:
  """Returns a function that computes each entry's drop probability in steps of 1/65536."""

  def steps(vector: jax.Array, i: int) -> jax.Array:
    kept = numbers["least"][i] + kernels.pin(numbers["range"][i] * _relative_ranks(vector), shared)
    highest = jnp.where(numbers["least"][i] > 0, masks.STEPS - 1, masks.STEPS)  # only a density of 0 drops all
    return jnp.clip(jnp.rint((1 - kept) * masks.STEPS), 0, highest).astype(jnp.uint32)

  return steps


def _relative_ranks(vector: jax.Array) -> jax.Array:
  """Ranks each magnitude in its row, scaled to [0, 1]; ties share their mean rank."""
  bits = kernels.flatten_rows(kernels.magnitude_bits(vector))
  columns, axis = (bits.shape or (1,))[-1], bits.ndim - 1
  if bits.ndim < 2 or columns < 2:  # scalars, and tensors without entries
    return jnp.zeros(vector.shape, jnp.float32)
  position = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32), bits.shape)
  ordered, order = jax.lax.sort((bits, position), dimension=axis, num_keys=1)
  starts = jnp.concatenate([jnp.ones_like(bits[..., :1], bool), ordered[..., 1:] != ordered[..., :-1]], axis)
  ends = jnp.concatenate([starts[..., 1:], jnp.ones_like(starts[..., :1])], axis)
  low = jax.lax.cummax(jnp.where(starts, position, 0), axis)
  high = jax.lax.cummin(jnp.where(ends, position, columns), axis, reverse=True)
  _, rank = jax.lax.sort((order, low + high), dimension=axis, num_keys=1)
  return (rank.astype(jnp.float32) / (2 * (columns - 1))).reshape(vector.shape)


@method("base", "models", reference=PAPER, prepare=_prepare, draws=True, gradients="masks", whole="row", options=tuple(
    dataclasses.replace(o, default=True) if o.name == "normalize" else o for o in OPTIONS))
def della(tensors: Tensors, numbers: Numbers, shared: Shared, *, normalize: bool, rescale: bool) -> jax.Array:
  """Drops small entries more often than large ones, then elects signs and averages (DELLA).

  In a row of n entries the one of rank r (0 for the smallest magnitude) is kept with the probability
  density - epsilon + 2 epsilon r / (n - 1), and divided by it; a tensor of one axis is one row. Equal magnitudes
  share their mean rank; probabilities are quantized to 1/65536. A density of 1 keeps everything, one of 0
  nothing. Model i draws its masks with `fold_in(key, i)`.

  >>> import jax.numpy as jnp
  >>> merged = della({"w": jnp.zeros(1000)}, [{"w": jnp.arange(1000.)}], weights=1, densities=0.5, epsilons=0.4,
  ...                key=jax.random.key(0), rescale=False)["w"]
  >>> int((merged[:500] != 0).sum()) < 200, int((merged[500:] != 0).sum()) > 300
  (True, True)
  """
  sparsify = deltas.drop_at_random(numbers, shared, rescale=rescale, steps_by_entry=_drop_steps(numbers, shared))
  return deltas.combine(tensors, numbers, shared, sparsify=sparsify, normalize=normalize, elect_signs=True)


@method("base", "models", reference=PAPER, options=OPTIONS, prepare=_prepare, draws=True, gradients="masks",
        whole="row")
def della_linear(tensors: Tensors, numbers: Numbers, shared: Shared, *, normalize: bool, rescale: bool) -> jax.Array:
  """Applies task arithmetic to task vectors after DELLA's dropping; see `della`.

  >>> import jax.numpy as jnp
  >>> merged = della_linear({"w": jnp.zeros(1000)}, [{"w": jnp.ones(1000)}], weights=1, densities=0.5,
  ...                       key=jax.random.key(0))["w"]
  >>> sorted(set(merged.tolist()))
  [0.0, 2.0]
  """
  sparsify = deltas.drop_at_random(numbers, shared, rescale=rescale, steps_by_entry=_drop_steps(numbers, shared))
  return deltas.combine(tensors, numbers, shared, sparsify=sparsify, normalize=normalize)
