"""`ram` and `ramplus_tl`, which keep whole what one model alone has changed."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax.merging import kernels, statistics
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option, Settings
from imm_jax.merging.registry import Scalars, method
from imm_jax.merging.statistics import Source

EPSILON = Option("threshold", "a change up to this counts as none", 1e-5, low=0, key="epsilon")
PAPER = "https://arxiv.org/abs/2601.13572"


def _changed(tensors: Sequence[jax.Array], threshold: Any) -> tuple[list[jax.Array], jax.Array]:
  """Where each task vector has changed, and in how many."""
  changed = [jnp.abs(v) > threshold for v in statistics.task_vectors(tensors)]
  return changed, sum(c.astype(jnp.int32) for c in changed)


def _combine(tensors: Tensors, numbers: Numbers, shared: Shared, factors: Sequence[Any]) -> jax.Array:
  changed, count = _changed(tensors, numbers["threshold"])
  of = lambda vector, factor: jnp.where(count == 1, kernels.pin(vector * factor, shared),
                                        vector / jnp.maximum(count, 1).astype(jnp.float32))
  return tensors[0] + kernels.add([jnp.where(c, of(v, f), 0.0) for c, v, f in zip(
      changed, statistics.task_vectors(tensors), factors, strict=True)])


@method("base", "models", reference=PAPER, options=(EPSILON,), gradients="masks")
def ram(tensors: Tensors, numbers: Numbers, shared: Shared) -> jax.Array:
  """Adds what one model alone has changed whole, and of what several have changed the mean (Reinforced Agent Merging).

  >>> import jax.numpy as jnp
  >>> ram({"w": jnp.zeros(3)}, [{"w": jnp.array([3., 1., 0.])}, {"w": jnp.array([0., 2., 0.])}])["w"].tolist()
  [3.0, 1.5, 0.0]
  """
  return _combine(tensors, numbers, shared, [1.0] * (len(tensors) - 1))


def _counts(tensors: Sequence[jax.Array], *, threshold: jax.Array) -> jax.Array:
  """int32 [2, n]: entries that a model shares with others, and that it alone has changed."""
  changed, count = _changed([t.astype(jnp.float32) for t in tensors], threshold)
  return jnp.stack([jnp.stack([jnp.sum(c & where) for c in changed]) for where in (count > 1, count == 1)])


def _prepare(source: Source, settings: Settings) -> tuple[Any, dict[str, Any]]:
  def scalars(name: str) -> Scalars:
    threshold = np.float32(settings.of("threshold", name))
    if source.traced:
      shared, alone = _counts(source.tensors(name), threshold=threshold)
    else:
      (_, (shared, alone)), = source.reduce(_counts, np.add, lambda _: {"threshold": threshold}, names=[name])
    xp = statistics.namespace(shared)
    share = xp.clip(shared / xp.maximum(alone, threshold), 0, settings.of("alpha", name))
    return {"factors": 1 + settings.of("r", name) * share, "threshold": threshold}

  return scalars, {}


@method("base", "models", reference=PAPER, prepare=_prepare, gradients="masks", options=(
    Option("r", "how much is added for what is shared", 0.1), Option("alpha", "the most that shared counts", 0.2,
                                                                           low=0), EPSILON))
def ramplus_tl(tensors: Tensors, numbers: Numbers, shared: Shared) -> jax.Array:
  """As `ram`, but what one model alone has changed is times 1 + r min(shared / alone, alpha), by tensor.

  `shared` and `alone` are how many entries of the tensor a model has changed with others and by itself.

  >>> import jax.numpy as jnp
  >>> a, b = {"w": jnp.array([3., 1., 0.])}, {"w": jnp.array([0., 2., 0.])}
  >>> ramplus_tl({"w": jnp.zeros(3)}, [a, b], r=1, alpha=0.5)["w"].tolist()
  [4.5, 1.5, 0.0]
  """
  return _combine(tensors, numbers, shared, numbers["factors"])
