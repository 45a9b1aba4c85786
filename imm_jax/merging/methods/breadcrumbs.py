"""`breadcrumbs`: task arithmetic without the largest and the smallest entries."""

from typing import Any

import jax

from imm_jax.merging import deltas
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option, Settings
from imm_jax.merging.registry import TensorNumbers, method
from imm_jax.merging.statistics import Source

OPTIONS = (deltas.WEIGHTS, deltas.DENSITIES, Option(
    "gammas", "the share of largest entries to remove; less where the density leaves no room", 0.01, per_model=True,
    low=0, high=1, key="gamma"), deltas.SCALE, deltas.NORMALIZE)
PAPER = "https://arxiv.org/abs/2312.06795"


def _prepare(source: Source, settings: Settings) -> tuple[Any, dict[str, Any]]:
  def band(name: str, density: float, gamma: float) -> tuple[int, int]:
    size, kept = source.size(name), int(density * source.size(name))
    if density >= 1:
      return 0, size - 1
    first = max(0, size - kept - int(gamma * size))
    return first, first + kept - 1

  def bounds(name: str) -> TensorNumbers:  # computed at the merge of the tensor, so that not all are held at once
    bands = dict(enumerate(band(name, d, g) for d, g in zip(
        settings.concrete_values("densities", name), settings.concrete_values("gammas", name), strict=True)))
    return deltas.magnitude_bounds(source, bands, {name: list(bands)}, [name])(name)

  return deltas.prepare(source, settings, bounds)


@method("base", "models", reference=PAPER, options=OPTIONS, prepare=_prepare, gradients="masks")
def breadcrumbs(tensors: Tensors, numbers: Numbers, shared: Shared, *, normalize: bool) -> jax.Array:
  """Applies task arithmetic without the largest and the smallest entries (Model Breadcrumbs).

  From every tensor's task vector the `gamma` share of largest magnitudes is removed, and as many of the smallest as
  needed to keep the `density` share; a density of 1 keeps everything. Ties at either bound are kept.

  >>> import jax.numpy as jnp
  >>> merged = breadcrumbs({"w": jnp.zeros(5)}, [{"w": jnp.array([9., -4., 3., 2., 1.])}], weights=1, densities=0.4,
  ...                      gammas=0.2)
  >>> merged["w"].tolist()
  [0.0, -4.0, 3.0, 0.0, 0.0]
  """
  return deltas.combine(tensors, numbers, shared, sparsify=deltas.keep_by_magnitude(numbers), normalize=normalize)


@method("base", "models", reference=PAPER, options=OPTIONS, prepare=_prepare, gradients="masks")
def breadcrumbs_ties(tensors: Tensors, numbers: Numbers, shared: Shared, *, normalize: bool) -> jax.Array:
  """Applies TIES with the trimming of Model Breadcrumbs: signs are elected among the remaining entries.

  >>> import jax.numpy as jnp
  >>> a, b = jnp.array([9., -4., 3., 2., 1.]), jnp.array([-9., 5., 6., 2., 1.])
  >>> breadcrumbs_ties({"w": jnp.zeros(5)}, [{"w": a}, {"w": b}], weights=1, densities=0.4, gammas=0.2)["w"].tolist()
  [0.0, 5.0, 9.0, 0.0, 0.0]
  """
  return deltas.combine(tensors, numbers, shared, sparsify=deltas.keep_by_magnitude(numbers), normalize=normalize,
                        elect_signs=True)
