"""`linear`: the weighted mean."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax.merging import kernels
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option, Settings
from imm_jax.merging.registry import TensorNumbers, method
from imm_jax.merging.statistics import Source


def _prepare(source: Source, settings: Settings) -> tuple[Any, dict[str, Any]]:
  weights_by_name = {name: settings.value("weights", name) for name in source.names}
  totals = {name: weights.sum(dtype=np.float32) for name, weights in weights_by_name.items()}
  traced = any(isinstance(total, jax.Array) for total in totals.values())
  if settings["normalize"]:
    for name, total in totals.items():
      if not isinstance(total, jax.Array) and total == 0:
        raise ValueError(f"weights: they add up to 0 at {name!r}, which cannot be normalized")
  divide = settings["normalize"] and (traced or any(total != 1 for total in totals.values()))
  numbers: dict[str, TensorNumbers] = {
      name: {"weights": weights_by_name[name], "total": totals[name]} for name in source.names}
  return numbers.__getitem__, {"divide": divide}


@method("models", reference="https://arxiv.org/abs/2203.05482", prepare=_prepare, options=(
    Option("weights", "w, any sign", per_model=True, key="weight"),
    Option("normalize", "divide by the sum of the weights", True, "flag")))
def linear(tensors: Tensors, numbers: Numbers, shared: Shared, *, divide: bool) -> jax.Array:
  """Computes the weighted mean (model soups): sum_i w_i t_i / sum_i w_i.

  With `normalize` the weights must not add up to 0.

  >>> import jax.numpy as jnp
  >>> linear([{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}], weights=[1, 3])["w"].tolist()
  [0.75, 0.75]
  """
  total = jnp.zeros((), jnp.float32)
  for tensor, weight in zip(tensors, numbers["weights"], strict=True):
    total = kernels.multiply_add(tensor, weight, total)
  return kernels.divide(total, numbers["total"], shared) if divide else total
