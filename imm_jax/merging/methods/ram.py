"""`ram` and `ramplus_tl`: keep changes that only one model has made in full."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from imm_jax.merging import kernels, masks, statistics
from imm_jax.merging.kernels import Numbers, Shared, Tensors
from imm_jax.merging.options import Option, Settings
from imm_jax.merging.registry import TensorNumbers, method
from imm_jax.merging.statistics import Source

EPSILON = Option("threshold", "a change up to this counts as none", 1e-5, low=0, key="epsilon")
PAPER = "https://arxiv.org/abs/2601.13572"


def _changed(tensors: Sequence[jax.Array], threshold: Any) -> tuple[list[jax.Array], jax.Array]:
  """Returns which entries each model has changed, and in how many models each entry has changed."""
  changed = [jnp.abs(v) > threshold for v in statistics.task_vectors(tensors)]
  return changed, sum(c.astype(jnp.int32) for c in changed)


def _combine(tensors: Tensors, numbers: Numbers, shared: Shared, factors: Sequence[Any]) -> jax.Array:
  changed, count = _changed(tensors, numbers["threshold"])
  scale_entries = lambda vector, factor: jnp.where(count == 1, kernels.pin(vector * factor, shared),
                                                   vector / jnp.maximum(count, 1).astype(jnp.float32))
  return tensors[0] + kernels.add([jnp.where(c, scale_entries(v, f), 0.0) for c, v, f in zip(
      changed, statistics.task_vectors(tensors), factors, strict=True)])


def _threshold(settings: Settings, name: str) -> np.float32:
  return np.float32(masks.require_concrete(settings.value("threshold", name), "threshold", name))


def _prepare_ram(source: Source, settings: Settings) -> tuple[Any, dict[str, Any]]:
  del source
  return (lambda name: {"threshold": _threshold(settings, name)}), {}


@method("base", "models", reference=PAPER, options=(EPSILON,), prepare=_prepare_ram, gradients="masks")
def ram(tensors: Tensors, numbers: Numbers, shared: Shared) -> jax.Array:
  """Adds changes that only one model has made in full, and the mean of those that several have (RAM).

  RAM is Reinforced Agent Merging.

  >>> import jax.numpy as jnp
  >>> ram({"w": jnp.zeros(3)}, [{"w": jnp.array([3., 1., 0.])}, {"w": jnp.array([0., 2., 0.])}])["w"].tolist()
  [3.0, 1.5, 0.0]
  """
  return _combine(tensors, numbers, shared, [1.0] * (len(tensors) - 1))


def _counts(tensors: Sequence[jax.Array], *, threshold: ArrayLike) -> jax.Array:
  """Counts, as int32 [2, n], the changed entries that each model shares with others, and those that it alone has."""
  changed, count = _changed([t.astype(jnp.float32) for t in tensors], threshold)
  return jnp.stack([jnp.stack([jnp.sum(c & where) for c in changed]) for where in (count > 1, count == 1)])


def _prepare(source: Source, settings: Settings) -> tuple[Any, dict[str, Any]]:
  def numbers(name: str) -> TensorNumbers:
    threshold = _threshold(settings, name)
    if source.traced:
      shared, unique = _counts(source.tensors(name), threshold=threshold)
    else:
      (_, (shared, unique)), = source.reduce(_counts, np.add, lambda _: {"threshold": threshold}, names=[name])
    xp = statistics.namespace(shared)
    ratio = xp.clip(shared / xp.maximum(unique, threshold), 0, settings.value("alpha", name))
    return {"factors": 1 + settings.value("r", name) * ratio, "threshold": threshold}

  return numbers, {}


@method("base", "models", reference=PAPER, prepare=_prepare, gradients="masks", options=(
    Option("r", "how much to amplify unique changes for shared ones", 0.1),
    Option("alpha", "the largest ratio of shared to unique changes that counts", 0.2, low=0), EPSILON))
def ramplus_tl(tensors: Tensors, numbers: Numbers, shared: Shared) -> jax.Array:
  """Merges as `ram` does, and amplifies changes that only one model has made by 1 + r min(shared / unique, alpha).

  `shared` and `unique` count the entries of a tensor that the model and others, or only the model, have changed.

  >>> import jax.numpy as jnp
  >>> a, b = {"w": jnp.array([3., 1., 0.])}, {"w": jnp.array([0., 2., 0.])}
  >>> ramplus_tl({"w": jnp.zeros(3)}, [a, b], r=1, alpha=0.5)["w"].tolist()
  [4.5, 1.5, 0.0]
  """
  return _combine(tensors, numbers, shared, numbers["factors"])
