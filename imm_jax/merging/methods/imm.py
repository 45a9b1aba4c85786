"""`imm`: the paper's merge at the end of a round; `iimm`: the same with a scale for every layer."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax.merging import kernels, masks
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option, Settings, stack
from imm_jax.merging.registry import TensorNumbers, method
from imm_jax.merging.statistics import Source
from imm_jax.merging.trees import get_layer

BASE_WEIGHT = Option("base_weight", "a, the weight of the base", low=0, high=1, in_commands=0.5)
DROP_RATE = Option("drop_rate", "DARE's p, the share of entries to drop", low=0, high=1, excludes_high=True,
                   in_commands=0.2)


def _prepare(source: Source, settings: Settings, layer_scales: Any = None) -> tuple[Any, dict[str, Any]]:
  def numbers(name: str) -> TensorNumbers:
    steps = masks.drop_steps(settings.value("drop_rate", name), name)
    layer = get_layer(name)
    layer_scale = 1.0 if layer_scales is None or layer is None else layer_scales[min(layer, len(layer_scales) - 1)]
    return {"base_weight": settings.value("base_weight", name), "steps": np.uint32(steps),
            "code": masks.tensor_code(name), "gain": stack([layer_scale * masks.STEPS / (masks.STEPS - steps)])[0]}

  # Computed for all tensors up front, so that an invalid value is reported before the merge begins.
  by_name = {name: numbers(name) for name in source.names}
  return by_name.__getitem__, {"draw": any(s["steps"] for s in by_name.values())}


def _prepare_layers(source: Source, settings: Settings) -> tuple[Any, dict[str, Any]]:
  return _prepare(source, settings, _layer_scales(settings["importance"], source))


def _layer_scales(importance: Sequence[float] | jax.Array, source: Source) -> Any:
  """Computes N I_n / sum(I) for every layer (IIMM, eq. 7); [N], of jax if the scores are traced."""
  traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(importance))
  try:
    scores = jnp.asarray(importance, jnp.float32) if traced else np.asarray(importance, np.float64)
  except (TypeError, ValueError):
    scores = np.zeros(())
  if scores.ndim != 1 or not (traced or (np.isfinite(scores).all() and (scores >= 0).all() and scores.sum() > 0)):
    raise ValueError("importance: expected one finite score >= 0 for each layer, with a positive sum")
  counts, names = source.output_layers, source.names
  if len(set(counts.values())) > 1:
    raise ValueError(f"importance: the names have several stacks of layers ({', '.join(counts)}), and scores of one "
                     "depth; merge them one by one")
  layers = max(counts.values(), default=0)
  if len(scores) != layers:
    raise ValueError(f"importance has {len(scores)} scores, but the names have {layers} layers, such as "
                     f"{names[-1] if names else 'none'}")
  return scores * len(scores) / scores.sum()


def _merge(tensors: Tensors, numbers: Numbers, shared: Shared, draw: bool) -> jax.Array:
  base, start, tuned = tensors
  weight, gain = numbers["base_weight"], numbers["gain"]
  delta = kernels.pin((tuned - start) * gain, shared)
  if draw:
    delta = jnp.where(kernels.drop_mask(base.shape, numbers["code"], numbers["steps"], shared), 0.0, delta)
  # With a gain of 1 and no drops use `tuned` itself: start + (tuned - start) may differ from it in float32.
  updated = kernels.substitute((gain == 1) & (numbers["steps"] == 0), tuned, start + delta)
  merged = kernels.pin(weight * base, shared) + kernels.pin((1 - weight) * updated, shared)
  return kernels.substitute(weight == 1, base, kernels.substitute(weight == 0, updated, merged))


@method("base", "start", "tuned", options=(BASE_WEIGHT, DROP_RATE), prepare=_prepare, draws=True, gradients="masks")
def imm(tensors: Tensors, numbers: Numbers, shared: Shared, *, draw: bool) -> jax.Array:
  """Merges a tuned model with the base, in one pass (IMM, eq. 5 and 6).

  delta = tuned - start; delta' = DARE(delta); merged = a * base + (1 - a) * (start + delta').

  At a drop rate of 0 that is a * base + (1 - a) * tuned; a base weight of 1 or 0 gives the base or start + delta'
  exactly (in float32).

  >>> import jax.numpy as jnp
  >>> merged = imm({"w": jnp.zeros(3)}, {"w": jnp.zeros(3)}, {"w": jnp.ones(3)}, base_weight=0.25, drop_rate=0.0,
  ...              key=jax.random.key(0))
  >>> merged["w"].tolist()
  [0.75, 0.75, 0.75]
  """
  return _merge(tensors, numbers, shared, draw)


@method("base", "start", "tuned", prepare=_prepare_layers, draws=True, gradients="masks", layers=True, options=(
    BASE_WEIGHT, DROP_RATE, Option("importance", "I, [N] layer importance scores, not negative, with a positive sum",
                                   kind="vector")))
def iimm(tensors: Tensors, numbers: Numbers, shared: Shared, *, draw: bool) -> jax.Array:
  """Merges as IMM does, with every layer's delta scaled by its importance (IIMM, eq. 7).

  Layer n's delta' is multiplied by N * I_n / sum(I) before eq. 6; tensors outside the layers keep theirs.

  >>> import jax.numpy as jnp
  >>> tree = lambda x: {"layers": [{"w": jnp.full(2, x)}, {"w": jnp.full(2, x)}]}
  >>> merged = iimm(tree(0.), tree(0.), tree(1.), base_weight=0., drop_rate=0., importance=[1., 3.],
  ...               key=jax.random.key(0))
  >>> [layer["w"].tolist() for layer in merged["layers"]]
  [[0.5, 0.5], [1.5, 1.5]]
  """
  return _merge(tensors, numbers, shared, draw)
