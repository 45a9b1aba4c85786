"""`ties`: trims task vectors, elects signs, and averages the entries that agree."""

import dataclasses
from typing import Any

import jax

from imm_jax.merging import deltas
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option, Settings
from imm_jax.merging.registry import TensorNumbers, method
from imm_jax.merging.statistics import Source


def _prepare(source: Source, settings: Settings) -> tuple[Any, dict[str, Any]]:
  densities = {name: settings.concrete_values("densities", name) for name in source.names}

  def band(size: int, density: float) -> tuple[int, int]:
    """Returns the ranks of the largest magnitudes to keep: at least one unless the density is 0."""
    return (size - max(1, int(density * size)) if density > 0 else size), size - 1

  if settings["scope"] == "tensor":

    def bounds(name: str) -> TensorNumbers:  # computed at the merge of the tensor, so that not all are held at once
      bands = {i: band(source.size(name), density) for i, density in enumerate(densities[name])}
      return deltas.magnitude_bounds(source, bands, {name: list(bands)}, [name])(name)

    return deltas.prepare(source, settings, bounds)
  # If densities differ by tensor, ranks are counted over the tensors of equal density.
  group_of = {name: list(enumerate(per_model)) for name, per_model in densities.items()}
  sizes: dict[Any, int] = {}
  for name, groups in group_of.items():
    for group in groups:
      sizes[group] = sizes.get(group, 0) + source.size(name)
  bands = {group: band(size, group[1]) for group, size in sizes.items()}
  return deltas.prepare(source, settings, deltas.magnitude_bounds(source, bands, group_of, source.names))


@method("base", "models", reference="https://arxiv.org/abs/2306.01708", prepare=_prepare, gradients="masks", options=(
    dataclasses.replace(deltas.WEIGHTS, default=1.0), deltas.DENSITIES, deltas.SCALE,
    dataclasses.replace(deltas.NORMALIZE, default=True),
    Option("scope", "what the largest entries are counted over; in the paper it is the model", "tensor", "choice",
           choices=("tensor", "model"))))
def ties(tensors: Tensors, numbers: Numbers, shared: Shared, *, normalize: bool) -> jax.Array:
  """Trims task vectors, elects signs, and averages the entries that agree (TIES).

  The `density` share of largest magnitudes of every task vector is kept, counted tensor by tensor (as in mergekit), or
  with `scope="model"` over the whole model (as in the paper; if densities differ by tensor, over tensors of equal
  density). Entries equal to the smallest one kept are kept too.
  Entry by entry the sign of sum_i w_i d_i is elected, a sum of 0 counting as positive; the weighted mean of the
  vectors with that sign, times `scale`, is added to the base.

  >>> import jax.numpy as jnp
  >>> base, a, b = jnp.zeros(4), jnp.array([4., -3., 1., 0.]), jnp.array([2., 5., 1., 0.])
  >>> ties({"w": base}, [{"w": a}, {"w": b}], densities=0.5)["w"].tolist()
  [3.0, 5.0, 0.0, 0.0]
  """
  return deltas.combine(tensors, numbers, shared, sparsify=deltas.keep_by_magnitude(numbers), normalize=normalize,
                        elect_signs=True)
