"""`lines`: task arithmetic with a scale that grows with depth."""

from typing import Any

import jax

from imm_jax.merging import deltas
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option, Settings, stack
from imm_jax.merging.registry import TensorNumbers, method
from imm_jax.merging.statistics import Source
from imm_jax.merging.trees import get_layer, get_num_layers


def _prepare(source: Source, settings: Settings) -> tuple[Any, dict[str, Any]]:
  if not source.output_layers and source.names:
    raise ValueError(f"lines scales by depth, but no name such as {source.names[0]!r} has layers.<n>.; give names")

  def numbers(name: str) -> TensorNumbers:
    depth = min(1.0, (get_layer(name) or 0) / max(1, get_num_layers(name, source.output_layers) - 1))
    scale = settings.value("alpha", name) + depth * settings.value("beta", name)
    return {"weights": settings.value("weights", name), "scale": stack([scale])[0]}

  return numbers, {}


@method("base", "models", reference="https://arxiv.org/abs/2410.17146", prepare=_prepare, layers=True, options=(
    deltas.WEIGHTS, Option("alpha", "the scale of the first layer and of tensors outside the layers", 0.5),
    Option("beta", "how much larger the scale of the last layer is", 0.5)))
def lines(tensors: Tensors, numbers: Numbers, shared: Shared) -> jax.Array:
  """Applies task arithmetic with a scale that grows linearly over the layers (LiNeS), as deeper ones are task-specific.

  base + (alpha + beta l / (L - 1)) sum_i w_i (t_i - base) for layer l of L, in each stack of layers.

  >>> import jax.numpy as jnp
  >>> tree = lambda x: {"layers": [{"w": jnp.full(1, x)} for _ in range(3)]}
  >>> merged = lines(tree(0.), [tree(1.)], weights=1, alpha=0.2, beta=0.6)
  >>> [round(float(layer["w"][0]), 3) for layer in merged["layers"]]
  [0.2, 0.5, 0.8]
  """
  return deltas.combine(tensors, numbers, shared, sparsify=None, normalize=False)
