"""The methods as plans: which kernel runs, and with which numbers on which tensor.

A plan function takes a `Source` (models in memory or on disk) and the method's options, checks them, measures what must
be known of whole tensors, and returns a `Plan`. What the options mean stands in `pytree`, whose functions have the same
names.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from imm_jax.merging import kernels, masks, statistics
from imm_jax.merging.statistics import Source
from imm_jax.merging.trees import Setting, count_layers, layer_of, resolve

Scalars = dict[str, np.ndarray]
# One setting for all models, or one for each.
PerModel = Setting | Sequence[Setting]


@dataclasses.dataclass(frozen=True)
class Plan:
  """How to merge a tensor.

  Attributes:
    kernel: (tensors, scalars, shared) -> merged, without its static options.
    static: options of the kernel that decide what is compiled.
    scalars: tensor name -> the numbers that its merge needs.
    draws: whether the kernel draws a mask, so that rows must be known to it.
  """

  kernel: Callable[..., Any]
  static: Mapping[str, Any]
  scalars: Callable[[str], Scalars]
  draws: bool = False


def linear(source: Source, *, weights: PerModel, normalize: bool = True) -> Plan:
  _require_flags(normalize=normalize)
  weight = _per_model(source, weights, "weights", source.num_models)
  totals = {name: np.float32(weight(name).sum(dtype=np.float32)) for name in source.names}
  if normalize:
    _require_totals(totals)
  divide = normalize and any(total != 1 for total in totals.values())
  return Plan(kernels.linear, {"divide": divide}, lambda name: {"weight": weight(name), "total": totals[name]})


def imm(source: Source, *, base_weight: Setting, drop_rate: Setting) -> Plan:
  return _imm(source, base_weight, drop_rate, None)


def iimm(source: Source, *, base_weight: Setting, drop_rate: Setting, importance: Sequence[float]) -> Plan:
  return _imm(source, base_weight, drop_rate, _shares(importance, source.names))


def _imm(source: Source, base_weight: Setting, drop_rate: Setting, shares: np.ndarray | None) -> Plan:
  layers = count_layers(source.names)

  def scalars(name: str) -> Scalars:
    steps = masks.quantise_drop_rate(resolve(drop_rate, name, layers, "drop_rate"))
    weight = resolve(base_weight, name, layers, "base_weight")
    if not 0 <= weight <= 1:
      raise ValueError(f"base_weight={weight}: expected 0 <= base_weight <= 1")
    layer = layer_of(name)
    share = 1.0 if shares is None or layer is None else shares[layer]
    return {"base_weight": np.float32(weight), "gain": np.float32(share * masks.STEPS / (masks.STEPS - steps)),
            "steps": np.uint32(steps), "code": masks.tensor_code(name)}

  # All of them at once: a value that cannot work ends the merge before it begins.
  known = {name: scalars(name) for name in source.names}
  draw = any(s["steps"] for s in known.values())
  return Plan(kernels.imm, {"draw": draw}, known.__getitem__, draws=draw)


def dare(source: Source, *, drop_rate: Setting) -> Plan:
  layers = count_layers(source.names)

  def scalars(name: str) -> Scalars:
    steps = masks.quantise_drop_rate(resolve(drop_rate, name, layers, "drop_rate"))
    return {"gain": np.float32(masks.STEPS / (masks.STEPS - steps)), "steps": np.uint32(steps),
            "code": masks.tensor_code(name)}

  known = {name: scalars(name) for name in source.names}
  return Plan(kernels.dare, {}, known.__getitem__, draws=True)


def task_arithmetic(source: Source, *, weights: PerModel, scale: Setting = 1.0, normalize: bool = False) -> Plan:
  return _task_vectors(source, weights, scale, normalize, lambda _: {}, sparsify=None)


def ties(source: Source, *, weights: PerModel = 1.0, densities: PerModel, scale: Setting = 1.0,
         normalize: bool = True) -> Plan:
  density = _fractions(source, densities, "densities")
  # Trimmed over the whole model; where densities differ by tensor, over those with the same one.
  groups = {name: tuple(density(name).tolist()) for name in source.names}
  sizes: dict[Any, int] = {}
  for name in source.names:
    for i, value in enumerate(groups[name]):
      sizes[i, value] = sizes.get((i, value), 0) + source.size(name)
  group_of = {name: [(i, value) for i, value in enumerate(groups[name])] for name in source.names}
  bands = {group: _largest(sizes[group], group[1]) for group in sizes}
  limits = _limits(source, bands, group_of, source.names)
  return _task_vectors(source, weights, scale, normalize, limits, sparsify="magnitude", elect=True)


def breadcrumbs(source: Source, *, weights: PerModel, densities: PerModel, gammas: PerModel = 0.01,
                scale: Setting = 1.0, normalize: bool = False) -> Plan:
  density, gamma = _fractions(source, densities, "densities"), _fractions(source, gammas, "gammas")

  def band(name: str, i: int) -> tuple[int, int]:
    size, kept = source.size(name), int(density(name)[i] * source.size(name))
    if density(name)[i] >= 1:
      return 0, size - 1
    first = max(0, size - kept - int(gamma(name)[i] * size))
    return first, first + kept - 1

  def limits(name: str) -> Scalars:  # of one tensor when it is due, so that not all are held
    groups = list(range(source.num_models - 1))
    return _limits(source, {i: band(name, i) for i in groups}, {name: groups}, [name])(name)

  return _task_vectors(source, weights, scale, normalize, limits, sparsify="magnitude")


def dare_linear(source: Source, *, weights: PerModel, densities: PerModel, scale: Setting = 1.0,
                normalize: bool = False, rescale: bool = True) -> Plan:
  return _task_vectors(source, weights, scale, normalize, _drop_steps(source, densities), sparsify="random",
                       rescale=rescale)


def dare_ties(source: Source, *, weights: PerModel, densities: PerModel, scale: Setting = 1.0, normalize: bool = False,
              rescale: bool = True) -> Plan:
  return _task_vectors(source, weights, scale, normalize, _drop_steps(source, densities), sparsify="random", elect=True,
                       rescale=rescale)


def della(source: Source, *, weights: PerModel, densities: PerModel, epsilons: PerModel = 0.15, scale: Setting = 1.0,
          normalize: bool = True, rescale: bool = True) -> Plan:
  density, epsilon = _fractions(source, densities, "densities"), _fractions(source, epsilons, "epsilons")
  for name in source.names:
    for d, e in zip(density(name), epsilon(name), strict=True):
      if not (d == 1 or (d - e > 0 and d + e < 1)):
        raise ValueError(f"densities, epsilons: {d:g} and {e:g} at {name!r}; expected 0 < density - epsilon and "
                         "density + epsilon < 1, or a density of 1")

  def table(name: str) -> np.ndarray:
    ranks = statistics.mean_ranks(source, name)
    least = density(name) - epsilon(name) * (density(name) < 1)
    kept = least[:, None] + 2 * ranks * (density(name) - least)[:, None]
    return np.rint((1 - kept) * masks.STEPS).clip(0, masks.STEPS - 1).astype(np.uint16)

  extra = lambda name: {"table": table(name), "code": masks.tensor_code(name)}
  return _task_vectors(source, weights, scale, normalize, extra, sparsify="ranked", elect=True, rescale=rescale)


def slerp(source: Source, *, t: Setting) -> Plan:
  layers = count_layers(source.names)
  at = {name: resolve(t, name, layers, "t") for name in source.names}
  coefficients = {}
  for name, (_, cosine) in statistics.cosines(source, deltas=False).items():
    share, cos = at[name], float(cosine[0, 1])
    if abs(cos) > 0.9995:  # (nearly) on one line: the arc is a chord, and sin(theta) no divisor
      coefficients[name] = np.array([1 - share, share], np.float32)
    else:
      theta = np.arccos(cos)
      coefficients[name] = (np.sin([(1 - share) * theta, share * theta]) / np.sin(theta)).astype(np.float32)
  return Plan(kernels.pair, {}, lambda name: {"coefficient": coefficients[name]})


def model_stock(source: Source) -> Plan:
  count = source.num_models - 1
  pairs = np.triu_indices(count, 1)
  ratios = {}
  for name, (_, cosine) in statistics.cosines(source, deltas=True).items():
    mean = cosine[pairs].mean()
    divisor = 1 + (count - 1) * mean
    # Deltas that cancel leave no direction: the base stays.
    ratios[name] = np.float32(count * mean / divisor if abs(divisor) > 1e-6 else 0.0)
  return Plan(kernels.average_and_base, {}, lambda name: {"ratio": ratios[name], "count": np.float32(count)})


def _task_vectors(source: Source, weights: PerModel, scale: Setting, normalize: bool,
                  extra: Callable[[str], Scalars], *, sparsify: str | None, elect: bool = False,
                  rescale: bool = False) -> Plan:
  _require_flags(normalize=normalize, rescale=rescale)
  weight = _per_model(source, weights, "weights", source.num_models - 1)
  layers = count_layers(source.names)

  def scalars(name: str) -> Scalars:
    total = weight(name).sum(dtype=np.float32)
    return {"weight": weight(name), "total": np.float32(total if abs(total) > 1e-8 else 1),
            "scale": np.float32(resolve(scale, name, layers, "scale")), **extra(name)}

  static = {"sparsify": sparsify, "elect": elect, "normalize": normalize, "rescale": rescale}
  return Plan(kernels.task_vectors, static, scalars, draws=sparsify in ("random", "ranked"))


def _limits(source: Source, bands: Mapping[Any, tuple[int, int]], group_of: Mapping[str, Sequence[Any]],
            names: Sequence[str]) -> Callable[[str], Scalars]:
  """Bits of the least and the greatest magnitude that stays, where the ranks of a band of each group stay."""
  ranks = {group: np.maximum(band, 0) for group, band in bands.items()}
  bits = statistics.magnitudes_of_rank(source, ranks, group_of, names)

  def limits(name: str) -> Scalars:
    found = np.stack([bits[group, i] for i, group in enumerate(group_of[name])])
    for i, group in enumerate(group_of[name]):
      if bands[group][1] < bands[group][0]:
        found[i] = (np.uint32(0xFFFFFFFF), 0)  # nothing stays
    return {"low": found[:, 0], "high": found[:, 1]}

  return limits


def _largest(size: int, density: float) -> tuple[int, int]:
  """Ranks of the share of largest magnitudes: at least one entry of a density that is not 0."""
  return (size - max(1, int(density * size)) if density > 0 else size), size - 1


def _drop_steps(source: Source, densities: PerModel) -> Callable[[str], Scalars]:
  density = _per_model(source, densities, "densities", source.num_models - 1)
  steps = {name: np.array([masks.quantise_drop_rate(1 - d, "1 - density") for d in density(name).tolist()], np.uint32)
           for name in source.names}
  return lambda name: {"steps": steps[name], "code": masks.tensor_code(name)}


def _per_model(source: Source, settings: PerModel, what: str, count: int, dtype: type = np.float32,
               ) -> Callable[[str], np.ndarray]:
  """Tensor name -> [count], a setting's value for every model."""
  if isinstance(settings, Sequence | np.ndarray) and not isinstance(settings, str):
    if len(settings) != count:
      raise ValueError(f"{what}: {len(settings)} of them for {count} models; expected one for each, or one number")
    each = list(settings)
  else:
    each = [settings] * count
  layers = count_layers(source.names)
  values = {name: np.array([resolve(setting, name, layers, what) for setting in each], dtype) for name in source.names}
  return values.__getitem__


def _fractions(source: Source, settings: PerModel, what: str) -> Callable[[str], np.ndarray]:
  values = _per_model(source, settings, what, source.num_models - 1, np.float64)
  for name in source.names:
    if not ((values(name) >= 0) & (values(name) <= 1)).all():
      raise ValueError(f"{what}: {values(name).tolist()} at {name!r}; expected values from 0 to 1")
  return values


def _require_flags(**flags: bool) -> None:
  for name, value in flags.items():
    if not isinstance(value, bool | np.bool_):
      raise ValueError(f"{name}={value!r}: expected True or False")


def _require_totals(totals: Mapping[str, np.floating]) -> None:
  for name, total in totals.items():
    if total == 0:
      raise ValueError(f"weights: they add up to 0 at {name!r}, which cannot be normalised")


def _shares(importance: Sequence[float], names: Sequence[str]) -> np.ndarray:
  """N I_n / sum(I) for every layer (IIMM, eq. 7)."""
  try:
    scores = np.asarray(importance, np.float64)
  except (TypeError, ValueError):
    scores = np.zeros(())
  if scores.ndim != 1 or not np.isfinite(scores).all() or (scores < 0).any() or scores.sum() <= 0:
    raise ValueError("importance: expected one finite score >= 0 for each layer, with a positive sum")
  if len(scores) != count_layers(names):
    raise ValueError(f"importance has {len(scores)} scores, but the names have {count_layers(names)} layers, such as "
                     f"{names[-1] if names else 'none'}")
  return scores * len(scores) / scores.sum()


METHODS: Mapping[str, Callable[..., Plan]] = {f.__name__: f for f in (
    linear, imm, iimm, task_arithmetic, ties, breadcrumbs, dare_linear, dare_ties, della, slerp, model_stock)}


def options(method: str) -> dict[str, bool]:
  """What a method takes beside its models, and whether it must be given.

  >>> options("ties")
  {'weights': False, 'densities': True, 'scale': False, 'normalize': False}
  """
  parameters = inspect.signature(METHODS[method]).parameters.values()
  return {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}
