"""Merges of trees: the bits of every layout, donation, names, jit, and errors."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from imm_jax import merging
from imm_jax.merging import registry
from tests.merging.cases import BASE, CASES, KEY, LAYERS, SHAPES, A, B, C, call, models


@pytest.mark.full
@pytest.mark.parametrize("method", [
    pytest.param(m, marks=pytest.mark.slow) if m == "della" else
    pytest.param(m, marks=pytest.mark.full) if m.startswith("dare") else m for m in CASES])
def test_bfloat16_is_rounded_once(method):
  """It is merged in float32."""
  low = models(4, ml_dtypes.bfloat16)
  wide = [{name: x.astype(np.float32) for name, x in model.items()} for model in low]
  got, expected = call(method, low), call(method, wide)
  for name in SHAPES:
    assert got[name].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got[name], np.asarray(expected[name]).astype(ml_dtypes.bfloat16))


def stack(tree):
  """The same model with its layers stacked, and the names of both forms."""
  inner = [name.removeprefix("model.layers.0.") for name in tree if name.startswith("model.layers.0.")]
  stacked = {name: x for name, x in tree.items() if ".layers." not in name}
  return stacked | {name: np.stack([tree[f"model.layers.{i}.{name}"] for i in range(LAYERS)]) for name in inner}


def stacked_names(tree):
  return {name: tuple(f"model.layers.{i}.{name}" for i in range(LAYERS)) if "proj" in name else name
          for name in stack(tree)}


@pytest.mark.full
@pytest.mark.parametrize("method", CASES)
def test_stacked_layers_give_the_bits_of_single_ones(method):
  expected = stack({n: np.asarray(x) for n, x in call(method, (BASE, A, B, C)).items()})
  got = call(method, [stack(t) for t in (BASE, A, B, C)], names=stacked_names(BASE))
  for name, leaf in got.items():
    np.testing.assert_array_equal(np.asarray(leaf).view(np.uint32), expected[name].view(np.uint32))


@pytest.mark.full
@pytest.mark.parametrize("method", CASES)
def test_results_repeat_and_donation_changes_nothing(method):
  expected = call(method, (BASE, A, B, C))
  trees = [jax.tree.map(jnp.asarray, t) for t in (BASE, A, B, C)]
  got = call(method, trees, donate=True)
  jax.tree.map(np.testing.assert_array_equal, got, expected)
  donated = trees[1] if method == "linear" else trees[0]
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))


def test_shared_buffer_is_not_donated():
  """In the first round the base is the start too."""
  base, tuned = (jax.tree.map(jnp.asarray, t) for t in (BASE, A))
  got = merging.imm(base, base, tuned, base_weight=0.4, drop_rate=0.3, key=KEY, donate=True)
  jax.tree.map(np.testing.assert_array_equal, got, call("imm", (BASE, BASE, A)))


def test_integer_leaves_may_pass_through_jit():
  trees = [{**t, "step": jnp.int32(3)} for t in (BASE, A, B)]
  assert int(jax.jit(lambda ts: call("imm", ts))(trees)["step"]) == 3


def test_ambiguous_names_are_refused():
  """Names that stand for two tensors, and lists without layers, are errors."""
  pair = [{"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)} for _ in range(2)]
  with pytest.raises(ValueError, match=r"names: \['q'\] name several tensors"):
    merging.linear(pair, weights=1, names={"a": "q", "b": "q"})
  with pytest.raises(ValueError, match="a list over the layers, but no name"):
    merging.imm(pair[0], pair[0], pair[1], base_weight=[0.0, 1.0], drop_rate=0.0, key=KEY)
  with pytest.raises(ValueError, match="lines scales by depth, but no name such as 'a'"):
    merging.lines(pair[0], [pair[1]], weights=1)
  with pytest.raises(ValueError, match="holds numbers only"):
    call("imm", (BASE, A, B), base_weight=[[0.1, 0.2], 0.3])
  with pytest.raises(ValueError, match=r"normalize=.*expected True or False"):
    call("ties", (BASE, A, B, C), normalize=[True])
  nested = [{"a": {"b": np.ones(2, np.float32)}, "a.b": np.ones(2, np.float32)} for _ in range(2)]
  with pytest.raises(ValueError, match=r"names: .* name several"):
    merging.linear(nested, weights=1)


def test_settings_may_vary_by_tensor():
  """A list over the layers, and a mapping from regex."""
  got = merging.imm(BASE, BASE, A, base_weight=[1.0, 0.0], drop_rate={"mlp": 0.0, "": 0.0}, key=KEY)
  for name in SHAPES:
    layer = int(name.split(".")[2]) if ".layers." in name else 0
    weight = 1 - layer / (LAYERS - 1)
    np.testing.assert_allclose(got[name], weight * BASE[name] + (1 - weight) * A[name], rtol=1e-5, atol=1e-6)
  got = merging.linear([A, B], weights=[{"mlp": 1, ".*": 0}, {"mlp": 0, ".*": 1}])
  for name in SHAPES:
    np.testing.assert_array_equal(got[name], (A if "mlp" in name else B)[name])


def test_tied_leaves_are_merged_once():
  """The same array at two places would else be dropped by two names."""
  def tie(tree):
    return {"embed": tree["scale"].repeat(64), "norm": tree["model.norm.weight"]}
  trees = [tie(t) for t in (BASE, BASE, A)]
  for tree in trees:
    tree["head"] = tree["embed"]
  got = merging.imm(*trees, base_weight=0.5, drop_rate=0.5, key=KEY)
  assert got["head"] is got["embed"]
  apart = merging.imm(*({**t, "head": t["embed"].copy()} for t in trees), base_weight=0.5, drop_rate=0.5, key=KEY)
  assert (np.asarray(apart["head"]) != np.asarray(apart["embed"])).any()


def test_shared_leaves_with_other_options_part():
  """Shared leaves whose options differ are merged apart."""
  tree = lambda x: {"layers": [{"w": x}, {"w": x}]}
  average = lambda a, b: merging.linear([tree(a), tree(b)], weights=[[1.0, 0.0], [0.0, 1.0]])
  for run in (average, jax.jit(average)):
    assert [float(layer["w"][0]) for layer in run(jnp.zeros(1), jnp.ones(1))["layers"]] == [0, 1]


def test_traced_tied_leaves_share_a_mask():
  """Tied leaves have one mask while weights are traced."""
  tree = lambda x: {"embed": x, "head": x}
  zeros, ones = tree(jnp.zeros(64)), tree(jnp.ones(64))
  merged = jax.jit(lambda a: merging.imm(zeros, zeros, ones, base_weight=a, drop_rate=0.5, key=KEY))(0.25)
  assert 0 < np.count_nonzero(merged["embed"]) < 64
  np.testing.assert_array_equal(merged["embed"], merged["head"])


@pytest.mark.parametrize("method", CASES)
def test_methods_run_under_jit_with_the_same_bits(method):
  """What goes by angles is measured in float32 there, and may differ in the last place."""
  part = ("model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight",
          "model.layers.2.mlp.up_proj.weight")
  trees = [{name: tree[name] for name in part} for tree in (BASE, A, B, C)]
  inside = jax.jit(lambda trees: call(method, trees))(trees)
  for name, leaf in call(method, trees).items():
    if registry.METHODS[method].measures:
      np.testing.assert_allclose(inside[name], leaf, rtol=2e-6, atol=1e-7)
    else:
      np.testing.assert_array_equal(inside[name], leaf)


@pytest.mark.parametrize(("method", "options", "expected"), [
    ("linear", {"weights": [1, 2]}, "weights: 2 of them for 3 models"),
    ("linear", {"weights": [1, -1, 0]}, "weights: they add up to 0"),
    ("linear", {"weights": math.nan}, "expected a finite number"),
    ("ties", {"densities": 1.5}, r"densities=1.5 at 'model.embed.*expected 0 <= densities <= 1"),
    ("ties", {"densities": {"mlp": 0.5}}, "no pattern of .* matches 'model"),
    ("ties", {"densities": {"(": 0.5}}, "no regular expression"),
    ("ties", {"densities": [[], 0.5, 0.5]}, "an empty list"),
    ("dare_linear", {"densities": 1e-6}, "densities=1e-06 at .*: rounds to 0"),
    ("della", {"densities": 0.9, "epsilons": 0.2}, "expected 0 < density - epsilon"),
    ("slerp", {"t": "half"}, "t='half'"),
    ("imm", {"key": jax.random.key(0, impl="rbg")}, "expected a threefry key")])
def test_options_that_cannot_work_are_errors(method, options, expected):
  with pytest.raises(ValueError, match=expected):
    call(method, (BASE, A, B, C), **options)
