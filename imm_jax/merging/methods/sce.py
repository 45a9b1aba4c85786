"""`sce`: selects entries by variance, weights models by their squared changes, and erases disagreeing signs."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax.merging import kernels, masks, statistics
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option, Settings
from imm_jax.merging.registry import TensorNumbers, method
from imm_jax.merging.statistics import Source


def _variance(tensors: Sequence[jax.Array]) -> list[jax.Array]:
  """Computes the variance of the task vectors entry by entry."""
  vectors, pinned = statistics.task_vectors(tensors), lambda x: kernels.pin(x, {"zero": None})
  mean = pinned(kernels.add(vectors) / len(vectors))
  return [kernels.add([pinned(jnp.square(vector - mean)) for vector in vectors]) / len(vectors)]


def _count_differing(tensors: Sequence[jax.Array]) -> jax.Array:
  """Counts the entries that differ between the models."""
  return jnp.count_nonzero(_variance([t.astype(jnp.float32) for t in tensors])[0])


def _squares(tensors: Sequence[jax.Array], *, floor: jax.Array) -> jax.Array:
  """Sums the squares of each model's selected changes; [n], float64 if jax has it enabled."""
  tensors = [t.astype(jnp.float32) for t in tensors]
  selected = kernels.magnitude_bits(_variance(tensors)[0]) >= floor
  wide = jax.dtypes.canonicalize_dtype(jnp.float64)
  return jnp.stack([jnp.sum(jnp.where(selected, jnp.square(v.astype(wide)), 0.0))
                    for v in statistics.task_vectors(tensors)])


def _prepare(source: Source, settings: Settings) -> tuple[Any, dict[str, Any]]:
  def find_floor(name: str) -> Any:
    share = masks.require_concrete(settings.value("select_topk", name), "select_topk", name)
    if share >= 1:
      return np.uint32(0)
    if source.traced:
      bits = jnp.sort(kernels.magnitude_bits(_variance(source.tensors(name))[0]).reshape(-1))
      kept = (jnp.count_nonzero(bits) * share).astype(jnp.int32)
      return jnp.where(kept > 0, bits[jnp.clip(len(bits) - kept, 0, len(bits) - 1)], jnp.uint32(0xFFFFFFFF))
    (_, count_differing), = source.reduce(_count_differing, np.add, names=[name])
    kept = int(int(count_differing) * share)
    if kept == 0:
      return np.uint32(0xFFFFFFFF)
    rank = np.array([source.size(name) - kept])
    return statistics.select_magnitudes(source, {0: rank}, {name: [0]}, [name], view=_variance)[0, 0][0]

  def numbers(name: str) -> TensorNumbers:
    floor = find_floor(name)
    squares: jax.Array | np.ndarray
    if source.traced:
      squares = _squares(source.tensors(name), floor=floor)
    else:
      (_, squares), = source.reduce(_squares, np.add, lambda _: {"floor": floor}, names=[name])
    xp = statistics.namespace(squares)
    squares = squares / max(1, source.size(name))
    total = squares.sum()
    weights = xp.where(total < 1e-6, 1 / len(squares), squares / xp.where(total < 1e-6, 1.0, total))
    return {"floor": floor, "weights": weights}

  return numbers, {}


@method("base", "models", reference="https://arxiv.org/abs/2408.07990", prepare=_prepare, gradients="masks", options=(
    Option("select_topk", "the share of differing entries to select", 1.0, low=0, high=1),))
def sce(tensors: Tensors, numbers: Numbers, shared: Shared) -> jax.Array:
  """Adds the changes of largest variance between models, weighted by their squares, where signs agree (SCE).

  In each tensor the `select_topk` share of the entries with non-zero variance among task vectors d_i is selected, those
  of largest variance first (ties together). w_i is the mean of d_i^2 over these, divided by the sum over all models.
  Entry by entry the sign of sum_i d_i is elected; the result is base + sum_i w_i d_i / sum_i w_i over the vectors with
  that sign.

  >>> import jax.numpy as jnp
  >>> sce({"w": jnp.zeros(3)}, [{"w": jnp.array([3., 1., 1.])}, {"w": jnp.array([-1., 1., 2.])}])["w"].round(2).tolist()
  [3.0, 1.0, 1.350000023841858]
  """
  base = tensors[0]
  selected = kernels.magnitude_bits(_variance(tensors)[0]) >= numbers["floor"]
  vectors = [jnp.where(selected, v, 0.0) for v in statistics.task_vectors(tensors)]
  positive = kernels.add(vectors) >= 0
  agree = [(v != 0) & ((v > 0) == positive) for v in vectors]
  weights = [jnp.where(a, w, 0.0) for a, w in zip(agree, numbers["weights"], strict=True)]
  mixed = kernels.add([kernels.pin(w * v, shared) for w, v in zip(weights, vectors, strict=True)])
  return base + mixed / jnp.maximum(kernels.add(weights), 1e-6)
