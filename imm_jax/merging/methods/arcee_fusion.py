"""`arcee_fusion`: takes only the most important changes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax.merging import kernels, statistics
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Settings
from imm_jax.merging.registry import TensorNumbers, method
from imm_jax.merging.statistics import Source


def _importance(tensors: Sequence[jax.Array]) -> list[jax.Array]:
  """Computes |other - base| times the divergence KL(softmax(other) || softmax(base)) of its row."""
  base, other = (jax.lax.stop_gradient(t) for t in tensors)
  with jax.enable_x64(True):  # float64 makes the divergence independent of the order of summation
    p, q = (jax.nn.softmax(t.astype(jnp.float64), axis=-1) + 1e-8 for t in (other, base))
    divergence = jnp.sum(p * jnp.log(p / q), axis=-1, keepdims=True).astype(jnp.float32)
  return [jnp.abs(other - base) * divergence]


def _prepare(source: Source, settings: Settings) -> tuple[Any, dict[str, Any]]:
  del settings

  def numbers(name: str) -> TensorNumbers:
    ranks = np.array([int(np.float32(q) * (max(1, source.size(name)) - 1)) for q in (0.25, 0.5, 0.75)])
    bits = statistics.select_magnitudes(source, {0: ranks}, {name: [0]}, [name], view=_clipped_importance,
                                        rows=True)[0, 0]
    xp = statistics.namespace(bits)
    low, median, high = (jax.lax.bitcast_convert_type(bits, jnp.float32) if xp is jnp else bits.view(np.float32))
    return {"threshold": median + np.float32(1.5) * (high - low)}

  return numbers, {}


def _clipped_importance(tensors: Sequence[jax.Array]) -> list[jax.Array]:
  """Clips importance at 0: rounding may make a divergence slightly negative."""
  return [jnp.maximum(_importance(tensors)[0], 0.0)]


@method("base", "other", reference="https://www.arcee.ai", prepare=_prepare, gradients="masks", whole="row")
def arcee_fusion(tensors: Tensors, numbers: Numbers, shared: Shared) -> jax.Array:
  """Takes only the most important changes of another model (Arcee Fusion).

  An entry's importance is |other - base| times KL(softmax(other) || softmax(base)) over its row. Entries whose
  importance is at least median + 1.5 (third - first quartile) over the tensor are taken; others keep the base's value.

  >>> import jax.numpy as jnp
  >>> arcee_fusion({"w": jnp.zeros(5)}, {"w": jnp.array([0., .1, .1, .2, 3.])})["w"].tolist()
  [0.0, 0.0, 0.0, 0.0, 3.0]
  """
  del shared
  base, other = tensors
  matrices = [kernels.flatten_rows(t) for t in tensors]
  threshold = numbers["threshold"].reshape(-1, *(1,) * (matrices[0].ndim - 1))
  taken = (_clipped_importance(matrices)[0] >= threshold).reshape(base.shape)
  return jnp.where(taken, other, base)
