"""Merging methods on task vectors, what tuned models have less their base, as jitted maps over pytrees.

What they share stands in `pytree`.
"""

from collections.abc import Sequence

import jax

from imm_jax.merging import in_memory, methods
from imm_jax.merging.in_memory import TreeSource
from imm_jax.merging.methods import PerModel
from imm_jax.merging.trees import PyTree, Setting


def task_arithmetic(base: PyTree, models: Sequence[PyTree], *, weights: PerModel, scale: Setting = 1.0,
                    normalize: bool = False, names: PyTree | None = None, donate: bool = False) -> PyTree:
  """Adds weighted task vectors to a base (arXiv:2212.04089): base + scale * sum_i w_i (t_i - base).

  Args:
    base: the model that all were tuned from.
    models: t, one tree or more.
    weights: w, any sign; a negative one takes a task away.
    scale: of the sum, the paper's lambda.
    normalize: divide the sum by the sum of the weights.
    names: see `pytree`.
    donate: see `pytree`.

  Returns:
    The merged tree in the base's dtypes.

  Raises:
    ValueError: see `pytree`.

  >>> import jax.numpy as jnp
  >>> task_arithmetic({"w": jnp.ones(1)}, [{"w": jnp.zeros(1)}, {"w": jnp.full(1, 3.)}], weights=[1, 2])["w"].tolist()
  [4.0]
  """
  source = TreeSource.with_base(base, models, names)
  plan = methods.task_arithmetic(source, weights=weights, scale=scale, normalize=normalize)
  return in_memory.run(plan, source, donate=donate)


def ties(base: PyTree, models: Sequence[PyTree], *, weights: PerModel = 1.0, densities: PerModel, scale: Setting = 1.0,
         normalize: bool = True, names: PyTree | None = None, donate: bool = False) -> PyTree:
  """Trims, elects a sign, and averages what agrees (TIES, arXiv:2306.01708).

  Of every task vector the `density` share of largest magnitudes stays, counted over the whole model (entries equal to
  the least one that stays, stay too; where densities differ by tensor, tensors of equal density are counted together).
  Entry by entry the sign of sum_i w_i d_i is elected, a sum of 0 counting as positive; the weighted mean of the
  vectors with that sign, times `scale`, is added to the base.

  Args:
    base: the model that all were tuned from.
    models: one tree or more.
    weights: w.
    densities: shares from 0 to 1; one that is not 0 keeps at least one entry.
    scale: of what is added, the paper's lambda.
    normalize: divide by the sum of the weights that agree (the paper's mean); otherwise add the sum.
    names: see `pytree`.
    donate: see `pytree`.

  Returns:
    The merged tree in the base's dtypes.

  Raises:
    ValueError: see `pytree`; also under jax.jit, for it looks at values first.

  >>> import jax.numpy as jnp
  >>> base, a, b = jnp.zeros(4), jnp.array([4., -3., 1., 0.]), jnp.array([2., 5., 1., 0.])
  >>> ties({"w": base}, [{"w": a}, {"w": b}], densities=0.5)["w"].tolist()
  [3.0, 5.0, 0.0, 0.0]
  """
  source = TreeSource.with_base(base, models, names)
  plan = methods.ties(source, weights=weights, densities=densities, scale=scale, normalize=normalize)
  return in_memory.run(plan, source, donate=donate)


def dare_linear(base: PyTree, models: Sequence[PyTree], *, weights: PerModel, densities: PerModel, key: jax.Array,
                scale: Setting = 1.0, normalize: bool = False, rescale: bool = True, names: PyTree | None = None,
                donate: bool = False) -> PyTree:
  """Task arithmetic on task vectors after DARE (arXiv:2311.03099): base + scale * sum_i w_i DARE(t_i - base).

  Args:
    base: the model that all were tuned from.
    models: one tree or more; model i draws its masks with `fold_in(key, i)`.
    weights: w.
    densities: 1 - p, in (0, 1]: the share that stays.
    key: a threefry key.
    scale: of what is added.
    normalize: divide by the sum of the weights.
    rescale: divide what stays by its share, as the paper does.
    names: see `pytree`.
    donate: see `pytree`.

  Returns:
    The merged tree in the base's dtypes.

  Raises:
    ValueError: see `pytree`.

  >>> import jax.numpy as jnp
  >>> merged = dare_linear({"w": jnp.zeros(99)}, [{"w": jnp.ones(99)}], weights=1, densities=0.25,
  ...                      key=jax.random.key(0))
  >>> sorted(set(merged["w"].tolist()))
  [0.0, 4.0]
  """
  source = TreeSource.with_base(base, models, names)
  plan = methods.dare_linear(source, weights=weights, densities=densities, scale=scale, normalize=normalize,
                             rescale=rescale)
  return in_memory.run(plan, source, key=key, donate=donate)


def dare_ties(base: PyTree, models: Sequence[PyTree], *, weights: PerModel, densities: PerModel, key: jax.Array,
              scale: Setting = 1.0, normalize: bool = False, rescale: bool = True, names: PyTree | None = None,
              donate: bool = False) -> PyTree:
  """TIES with DARE in place of trimming (arXiv:2311.03099): signs are elected among what DARE left.

  Args:
    base: the model that all were tuned from.
    models: one tree or more; model i draws its masks with `fold_in(key, i)`.
    weights: w.
    densities: 1 - p, in (0, 1]: the share that stays.
    key: a threefry key.
    scale: of what is added.
    normalize: divide by the sum of the weights that agree.
    rescale: divide what stays by its share, as the paper does.
    names: see `pytree`.
    donate: see `pytree`.

  Returns:
    The merged tree in the base's dtypes.

  Raises:
    ValueError: see `pytree`.

  >>> import jax.numpy as jnp
  >>> merged = dare_ties({"w": jnp.zeros(2)}, [{"w": jnp.array([1., 2.])}, {"w": jnp.array([-3., 1.])}],
  ...                    weights=1, densities=1, key=jax.random.key(0))
  >>> merged["w"].tolist()
  [-3.0, 3.0]
  """
  source = TreeSource.with_base(base, models, names)
  plan = methods.dare_ties(source, weights=weights, densities=densities, scale=scale, normalize=normalize,
                           rescale=rescale)
  return in_memory.run(plan, source, key=key, donate=donate)


def della(base: PyTree, models: Sequence[PyTree], *, weights: PerModel, densities: PerModel, key: jax.Array,
          epsilons: PerModel = 0.15, scale: Setting = 1.0, normalize: bool = True, rescale: bool = True,
          names: PyTree | None = None, donate: bool = False) -> PyTree:
  """Drops small entries more often than large ones, then elects signs and averages (DELLA, arXiv:2406.11617).

  Within a tensor of n entries the one of rank r (0 the smallest magnitude) stays with the probability
  density - epsilon + 2 epsilon r / (n - 1), and is divided by it. Equal magnitudes share their mean rank, and so do
  those that agree in their first 13 binary digits; probabilities are quantised to 1/65536.

  Args:
    base: the model that all were tuned from.
    models: one tree or more; model i draws its masks with `fold_in(key, i)`.
    weights: w.
    densities: mean share that stays; 1 keeps everything.
    key: a threefry key.
    epsilons: half the range of probabilities; density - epsilon and density + epsilon lie between 0 and 1.
    scale: of what is added.
    normalize: divide by the sum of the weights that agree.
    rescale: divide what stays by its probability, as the paper does.
    names: see `pytree`.
    donate: see `pytree`.

  Returns:
    The merged tree in the base's dtypes.

  Raises:
    ValueError: see `pytree`; also under jax.jit, for it looks at values first.

  >>> import jax.numpy as jnp
  >>> merged = della({"w": jnp.zeros(1000)}, [{"w": jnp.arange(1000.)}], weights=1, densities=0.5, epsilons=0.4,
  ...                key=jax.random.key(0), rescale=False)["w"]
  >>> int((merged[:500] != 0).sum()) < 200, int((merged[500:] != 0).sum()) > 300
  (True, True)
  """
  source = TreeSource.with_base(base, models, names)
  plan = methods.della(source, weights=weights, densities=densities, epsilons=epsilons, scale=scale,
                       normalize=normalize, rescale=rescale)
  return in_memory.run(plan, source, key=key, donate=donate)


def breadcrumbs(base: PyTree, models: Sequence[PyTree], *, weights: PerModel, densities: PerModel,
                gammas: PerModel = 0.01, scale: Setting = 1.0, normalize: bool = False, names: PyTree | None = None,
                donate: bool = False) -> PyTree:
  """Task arithmetic without the largest and the smallest entries (Model Breadcrumbs, arXiv:2312.06795).

  Of every tensor's task vector the `gamma` share of largest magnitudes goes, and so many of the smallest that the
  `density` share stays. Entries equal to the first or the last that stays, stay too.

  Args:
    base: the model that all were tuned from.
    models: one tree or more.
    weights: w.
    densities: share of a tensor that stays, from 0 to 1; 1 keeps everything.
    gammas: share of outliers that goes; less where the density leaves no room.
    scale: of what is added.
    normalize: divide by the sum of the weights.
    names: see `pytree`.
    donate: see `pytree`.

  Returns:
    The merged tree in the base's dtypes.

  Raises:
    ValueError: see `pytree`; also under jax.jit, for it looks at values first.

  >>> import jax.numpy as jnp
  >>> merged = breadcrumbs({"w": jnp.zeros(5)}, [{"w": jnp.array([9., -4., 3., 2., 1.])}], weights=1, densities=0.4,
  ...                      gammas=0.2)
  >>> merged["w"].tolist()
  [0.0, -4.0, 3.0, 0.0, 0.0]
  """
  source = TreeSource.with_base(base, models, names)
  plan = methods.breadcrumbs(source, weights=weights, densities=densities, gammas=gammas, scale=scale,
                             normalize=normalize)
  return in_memory.run(plan, source, donate=donate)
