"""Merging against the equations in float64 numpy, with the mask rule derived a second time, row by row."""

import json
import math
import os
import subprocess
import sys
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from imm_jax import merging

KEY = jax.random.key(3)
# One axis, odd and even columns, a stacked leaf, and a scalar.
SHAPES = {"norm": (7,), "odd": (4, 5), "even": (3, 8), "deep": (2, 3, 5), "scalar": ()}
NAMES = {"norm": "model.norm.weight", "odd": "model.layers.0.mlp.up_proj.weight", "even": "lm_head.weight",
         "deep": "model.layers.1.conv.weight", "scalar": "model.scale"}


def tree(seed: int, *, shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: type = np.float32) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  return {name: np.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def reference_dropped(name: str, shape: tuple[int, ...], key: jax.Array, steps: int) -> np.ndarray:
  """The mask rule in a plain loop."""
  rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
  tensor_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
  mask = []
  for row in range(rows):
    words = jax.random.bits(jax.random.fold_in(tensor_key, row), (-(-columns // 2),), jnp.uint32)
    draws = []
    for word in map(int, np.asarray(words)):
      draws += [word % 65_536, word // 65_536]
    mask.append([draw < steps for draw in draws[:columns]])
  return np.array(mask).reshape(shape)


def reference_merge(base, start, tuned, *, base_weight: float, drop_rate: float, key: jax.Array, name: str,
                    scale: float = 1.0) -> np.ndarray:
  """Equations 5, 1-2 of DARE, 7 and 6 on one tensor, in float64."""
  b, s, t = (np.asarray(x, np.float64) for x in (base, start, tuned))
  steps = round(drop_rate * 65_536)
  kept = 1.0 - reference_dropped(name, b.shape, key, steps)
  delta = kept * (t - s) / (1 - steps / 65_536)
  return base_weight * b + (1 - base_weight) * (s + scale * delta)


@pytest.mark.parametrize(("base_weight", "drop_rate"), [(0.5, 0.2), (0.3, 0.0), (0.9, 0.7), (0.0, 0.5), (1.0, 0.5),
                                                        (0.25, 0.99)])
def test_imm_follows_equations_5_and_6(base_weight, drop_rate):
  base, start, tuned = tree(0), tree(1), tree(2)
  merged = merging.imm(base, start, tuned, base_weight=base_weight, drop_rate=drop_rate, key=KEY, names=NAMES)
  for leaf, name in NAMES.items():
    expected = reference_merge(base[leaf], start[leaf], tuned[leaf], base_weight=base_weight, drop_rate=drop_rate,
                               key=KEY, name=name)
    np.testing.assert_allclose(merged[leaf], expected, rtol=1e-5, atol=1e-6 / (1 - drop_rate))


@pytest.mark.parametrize("drop_rate", [0.0, 0.4])
def test_iimm_scales_layers_by_importance(drop_rate):
  """Each layer by its share of it."""
  base, start, tuned = tree(0), tree(1), tree(2)
  importance = np.array([3.0, 1.0])
  merged = merging.iimm(base, start, tuned, base_weight=0.4, drop_rate=drop_rate, importance=importance, key=KEY,
                        names=NAMES)
  scales = {"odd": 2 * 3 / 4, "deep": 2 * 1 / 4, "norm": 1, "even": 1, "scalar": 1}
  for leaf, name in NAMES.items():
    expected = reference_merge(base[leaf], start[leaf], tuned[leaf], base_weight=0.4, drop_rate=drop_rate, key=KEY,
                               name=name, scale=scales[leaf])
    np.testing.assert_allclose(merged[leaf], expected, rtol=1e-5, atol=1e-5)


def test_iimm_of_equal_importance_is_imm():
  base, start, tuned = tree(0), tree(1), tree(2)
  options = {"base_weight": 0.4, "drop_rate": 0.3, "key": KEY, "names": NAMES}
  same = merging.iimm(base, start, tuned, importance=[2.5, 2.5], **options)
  jax.tree.map(np.testing.assert_array_equal, same, merging.imm(base, start, tuned, **options))


@pytest.mark.parametrize("drop_rate", [0.0, 0.2, 0.5, 0.999])
def test_dare_follows_the_mask_rule(drop_rate):
  """It rescales by the quantized rate."""
  delta = tree(0)
  dropped = merging.dare(delta, drop_rate=drop_rate, key=KEY, names=NAMES)
  steps = round(drop_rate * 65_536)
  for leaf, name in NAMES.items():
    mask = reference_dropped(name, SHAPES[leaf], KEY, steps)
    np.testing.assert_array_equal(np.asarray(dropped[leaf]) == 0, mask)
    expected = np.where(mask, 0, delta[leaf].astype(np.float64) * 65_536 / (65_536 - steps))
    np.testing.assert_allclose(dropped[leaf], expected, rtol=3e-7)


def test_rate_is_rounded_to_its_step():
  """A rate that is no multiple of its step rescales by what is drawn."""
  kept = np.unique(merging.dare({"w": np.ones((50, 50), np.float32)}, drop_rate=0.2, key=KEY)["w"])
  np.testing.assert_allclose(kept, [0, 65_536 / (65_536 - 13_107)], rtol=1e-7)
  assert kept[1] != np.float32(1.25)


def test_names_default_to_the_paths_of_the_leaves():
  nested = {"model": {"norm": {"weight": tree(0)["odd"]}, "layers": [tree(1)["even"]]}}
  named = {"model": {"norm": {"weight": "model.norm.weight"}, "layers": ["model.layers.0"]}}
  assert merging.default_names(nested) == named
  jax.tree.map(np.testing.assert_array_equal, merging.dare(nested, drop_rate=0.5, key=KEY),
               merging.dare(nested, drop_rate=0.5, key=KEY, names=named))


def stacked_and_apart(method, shape: tuple[int, ...], **options) -> tuple[np.ndarray, list[np.ndarray]]:
  """One stacked leaf, and its layers merged as leaves of their own."""
  trees = [tree(i, shapes={"w": shape}) for i in range(3 if method is not merging.dare else 1)]
  names = [f"model.layers.{i}.w" for i in range(shape[0])]
  options |= {"drop_rate": 0.3, "key": KEY}
  stacked = method(*trees, names={"w": tuple(names)}, **options)["w"]
  apart = method(*({"w": list(t["w"])} for t in trees), names={"w": names}, **options)["w"]
  return np.asarray(stacked), [np.asarray(x) for x in apart]


def test_stacked_leaf_drops_like_its_layers():
  """The bits are the same."""
  np.testing.assert_array_equal(*stacked_and_apart(merging.dare, (3, 4, 5)))


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 8)])
def test_stacked_leaf_merges_like_its_layers(shape):
  """The bits are the same."""
  np.testing.assert_array_equal(*stacked_and_apart(merging.imm, shape, base_weight=0.4))
  importance = np.arange(1.0, shape[0] + 1)
  np.testing.assert_array_equal(*stacked_and_apart(merging.iimm, shape, base_weight=0.4, importance=importance))


def test_ends_are_exact_without_drops():
  """At weights 0 and 1 the result is one of the models bit for bit."""
  base, start, tuned = tree(0), tree(1), tree(2)
  start["norm"][:3] = [1e8, 0.1, -0.0]
  tuned["norm"][:3] = [1.0, 0.3, -0.0]
  base["norm"][:3] = [-0.0, 1e-41, 3e38]
  s, t = start["norm"], tuned["norm"]
  assert (s + (t - s))[0] != t[0]  # or this test would show nothing
  bits = lambda got, wanted: np.testing.assert_array_equal(np.asarray(got).view(np.uint32), wanted.view(np.uint32))
  jax.tree.map(bits, merging.imm(base, start, tuned, base_weight=0.0, drop_rate=0.0, key=KEY), tuned)
  for drop_rate in (0.0, 0.5):
    jax.tree.map(bits, merging.imm(base, start, tuned, base_weight=1.0, drop_rate=drop_rate, key=KEY), base)


def test_full_base_weight_hides_infinities():
  """A base weight of one hides what is not finite in the tuned model."""
  base, tuned = {"w": np.float32([1, 2])}, {"w": np.float32([np.nan, np.inf])}
  assert merging.imm(base, base, tuned, base_weight=1.0, drop_rate=0.5, key=KEY)["w"].tolist() == [1, 2]


def test_bfloat16_is_rounded_once():
  # Multiples of 1/128 below 2, a half and a rescale by 2: float32 is exact until the final rounding.
  rng = np.random.default_rng(0)
  base, start, tuned = ({"w": (rng.integers(-255, 256, (64, 64)) / 128).astype(ml_dtypes.bfloat16)} for _ in range(3))
  merged = merging.imm(base, start, tuned, base_weight=0.5, drop_rate=0.5, key=KEY)["w"]
  exact = reference_merge(base["w"], start["w"], tuned["w"], base_weight=0.5, drop_rate=0.5, key=KEY, name="w")
  assert merged.dtype == jnp.bfloat16
  np.testing.assert_array_equal(merged, exact.astype(ml_dtypes.bfloat16))
  kept = ~reference_dropped("w", (64, 64), KEY, 32_768)
  delta_rounded = kept * (tuned["w"] - start["w"]).astype(np.float32) * 2  # the subtraction rounds to bfloat16
  twice = 0.5 * base["w"].astype(np.float32) + 0.5 * (start["w"].astype(np.float32) + delta_rounded)
  assert (twice.astype(ml_dtypes.bfloat16) != np.asarray(merged)).any()


def test_result_has_the_dtypes_of_the_base():
  """Each leaf has that of the base's leaf."""
  base = {str(jnp.dtype(d)): jnp.zeros(3, d) for d in (jnp.bfloat16, jnp.float16, jnp.float32)}
  tuned = {name: jnp.ones(3, jnp.float32) for name in base}
  merged = merging.imm(base, base, tuned, base_weight=0.5, drop_rate=0.0, key=KEY)
  assert {name: str(leaf.dtype) for name, leaf in merged.items()} == {name: name for name in base}
  assert all(str(leaf.dtype) == name for name, leaf in merging.dare(base, drop_rate=0.5, key=KEY).items())


def test_drops_depend_on_the_seed_alone():
  """The same seed drops the same entries whatever stands beside them."""
  delta = tree(0)
  first = merging.dare(delta, drop_rate=0.5, key=jax.random.key(5), names=NAMES)
  again = merging.dare(delta, drop_rate=0.5, key=jax.random.key(5), names=NAMES)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  alone = merging.dare({"odd": delta["odd"]}, drop_rate=0.5, key=jax.random.key(5), names={"odd": NAMES["odd"]})
  np.testing.assert_array_equal(alone["odd"], first["odd"])


def test_a_row_keeps_its_mask_when_rows_are_added():
  rows = np.ones((6, 5), np.float32)
  drop = lambda x: np.asarray(merging.dare({"w": x}, drop_rate=0.5, key=KEY)["w"])
  np.testing.assert_array_equal(drop(rows)[:4], drop(rows[:4]))


def test_masks_are_independent():
  """Other seeds, names and rows have other masks."""
  ones = np.ones((64, 256), np.float32)
  drop = lambda seed, name: np.asarray(
      merging.dare({"w": ones}, drop_rate=0.5, key=jax.random.key(seed), names={"w": name})["w"]) == 0
  masks = [drop(0, "a"), drop(1, "a"), drop(0, "b"), np.roll(drop(0, "a"), 1, axis=0), np.roll(drop(0, "a"), 1, axis=1)]
  for i, mask in enumerate(masks):
    for other in masks[:i]:
      assert abs((mask == other).mean() - 0.5) < 5 * 0.5 / math.sqrt(ones.size)


@settings(max_examples=60, deadline=None)
@given(drop_rate=st.floats(0, 0.95), seed=st.integers(0, 2**31 - 1))
def test_drop_share_and_mean(drop_rate, seed):
  """The share that is dropped is the rate, and the mean stays."""
  n = 256 * 256
  got = np.asarray(merging.dare({"w": np.ones((256, 256), np.float32)}, drop_rate=drop_rate,
                                key=jax.random.key(seed))["w"], np.float64)
  deviation = math.sqrt(drop_rate * (1 - drop_rate) / n)
  assert abs((got == 0).mean() - drop_rate) <= 6 * deviation + 1 / 65_536
  assert abs(got.mean() - 1) <= 6 * deviation / (1 - drop_rate) + 1e-4


_SHARDED = """
import jax, json, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from imm_jax import merging
assert jax.device_count() == 8
shapes = {"w": (16, 24), "stack": (4, 8, 24), "bias": (4, 16), "norm": (40,)}
names = {"bias": tuple(f"model.layers.{i}.b" for i in range(4)), "norm": "model.norm.weight",
         "stack": tuple(f"model.layers.{i}.w" for i in range(4)), "w": "lm_head.weight"}
trees = [{k: np.random.default_rng([i, j]).normal(size=s).astype(np.float32) for j, (k, s) in enumerate(shapes.items())}
         for i in range(3)]
mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
layout = {"bias": P(None, ("x", "y")), "norm": P("y"), "stack": P(None, None, ("x", "y")), "w": P("x", "y")}
options = dict(drop_rate=0.3, key=jax.random.key(1), names=names)
def merge(base, start, tuned):
  return {"dare": merging.dare(tuned, **options), "imm": merging.imm(base, start, tuned, base_weight=0.4, **options)}
expected, different = merge(*trees), []
put = lambda tree: {k: jax.device_put(v, NamedSharding(mesh, layout[k])) for k, v in tree.items()}
got = merge(*map(put, trees))
for method, leaves in got.items():
  for name, leaf in leaves.items():
    assert len(leaf.sharding.device_set) == 8
    if np.asarray(leaf).tobytes() != np.asarray(expected[method][name]).tobytes():
      different.append([method, name])
    np.testing.assert_allclose(leaf, expected[method][name], rtol=1e-6, atol=1e-6)
print(json.dumps(different))
"""


@pytest.fixture(scope="module")
def different_when_sharded() -> set[tuple[str, str]]:
  """(method, leaf) where eight devices gave other bits than one."""
  environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", _SHARDED], env=environment, capture_output=True, text=True, timeout=600,
                        check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  return {tuple(pair) for pair in json.loads(done.stdout)}


def test_sharded_models_drop_the_same_entries(different_when_sharded):
  """The bits are the same."""
  assert not {leaf for method, leaf in different_when_sharded if method == "dare"}


def test_sharded_matrices_merge_to_the_same_bits(different_when_sharded):
  assert not different_when_sharded & {("imm", "w"), ("imm", "stack"), ("imm", "norm")}


def test_sharded_small_leaves_merge_to_the_same_bits(different_when_sharded):
  assert ("imm", "bias") not in different_when_sharded


class _Pair(NamedTuple):
  first: jax.Array
  second: jax.Array


@pytest.mark.parametrize("container", [
    lambda a, b: {"first": a, "second": b}, lambda a, b: [a, b],
    lambda a, b: (a, b), _Pair], ids=["dict", "list", "tuple", "namedtuple"])
def test_a_tree_may_hold_any_container(container):
  zero, one = container(jnp.zeros(2), jnp.zeros(3)), container(jnp.ones(2), jnp.ones(3))
  merged = merging.imm(zero, zero, one, base_weight=0.25, drop_rate=0.0, key=KEY)
  assert [leaf.tolist() for leaf in jax.tree.leaves(merged)] == [[0.75] * 2, [0.75] * 3]
