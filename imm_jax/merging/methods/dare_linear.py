"""`dare_linear` and `dare_ties`: task arithmetic and TIES on task vectors after DARE."""

from typing import Any

import jax

from imm_jax.merging import deltas
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Settings
from imm_jax.merging.registry import method
from imm_jax.merging.statistics import Source

OPTIONS = (deltas.WEIGHTS, deltas.DENSITIES, deltas.SCALE, deltas.NORMALIZE, deltas.RESCALE)
PAPER = "https://arxiv.org/abs/2311.03099"


def _prepare(source: Source, settings: Settings) -> tuple[Any, dict[str, Any]]:
  return deltas.prepare(source, settings, deltas.drop_steps(source, settings), ("normalize", "rescale"))


@method("base", "models", reference=PAPER, options=OPTIONS, prepare=_prepare, draws=True, gradients="masks")
def dare_linear(tensors: Tensors, numbers: Numbers, shared: Shared, *, normalize: bool, rescale: bool) -> jax.Array:
  """Applies task arithmetic to task vectors after DARE: base + scale * sum_i w_i DARE(t_i - base).

  Densities are 1 - p, and 0 leaves a model out; model i draws its masks with `fold_in(key, i)`.

  >>> import jax.numpy as jnp
  >>> merged = dare_linear({"w": jnp.zeros(99)}, [{"w": jnp.ones(99)}], weights=1, densities=0.25,
  ...                      key=jax.random.key(0))
  >>> sorted(set(merged["w"].tolist()))
  [0.0, 4.0]
  """
  return deltas.combine(tensors, numbers, shared, sparsify=deltas.drop_at_random(numbers, shared, rescale=rescale),
                        normalize=normalize)


@method("base", "models", reference=PAPER, options=OPTIONS, prepare=_prepare, draws=True, gradients="masks")
def dare_ties(tensors: Tensors, numbers: Numbers, shared: Shared, *, normalize: bool, rescale: bool) -> jax.Array:
  """Applies TIES with DARE in place of trimming: signs are elected among the remaining entries.

  Densities are 1 - p, and 0 leaves a model out; model i draws its masks with `fold_in(key, i)`.

  >>> import jax.numpy as jnp
  >>> merged = dare_ties({"w": jnp.zeros(2)}, [{"w": jnp.array([1., 2.])}, {"w": jnp.array([-3., 1.])}],
  ...                    weights=1, densities=1, key=jax.random.key(0))
  >>> merged["w"].tolist()
  [-3.0, 3.0]
  """
  return deltas.combine(tensors, numbers, shared, sparsify=deltas.drop_at_random(numbers, shared, rescale=rescale),
                        normalize=normalize, elect_signs=True)
