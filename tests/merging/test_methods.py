"""Every merging method against its equation in float64 numpy."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from imm_jax import merging
from tests.merging.cases import BASE, CASES, DENSITIES, KEY, SHAPES, WEIGHTS, A, B, C, call


def deltas(name):
  return [model[name].astype(np.float64) - BASE[name].astype(np.float64) for model in (A, B, C)]


def elected(weighted, weights):
  """TIES: the mean of what has the sign of the sum."""
  sign = np.where(sum(weighted) >= 0, 1, -1)
  agree = [np.sign(d) == sign for d in weighted]
  total = sum(np.where(m, w, 0.0) for m, w in zip(agree, weights, strict=True))
  return sum(np.where(m, d, 0.0) for m, d in zip(agree, weighted, strict=True)), np.where(total == 0, 1, total)


def test_linear_is_the_weighted_mean():
  got = call("linear", (BASE, A, B, C))
  for name in SHAPES:
    expected = sum(w * m[name].astype(np.float64) for w, m in zip(WEIGHTS, (A, B, C), strict=True)) / sum(WEIGHTS)
    np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-6)
  total = merging.linear([A, B], weights=[2, 3], normalize=False)
  np.testing.assert_allclose(total["scale"], 2 * A["scale"] + 3 * B["scale"], rtol=1e-6)


def test_task_arithmetic_adds_weighted_deltas():
  got = call("task_arithmetic", (BASE, A, B, C))
  for name in SHAPES:
    expected = BASE[name] + 0.8 * sum(w * d for w, d in zip(WEIGHTS, deltas(name), strict=True))
    np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-6)
  mean = merging.task_arithmetic(BASE, [A, B], weights=[1, 3], normalize=True)
  np.testing.assert_allclose(mean["scale"], BASE["scale"] * 0 + (A["scale"] + 3 * B["scale"]) / 4, rtol=1e-5)


def test_ties_trims_over_the_model_then_elects_signs():
  got = call("ties", (BASE, A, B, C), scope="model")
  size = sum(math.prod(s) for s in SHAPES.values())
  floors = []
  for i, density in enumerate(DENSITIES):
    magnitudes = np.sort(np.concatenate([np.abs(deltas(name)[i]).ravel() for name in SHAPES]))
    floors.append(magnitudes[size - int(density * size)])
  weights = [0.7, 0.3, 0.5]
  for name in SHAPES:
    trimmed = [np.where(np.abs(d) >= floor, d, 0) for d, floor in zip(deltas(name), floors, strict=True)]
    mixed, total = elected([w * d for w, d in zip(weights, trimmed, strict=True)], weights)
    np.testing.assert_allclose(got[name], BASE[name] + mixed / total, rtol=1e-5, atol=1e-6)


def test_ties_keeps_all_entries_of_equal_magnitude():
  """mergekit keeps int(density * n) of them, whichever its sort puts first."""
  tuned = {"w": np.array([1, -1, 1, 1, 3], np.float32)}
  got = merging.ties({"w": np.zeros(5, np.float32)}, [tuned], densities=0.4)
  assert got["w"].tolist() == [1, -1, 1, 1, 3]
  assert merging.ties({"w": np.zeros(5, np.float32)}, [tuned], densities=0.2)["w"].tolist() == [0, 0, 0, 0, 3]
  assert merging.ties({"w": np.zeros(5, np.float32)}, [tuned], densities=0.0)["w"].tolist() == [0] * 5


def test_breadcrumbs_drops_both_extremes():
  """The outliers and the small entries of each tensor are dropped."""
  got = call("breadcrumbs", (BASE, A, B, C))
  for name, shape in SHAPES.items():
    size, kept = math.prod(shape), []
    for density, d in zip(DENSITIES, deltas(name), strict=True):
      count = int(density * size)
      first = max(0, size - count - int(0.2 * size))
      order = np.sort(np.abs(d), axis=None)
      band = (order[first], order[first + count - 1]) if count else (np.inf, 0)
      kept.append(np.where((np.abs(d) >= band[0]) & (np.abs(d) <= band[1]), d, 0))
    expected = BASE[name] + sum(w * d for w, d in zip(WEIGHTS, kept, strict=True))
    np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_methods_combine_thinned_deltas(method):
  """Deltas that DARE has thinned."""
  got = call(method, (BASE, A, B, C))
  weights = CASES[method]["weights"]
  thinned = [merging.dare({n: x - BASE[n] for n, x in model.items()}, drop_rate=1 - density,
                          key=jax.random.fold_in(KEY, i))
             for i, (model, density) in enumerate(zip((A, B, C), DENSITIES, strict=True))]
  for name in SHAPES:
    weighted = [w * np.asarray(t[name], np.float64) for w, t in zip(weights, thinned, strict=True)]
    mixed = sum(weighted) if method == "dare_linear" else elected(weighted, weights)[0]
    np.testing.assert_allclose(got[name], BASE[name] + mixed, rtol=1e-4, atol=1e-5)


def test_della_favours_large_entries():
  """It keeps them more often, and stays unbiased."""
  n, density, epsilon = 4001, 0.5, 0.3
  base, tuned = {"w": np.zeros(n, np.float32)}, {"w": np.arange(1, n + 1, dtype=np.float32)}
  options = {"weights": 1, "densities": density, "epsilons": epsilon}
  runs = [np.asarray(merging.della(base, [tuned], key=jax.random.key(seed), **options)["w"]) for seed in range(60)]
  # Entry r stays with density - epsilon + 2 epsilon r / (n - 1), and is divided by it.
  expected = density - epsilon + 2 * epsilon * np.arange(n) / (n - 1)
  kept = np.stack(runs) != 0
  for part in np.array_split(np.arange(n), 8):
    share = expected[part].mean()
    assert abs(kept[:, part].mean() - share) < 5 * math.sqrt(share * (1 - share) / kept[:, part].size)
  values = np.stack(runs)[kept] / np.broadcast_to(tuned["w"], kept.shape)[kept]
  np.testing.assert_allclose(values, 1 / np.broadcast_to(expected, kept.shape)[kept], rtol=2e-3)
  assert merging.della(base, [tuned], key=KEY, weights=1, densities=1)["w"].tolist() == tuned["w"].tolist()


@pytest.mark.parametrize("t", [-0.5, 0.0, 0.3, 1.0])
def test_slerp_goes_along_the_arc(t):
  got = merging.slerp(BASE, C, t=t)
  for name in SHAPES:
    a, b = BASE[name].astype(np.float64), C[name].astype(np.float64)
    cos = (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())
    if abs(cos) > 0.9995:
      expected = (1 - t) * a + t * b
    else:
      theta = math.acos(cos)
      expected = (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)
    np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-6)


def test_slerp_of_zero_opposite_and_tiny_tensors():
  zero, x = {"w": np.zeros(3, np.float32)}, {"w": np.array([3.0, -4.0, 0.0], np.float32)}
  np.testing.assert_allclose(merging.slerp(zero, x, t=0.5)["w"], math.sin(math.pi / 4) * x["w"], rtol=1e-6)
  np.testing.assert_allclose(merging.slerp(x, {"w": -x["w"]}, t=0.25)["w"], 0.5 * x["w"], rtol=1e-6)
  # Lengths do not matter: mergekit takes vectors shorter than 1e-8 for zero.
  tiny = {"w": np.array([0.0, 0.0, 1e-20], np.float32)}
  np.testing.assert_allclose(merging.slerp({"w": x["w"] * np.float32(1e-20)}, tiny, t=1.0)["w"], tiny["w"], rtol=1e-5)


@pytest.mark.parametrize(("method", "options"), [
    ("nuslerp", {}), ("nuslerp", {"flatten": False, "row_wise": True}), ("multislerp", {})])
def test_parallel_models_have_mean_and_gradient(method, options):
  """Norms and what no one has tuned are the same in most models: no angle may be divided by."""
  x = np.random.default_rng(3).normal(size=(7, 33)).astype(np.float32)
  a, b = {"same": x, "twice": x}, {"same": x, "twice": 2 * x}
  merge = lambda a, b: getattr(merging, method)([a, b], weights=1, **options)
  for got in (merge(a, b), jax.jit(merge)(a, b)):
    np.testing.assert_allclose(got["same"], x, rtol=1e-5)
    np.testing.assert_allclose(got["twice"], 1.5 * x, rtol=1e-5)
  gradient = jax.jit(jax.grad(lambda a: merge(a, a)["same"].sum()))(a)["same"]
  np.testing.assert_allclose(gradient, np.ones_like(x), rtol=1e-3)


def test_fisher_without_information_is_a_plain_mean():
  zero = {"w": np.zeros(2, np.float32)}
  got = merging.fisher([{"w": np.array([1., 2.], np.float32)}, {"w": np.array([3., 4.], np.float32)}], [zero, zero],
                       floor=0)
  assert got["w"].tolist() == [2, 3]


def test_leaves_may_be_numbers_of_python():
  assert float(merging.linear([{"w": 1.0, "n": 3}, {"w": 2.0, "n": 3}], weights=1)["w"]) == 1.5


def test_model_stock_uses_angles():
  """It weighs by the angle between deltas."""
  got = call("model_stock", (BASE, A, B, C))
  for name in SHAPES:
    d = [x.ravel() for x in deltas(name)]
    cos = np.mean([d[i] @ d[j] / math.sqrt((d[i] @ d[i]) * (d[j] @ d[j])) for i, j in ((0, 1), (0, 2), (1, 2))])
    ratio = 3 * cos / (1 + 2 * cos)
    mean = sum(m[name].astype(np.float64) for m in (A, B, C)) / 3
    np.testing.assert_allclose(got[name], ratio * mean + (1 - ratio) * BASE[name], rtol=1e-4, atol=1e-5)


def test_model_stock_keeps_a_cancelled_base():
  """Where deltas cancel, the base stays."""
  base, x = {"w": np.ones(2, np.float32)}, np.array([0.5, 0.0], np.float32)
  got = merging.model_stock(base, [{"w": base["w"] + x}, {"w": base["w"] - x}])
  assert got["w"].tolist() == [1, 1]


@settings(max_examples=30, deadline=None)
@given(weight=st.floats(0, 1, width=32), seed=st.integers(0, 2**31 - 1))
def test_imm_without_drops_is_a_mean(weight, seed):
  """The ends are exact."""
  merge = lambda w: merging.imm(BASE, A, B, base_weight=w, drop_rate=0.0, key=jax.random.key(seed))
  for name, leaf in merge(weight).items():
    expected = weight * BASE[name].astype(np.float64) + (1 - weight) * B[name]
    np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, merge(1.0), BASE)
  jax.tree.map(np.testing.assert_array_equal, merge(0.0), B)


@settings(max_examples=20, deadline=None)
@given(density=st.floats(0.05, 1), seed=st.integers(0, 2**31 - 1))
def test_dare_linear_is_unbiased(density, seed):
  n = 128 * 128
  ones, zeros = {"w": np.ones((128, 128), np.float32)}, {"w": np.zeros((128, 128), np.float32)}
  got = np.asarray(merging.dare_linear(zeros, [ones], weights=1, densities=density, key=jax.random.key(seed))["w"])
  deviation = math.sqrt(density * (1 - density) / n)
  assert abs((got != 0).mean() - density) <= 6 * deviation + 1 / 65_536
  assert abs(got.mean() - 1) <= 6 * deviation / density + 1e-4


def test_model_stock_checks_its_inputs():
  """It needs two models, and its directions are finite."""
  with pytest.raises(ValueError, match="1 given; model_stock takes 2 or more"):
    merging.model_stock(BASE, [A])
  broken = {**A, "scale": np.array([np.nan], np.float32)}
  with pytest.raises(ValueError, match=r"scale has NaN or infinity in other, so"):
    merging.slerp(BASE, broken, t=0.5)
  with pytest.raises(ValueError, match="weights: they add up to 0 at 'embed"):
    merging.multislerp([{"embed": np.ones(2)}, {"embed": np.ones(2)}], weights=[1, -1])
  with pytest.raises(ValueError, match="expected an integer, 0 <= max_iter"):
    merging.karcher([A, B], max_iter=1.5)
  with pytest.raises(ValueError, match="0 given; ties takes 1 or more"):
    merging.ties(BASE, [], densities=0.5)
