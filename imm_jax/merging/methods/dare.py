"""`dare`: random dropping of a delta, without a merge."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax.merging import kernels, masks
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option, Settings
from imm_jax.merging.registry import TensorNumbers, method
from imm_jax.merging.statistics import Source


def _prepare(source: Source, settings: Settings) -> tuple[Any, dict[str, Any]]:
  def numbers(name: str) -> TensorNumbers:
    steps = masks.drop_steps(settings.value("drop_rate", name), name)
    return {"gain": np.float32(masks.STEPS / (masks.STEPS - steps)), "steps": np.uint32(steps),
            "code": masks.tensor_code(name)}

  by_name = {name: numbers(name) for name in source.names}
  return by_name.__getitem__, {}


@method("delta", reference="https://arxiv.org/abs/2311.03099", prepare=_prepare, draws=True, gradients="masks",
        options=(Option("drop_rate", "p, the share of entries to drop", low=0, high=1, excludes_high=True),))
def dare(tensors: Tensors, numbers: Numbers, shared: Shared) -> jax.Array:
  """Drops entries of a delta at random and rescales the rest to preserve its mean (DARE, eq. 1-2).

  m ~ Bernoulli(p), delta' = (1 - m) * delta / (1 - p), with p quantized to 1/65536.

  >>> import jax.numpy as jnp
  >>> kept = dare({"w": jnp.ones((64, 64))}, drop_rate=0.5, key=jax.random.key(0))["w"]
  >>> sorted(set(kept.ravel().tolist()))
  [0.0, 2.0]
  """
  delta, = tensors
  dropped = kernels.drop_mask(delta.shape, numbers["code"], numbers["steps"], shared)
  return jnp.where(dropped, 0.0, delta * numbers["gain"])
