"""Merging models as jitted maps over pytrees: means, IMM, arcs; `task_vectors` has the methods on several deltas.

All functions share this:

- Trees hold arrays of any kind and must match in paths and shapes. Floating leaves are merged in float32 from what
  is stored and rounded once to the first tree's dtype; other leaves must be equal and are copied. A leaf that stands
  in two places of every tree (tied weights) is merged once.
- `names` gives tensor names in a tree of the same form; a tuple names the tensors stacked on a leaf's first axis, so
  that stacked layers and single ones give the same bits. Without it the path of a leaf is its name.
- A setting is a number, a list that is interpolated over the layers, or a mapping from a regex of tensor names to
  either (the first match counts). `weights`, `densities` and the like take one setting for all models, or a sequence
  with one for each (so a list over layers stands in a second list).
- The result lies where the first tree lies, shard by shard. `donate=True` gives that tree's memory to the result.
- What does not fit is a ValueError that names every path, or the value and what would be right.
"""

from collections.abc import Sequence

import jax

from imm_jax.merging import in_memory, methods
from imm_jax.merging.in_memory import TreeSource
from imm_jax.merging.methods import PerModel
from imm_jax.merging.trees import PyTree, Setting


def linear(models: Sequence[PyTree], *, weights: PerModel, normalize: bool = True, names: PyTree | None = None,
           donate: bool = False) -> PyTree:
  """The weighted mean (model soups, arXiv:2203.05482): sum_i w_i t_i / sum_i w_i.

  Args:
    models: one tree or more.
    weights: w, any sign.
    normalize: divide by the sum of the weights.
    names: see the module.
    donate: see the module.

  Returns:
    The merged tree.

  Raises:
    ValueError: see the module; also for weights to be normalised that add up to 0.

  >>> import jax.numpy as jnp
  >>> linear([{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}], weights=[1, 3])["w"].tolist()
  [0.75, 0.75]
  """
  source = TreeSource({f"models[{i}]": model for i, model in enumerate(models)}, names)
  return in_memory.run(methods.linear(source, weights=weights, normalize=normalize), source, donate=donate)


def dare(delta: PyTree, *, drop_rate: Setting, key: jax.Array, names: PyTree | None = None,
         donate: bool = False) -> PyTree:
  """Drops entries of a delta at random and rescales the rest, so that its mean stays (DARE, arXiv:2311.03099, eq. 1-2).

  m ~ Bernoulli(p), delta' = (1 - m) * delta / (1 - p), with p quantised to 1/65536.

  Args:
    delta: tuned minus base.
    drop_rate: p, in [0, 1).
    key: a threefry key, `jax.random.key(seed)`; `masks` says what it decides.
    names: see the module.
    donate: see the module.

  Returns:
    The tree with the same dtypes.

  Raises:
    ValueError: see the module.

  >>> import jax.numpy as jnp
  >>> kept = dare({"w": jnp.ones((64, 64))}, drop_rate=0.5, key=jax.random.key(0))["w"]
  >>> sorted(set(kept.ravel().tolist()))
  [0.0, 2.0]
  """
  source = TreeSource({"delta": delta}, names)
  return in_memory.run(methods.dare(source, drop_rate=drop_rate), source, key=key, donate=donate)


def imm(base: PyTree, start: PyTree, tuned: PyTree, *, base_weight: Setting, drop_rate: Setting, key: jax.Array,
        names: PyTree | None = None, donate: bool = False) -> PyTree:
  """Merges a tuned model with the base, in one pass (IMM, eq. 5 and 6).

  delta = tuned - start; delta' = DARE(delta); merged = a * base + (1 - a) * (start + delta').

  At a drop rate of 0 that is a * base + (1 - a) * tuned; a base weight of 1 or 0 gives the base or start + delta'
  exactly.

  Args:
    base: the model all rounds are merged with.
    start: the model that was tuned; the base in the first round.
    tuned: the model after SFT.
    base_weight: a, in [0, 1].
    drop_rate: DARE's p, in [0, 1).
    key: a threefry key, `jax.random.key(seed)`.
    names: see the module.
    donate: see the module.

  Returns:
    The merged tree in the base's dtypes.

  Raises:
    ValueError: see the module.

  >>> import jax.numpy as jnp
  >>> merged = imm({"w": jnp.zeros(3)}, {"w": jnp.zeros(3)}, {"w": jnp.ones(3)}, base_weight=0.25, drop_rate=0.0,
  ...              key=jax.random.key(0))
  >>> merged["w"].tolist()
  [0.75, 0.75, 0.75]
  """
  source = TreeSource({"base": base, "start": start, "tuned": tuned}, names)
  return in_memory.run(methods.imm(source, base_weight=base_weight, drop_rate=drop_rate), source, key=key,
                       donate=donate)


def iimm(base: PyTree, start: PyTree, tuned: PyTree, *, base_weight: Setting, drop_rate: Setting,
         importance: Sequence[float], key: jax.Array, names: PyTree | None = None, donate: bool = False) -> PyTree:
  """IMM with every layer's delta scaled by its importance (IIMM, eq. 7).

  Layer n's delta' is multiplied by N * I_n / sum(I) before eq. 6; tensors outside the layers keep theirs.

  Args:
    base: see `imm`.
    start: see `imm`.
    tuned: see `imm`.
    base_weight: see `imm`.
    drop_rate: see `imm`.
    importance: I, [N] layer importance scores, not negative, with a positive sum.
    key: see `imm`.
    names: see the module; tensors with `layers.<n>.` in their names belong to layer n.
    donate: see the module.

  Returns:
    The merged tree in the base's dtypes.

  Raises:
    ValueError: see the module; also for importance that is no such vector, or a layer it does not cover.

  >>> import jax.numpy as jnp
  >>> tree = lambda x: {"layers": [{"w": jnp.full(2, x)}, {"w": jnp.full(2, x)}]}
  >>> merged = iimm(tree(0.), tree(0.), tree(1.), base_weight=0., drop_rate=0., importance=[1., 3.],
  ...               key=jax.random.key(0))
  >>> [layer["w"].tolist() for layer in merged["layers"]]
  [[0.5, 0.5], [1.5, 1.5]]
  """
  source = TreeSource({"base": base, "start": start, "tuned": tuned}, names)
  plan = methods.iimm(source, base_weight=base_weight, drop_rate=drop_rate, importance=importance)
  return in_memory.run(plan, source, key=key, donate=donate)


def slerp(base: PyTree, other: PyTree, *, t: Setting, names: PyTree | None = None, donate: bool = False) -> PyTree:
  """Goes from one model to another along an arc, tensor by tensor (Shoemake 1985).

  (sin((1 - t) theta) base + sin(t theta) other) / sin(theta), theta the angle between the two tensors as vectors; on a
  straight line where |cos(theta)| > 0.9995. A zero tensor is at a right angle to everything.

  Args:
    base: where t = 0.
    other: where t = 1.
    t: any number; between 0 and 1 to stay between the two.
    names: see the module.
    donate: see the module.

  Returns:
    The merged tree in the base's dtypes.

  Raises:
    ValueError: see the module; also for values that are not finite, and under jax.jit, for it looks at values first.

  >>> import jax.numpy as jnp
  >>> merged = slerp({"w": jnp.array([1., 0.])}, {"w": jnp.array([0., 1.])}, t=0.5)
  >>> merged["w"].round(4).tolist()
  [0.707099974155426, 0.707099974155426]
  """
  source = TreeSource({"base": base, "other": other}, names)
  return in_memory.run(methods.slerp(source, t=t), source, donate=donate)


def model_stock(base: PyTree, models: Sequence[PyTree], *, names: PyTree | None = None,
                donate: bool = False) -> PyTree:
  """Weighs the mean of the models against the base by the angle between their task vectors (arXiv:2403.19522, eq. 2).

  r * mean_i(t_i) + (1 - r) * base, tensor by tensor, r = n c / (1 + (n - 1) c) with c the mean cosine between the
  task vectors of n models; r = 0 where they cancel.

  Args:
    base: the model that all were tuned from.
    models: two trees or more.
    names: see the module.
    donate: see the module.

  Returns:
    The merged tree in the base's dtypes.

  Raises:
    ValueError: see the module; also for fewer than two models, values that are not finite, and under jax.jit, for it
      looks at values first.

  >>> import jax.numpy as jnp
  >>> merged = model_stock({"w": jnp.zeros(2)}, [{"w": jnp.array([1., 0.])}, {"w": jnp.array([1., 0.])}])
  >>> merged["w"].tolist()
  [1.0, 0.0]
  """
  if len(models) < 2:
    raise ValueError(f"models: {len(models)} given; model_stock compares two or more")
  source = TreeSource.with_base(base, models, names)
  return in_memory.run(methods.model_stock(source), source, donate=donate)
