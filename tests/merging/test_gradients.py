"""Every merging method under jax's transformations: gradients against finite differences, vmap, jit, eval_shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imm_jax import merging
from imm_jax.merging import registry
from tests.merging.every_method import KEY, NAMES, OPTIONS, arguments, call, tree

# Those that have the parts of others in another order.
SLOW = {"task_arithmetic", "lines", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della_linear",
        "dare", "iimm", "nuslerp", "karcher", "wise_ft", "ramplus_tl", "arcee_fusion", "passthrough"}
EACH = [pytest.param(m, marks=pytest.mark.slow if m in SLOW else ()) for m in OPTIONS]
# Numbers that gradients go to as well.
COEFFICIENTS = {"weights", "scale", "alpha", "beta", "t", "base_weight", "scales", "r"}


def test_every_method_is_tried():
  assert OPTIONS.keys() == registry.METHODS.keys(), "each method needs a line in tests/merging/every_method.py"


@pytest.mark.parametrize("method", EACH)
def test_gradients_are_those_of_finite_differences(method: str):
  """Along a random direction of the models, and of what is a coefficient; small steps change no mask."""
  trees, rng = arguments(method), np.random.default_rng(9)
  weights = tree(7)
  numbers = {k: jnp.asarray(v, jnp.float32) for k, v in OPTIONS[method].items() if k in COEFFICIENTS}

  def loss(trees, numbers):
    return sum(jnp.sum(x * weights[n]) for n, x in call(method, trees, **numbers).items())

  direction = [{n: rng.normal(size=x.shape).astype(np.float32) for n, x in t.items()} for t in trees]
  step = {k: jnp.asarray(rng.normal(size=v.shape), jnp.float32) for k, v in numbers.items()}
  gradient = jax.jit(jax.grad(loss, (0, 1)))(trees, numbers)
  product = jax.tree.map(lambda g, d: float(np.vdot(g, d)), gradient, (direction, step))
  found = sum(jax.tree.leaves(product))
  value = jax.jit(loss)
  moved = lambda size: value(*jax.tree.map(lambda x, d: x + size * d, (trees, numbers), (direction, step)))
  size = 2e-4
  expected = float(np.float64(moved(size)) - np.float64(moved(-size))) / (2 * size)
  assert abs(found) > 1e-3
  assert found == pytest.approx(expected, rel=0.02, abs=0.02)


@pytest.mark.parametrize("method", EACH)
def test_vmap_and_eval_shape(method: str):
  """`vmap` equals a loop, and `eval_shape` needs no values."""
  trees = arguments(method)
  several = [jax.tree.map(lambda x: np.stack([x, x[::-1]]), t) for t in trees]
  mapped = jax.jit(jax.vmap(lambda ts: call(method, ts)))(several)
  for i in range(2):
    one = call(method, [jax.tree.map(lambda x, i=i: x[i], t) for t in several])
    for name in NAMES:
      np.testing.assert_allclose(mapped[name][i], one[name], rtol=1e-5, atol=1e-6)
  shapes = jax.eval_shape(lambda ts: call(method, ts), trees)
  assert {n: s.shape for n, s in shapes.items()} == {n: x.shape for n, x in trees[0].items()}


@pytest.mark.parametrize("method", EACH)
def test_stacked_tensors_have_the_bits_of_separate(method: str):
  """A kernel that reduces over all of its argument mixes the tensors of a stack."""
  trees = arguments(method)
  stacked = [{"w": np.stack([t[name] for name in NAMES])} for t in trees]
  together, apart = call(method, stacked, names={"w": NAMES})["w"], call(method, trees)
  for i, name in enumerate(NAMES):
    np.testing.assert_array_equal(together[i], apart[name], err_msg=name)


@pytest.mark.parametrize("method", EACH)
def test_tensors_without_entries_stay_as_they_are(method: str):
  empty = {n: np.zeros(shape, np.float32) for n, shape in (("a", (2, 0)), ("b", (2, 3, 0, 2)))}
  trees = [{**t, **empty} for t in arguments(method)]
  found = call(method, trees)
  assert {n: found[n].shape for n in empty} == {n: x.shape for n, x in empty.items()}
  assert all(np.isfinite(found[n]).all() for n in NAMES)


def test_weights_by_layer_are_learned_by_gradient():
  """Descent finds the coefficients that a merge was made with."""
  base, a, b = (tree(i) for i in range(3))
  truth = jnp.array([[0.2, 0.9], [0.5, -0.3]])
  goal = merging.task_arithmetic(base, [a, b], weights=truth)

  def loss(weights):
    merged = merging.task_arithmetic(base, [a, b], weights=weights)
    return sum(jnp.mean((merged[n] - goal[n])**2) for n in NAMES)

  weights, step = jnp.zeros((2, 2)), jax.jit(lambda w: w - 0.3 * jax.grad(loss)(w))
  for _ in range(60):
    weights = step(weights)
  np.testing.assert_allclose(weights, truth, atol=1e-3)
  with pytest.raises(ValueError, match=r"densities at 'layers\.0\.w' is traced by jax"):
    jax.grad(lambda d: merging.ties(base, [a, b], densities=d)["layers.0.w"].sum())(0.5)


def test_what_is_not_traced_is_known_within_a_trace():
  """Trees that a jitted function closes over: a coefficient alone is traced, or other work."""
  a, b, base = tree(0), tree(1), tree(2)
  gradient = jax.jit(jax.grad(lambda t: merging.slerp(a, b, t=t)[NAMES[0]].sum()))(0.3)
  value = lambda t: np.float64(merging.slerp(a, b, t=t)[NAMES[0]].sum())
  assert float(gradient) == pytest.approx((value(0.31) - value(0.29)) / 0.02, rel=1e-3)
  got = jax.jit(lambda x: merging.ties(base, [a, b], densities=0.5)[NAMES[0]] + x)(0.0)
  np.testing.assert_array_equal(got, merging.ties(base, [a, b], densities=0.5)[NAMES[0]])


def test_coefficients_may_be_arrays():
  a, b = tree(0), tree(1)
  expected = merging.linear([a, b], weights=[np.float32(0.3), np.float32(0.7)])
  for weights in (jnp.array([0.3, 0.7]), np.array([0.3, 0.7], np.float32), [jnp.float32(0.3), jnp.float32(0.7)]):
    jax.tree.map(np.testing.assert_array_equal, merging.linear([a, b], weights=weights), expected)
  got = merging.imm(a, a, b, base_weight=jnp.float32(0.3), drop_rate=0.0, key=KEY)
  jax.tree.map(np.testing.assert_array_equal, got, merging.imm(a, a, b, base_weight=np.float32(0.3).item(),
                                                               drop_rate=0.0, key=KEY))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della_linear"])
def test_zero_density_keeps_the_base_gradient(method: str):
  """A density of 0 leaves the base, in gradients, too."""
  base, tuned = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3))
  merge = lambda b, t: getattr(merging, method)({"w": b}, [{"w": t}], weights=1, densities=0,
                                                key=jax.random.key(0))["w"].sum()
  value, (of_base, of_tuned) = jax.value_and_grad(merge, (0, 1))(base, tuned)
  assert value == base.sum()
  assert (of_base == 1).all()
  assert (of_tuned == 0).all()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_weights_of_0_and_1_have_their_gradient(weight: float):
  tree = lambda x: {"layers": [{"w": jnp.full(2, x)}, {"w": jnp.full(2, x)}]}
  base, start, tuned = tree(1.0), tree(2.0), tree(5.0)
  merged = lambda weight, importance: merging.iimm(
      base, start, tuned, base_weight=weight, drop_rate=0, importance=importance, key=jax.random.key(0))["layers"]
  by_weight, by_importance = jax.grad(lambda *args: merged(*args)[0]["w"].sum(), argnums=(0, 1))(weight, jnp.ones(2))
  # Of 2 (a base + (1 - a) (start + 2 I_0 / (I_0 + I_1) (tuned - start))) at I = 1.
  assert float(by_weight) == pytest.approx(2 * (1 - 5))
  np.testing.assert_allclose(by_importance, 2 * (1 - weight) * 3 * np.array([0.5, -0.5]), rtol=1e-6)


@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
def test_traced_thresholds_are_refused(method: str):
  """A threshold that decides a mask cannot be traced."""
  with pytest.raises(ValueError, match=r"threshold at .layers\.0\.w. is traced by jax, but it decides"):
    jax.grad(lambda t: getattr(merging, method)(tree(0), [tree(1)], threshold=t)["layers.0.w"].sum())(0.05)
