"""`model_stock`: interpolates between the base and the mean of models by the angle between their task vectors."""

from typing import Any

import jax
import numpy as np

from imm_jax.merging import arcs, kernels, statistics
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option, Settings
from imm_jax.merging.registry import method
from imm_jax.merging.statistics import Source


def _mean_weight(cosine: Any) -> Any:
  """Computes the weight of the models' mean from the cosines [n, n, ...] between task vectors."""
  count = len(cosine)
  mean = cosine[np.triu_indices(count, 1)].mean(axis=0)
  divisor = 1 + (count - 1) * mean
  xp = statistics.namespace(mean)
  # Task vectors that cancel have no mean direction, so the base is kept.
  cancel = abs(divisor) <= 1e-6
  return xp.where(cancel, 0.0, count * mean / xp.where(cancel, 1.0, divisor))


def _prepare(source: Source, settings: Settings) -> tuple[Any, dict[str, Any]]:
  if settings["filter_wise"]:
    return (lambda _: {"count": np.float32(source.num_models - 1)}), {"filter_wise": True}
  angles = statistics.cosines(source, statistics.task_vectors)
  ratios = {name: _mean_weight(cosine) for name, (_, cosine) in angles.items()}
  return (lambda name: {"ratio": ratios[name], "count": np.float32(source.num_models - 1)}), {"filter_wise": False}


@method("base", "models", reference="https://arxiv.org/abs/2403.19522", prepare=_prepare, measures=True, min_models=2,
        whole=lambda settings: "row" if settings["filter_wise"] else None,
        options=(Option("filter_wise", "compare row by row", False, "flag"),))
def model_stock(tensors: Tensors, numbers: Numbers, shared: Shared, *, filter_wise: bool) -> jax.Array:
  """Weighs the mean of the models against the base by the angle between their task vectors (Model Stock, eq. 2).

  r * mean_i(t_i) + (1 - r) * base, tensor by tensor, r = n c / (1 + (n - 1) c) with c the mean cosine between the
  task vectors of n models; r = 0 where they cancel. With `filter_wise` each row has its own r.

  >>> import jax.numpy as jnp
  >>> merged = model_stock({"w": jnp.zeros(2)}, [{"w": jnp.array([1., 0.])}, {"w": jnp.array([1., 0.])}])
  >>> merged["w"].tolist()
  [1.0, 0.0]
  """
  base, *others = tensors
  vectors = statistics.task_vectors(tensors)
  ratio = _mean_weight(arcs.lengths_and_cosines(vectors, -1)[1]) if filter_wise else numbers["ratio"]
  mean = kernels.divide(kernels.add(others), numbers["count"], shared)
  return kernels.pin(ratio * mean, shared) + kernels.pin((1 - ratio) * base, shared)
