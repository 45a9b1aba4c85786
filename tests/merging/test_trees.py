"""What kinds of trees and meshes the functions take, and what they say of those that they do not."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from imm_jax import merging
from imm_jax.merging import registry
from tests import REPO
from tests.merging import every_method

KEY = jax.random.key(3)
A, B = ({"w": np.full((2, 3), x, np.float32)} for x in (1.0, 3.0))


def test_layers_may_lie_on_any_axis():
  """As MaxText has them, on the second."""
  rng = np.random.default_rng(0)
  first, last = ({"w": rng.normal(size=(3, 4, 5)).astype(np.float32)} for _ in range(2))
  names = {"w": tuple(f"layers.{i}.w" for i in range(3))}
  moved = lambda tree, axis: {"w": np.moveaxis(np.asarray(tree["w"]), 0, axis)}
  for method, options in (("imm", {"base_weight": [0.1, 0.9], "drop_rate": 0.4, "key": KEY}),
                          ("slerp", {"t": [0.2, 0.7]}), ("ties", {"densities": 0.5})):
    call = lambda a, b, method=method, options=options, **more: getattr(merging, method)(*{
        "imm": (a, a, b), "slerp": (a, b), "ties": (a, [b])}[method], **options, **more)
    expected = call(first, last, names=names)
    for axis in (1, -1):
      got = call(moved(first, axis), moved(last, axis), names=names, layer_axis=axis)
      np.testing.assert_array_equal(got["w"], moved(expected, axis)["w"])
  with pytest.raises(ValueError, match=r"w: 3 names for a leaf of shape \(3, 4, 5\) with its layers in axis 1"):
    merging.linear([first, last], weights=1, names=names, layer_axis=1)


class Block(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.linear, self.dropout = nnx.Linear(2, 2, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)


class Stack(linen.Module):
  @linen.compact
  def __call__(self, x):
    for i in range(2):
      x = linen.Dense(2, name=f"layers_{i}")(x)
    return x


def test_nnx_and_linen_states():
  """NNX states with random keys and Linen layers can be merged."""
  states = [nnx.state(Block(nnx.Rngs(i))) for i in range(2)]
  got = merging.linear(states, weights=1)
  kernel = lambda s: np.asarray(s["linear"]["kernel"][...])
  np.testing.assert_allclose(kernel(got), (kernel(states[0]) + kernel(states[1])) / 2, rtol=1e-6)
  params = [Stack().init(jax.random.key(i), jnp.ones((1, 2))) for i in range(2)]
  got = merging.wise_ft(params[0], params[1], alpha=[0.0, 1.0])["params"]
  for i in range(2):
    np.testing.assert_array_equal(got[f"layers_{i}"]["kernel"], params[i]["params"][f"layers_{i}"]["kernel"])


def test_equal_other_leaves_are_copied():
  """As equinox modules hold their activations."""
  trees = [{**A, "activation": jax.nn.relu, "name": "mlp"}, {**B, "activation": jax.nn.relu, "name": "mlp"}]
  got = merging.linear(trees, weights=1)
  assert (got["activation"], got["name"], float(got["w"][0, 0])) == (jax.nn.relu, "mlp", 2.0)
  with pytest.raises(ValueError, match=r"activation is .* in models\[0\], .*tanh.* in models\[1\]"):
    merging.linear([trees[0], {**trees[1], "activation": jnp.tanh}], weights=1)


def test_float64_stays():
  wide = [{"w": x["w"].astype(np.float64)} for x in (A, B)]
  for got in (merging.linear(wide, weights=1), merging.imm(*wide, wide[1], base_weight=0.5, drop_rate=0.2, key=KEY)):
    assert got["w"].dtype == np.float64


@pytest.mark.parametrize(("call", "expected"), [
    (lambda: merging.linear(A, weights=1), "models: expected a list of trees, got one dict"),
    (lambda: merging.ties(A, B, densities=0.5), "models: expected a list of trees"),
    (lambda: merging.imm(A, A, B, base_weight=0.5, drop_rate=0.1, key=0), r"key=0: expected a key such as"),
    (lambda: merging.imm(A, A, B, base_weight=0.5, drop_rate=0.1, key=None), "key=None: expected a key"),
    (lambda: merging.linear([A, {"w": jax.ShapeDtypeStruct((2, 3), np.float32)}], weights=1),
     r"w of models\[1\] is a ShapeDtypeStruct"),
    (lambda: merging.linear([A, B], weights=1, names={"w": 3}), "names: 3 at w: expected a name"),
    (lambda: merging.linear([A, B], weights=1, names={"v": "w"}), "names: expected a tree of the models' form"),
    (lambda: merging.linear([{"w": 1.0}, {"w": "text"}], weights=1), r"w is float in models\[0\], str in models\[1\]"),
    (lambda: merging.fisher([A, B], [A]), "fishers: 1 given for 2 models")],
    ids=["one-tree", "trees-as-arguments", "key-is-int", "no-key", "abstract", "name-is-int", "other-names",
         "text-leaf", "too-few-fishers"])
def test_what_does_not_fit_is_named(call, expected):
  with pytest.raises(ValueError, match=expected):
    call()
  with pytest.raises(TypeError, match=r"ties\(\) takes no 'density'; did you mean densities\?"):
    merging.ties(A, [B], density=0.5)
  with pytest.raises(TypeError, match=r"slerp\(\) missing a required argument: 't'"):
    merging.slerp(A, B)


_MESHES = """
import json, sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.merging import every_method as t
from imm_jax.merging import registry
methods, kinds = sys.argv[1].split(","), [AxisType[kind] for kind in sys.argv[2].split(",")]
rng = np.random.default_rng(0)
names = t.NAMES[:len(kinds)]
tree = lambda: {n: rng.normal(size=(8, 16)).astype(np.float32) for n in names}
found = {"different": [], "moved": [], "refused": []}
for method in methods:
  trees = [tree() for _ in t.arguments(method)]
  if method == "fisher":
    trees = [{n: np.abs(x) for n, x in tr.items()} for tr in trees]
  expected = t.call(method, trees)
  for kind in kinds:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    for spec in (P("d"), P(None, "d"))[:len(kinds)]:
      placed = NamedSharding(mesh, spec)
      put = jax.tree.map(lambda x: jax.device_put(x, placed), trees)
      with jax.set_mesh(mesh):
        got = t.call(method, put)
        traced = jax.jit(lambda ts: t.call(method, ts))(put)
      if not all(np.allclose(x, traced[n], rtol=0, atol=2e-6) for n, x in got.items()):
        found["different"].append([method, str(kind), str(spec), "jit"])
      for n, x in got.items():
        if not np.allclose(x, expected[n], rtol=0, atol=2e-6):
          found["different"].append([method, str(kind), str(spec)])
        if not x.sharding.is_equivalent_to(placed, x.ndim):
          found["moved"].append([method, str(kind), str(spec)])
  inside = jax.shard_map(lambda ts: t.call(method, ts), mesh=mesh, in_specs=P("d"), out_specs=P("d"))
  try:
    got = inside(jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("d"))), trees))
    found["different"] += [[method, "shard_map"] for n in got if not np.allclose(got[n], expected[n], atol=2e-6)]
  except ValueError as e:
    found["refused"].append(method)
    assert "cannot run inside jax.shard_map" in str(e), e
print(json.dumps(found))
"""


@pytest.mark.full
@pytest.mark.parametrize(("methods", "kinds"), [
    (("linear", "ties", "della", "slerp"), "Explicit"),
    pytest.param(tuple(every_method.OPTIONS), "Auto,Explicit", marks=pytest.mark.slow)])
def test_meshes_and_shard_map(methods: tuple[str, ...], kinds: str):
  """Methods run on explicit and automatic meshes and within `shard_map`."""
  environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", _MESHES, ",".join(methods), kinds], cwd=REPO, env=environment,
                        capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout)
  assert (found["different"], found["moved"]) == ([], [])
  # What looks at single entries alone runs there.
  assert set(found["refused"]) == {name for name in methods if registry.METHODS[name].needs_whole_tensors}
  assert not {"linear", "task_arithmetic", "lines", "wise_ft", "nearswap", "passthrough", "fisher"} & set(
      found["refused"])
