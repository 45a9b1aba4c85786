"""Every merging method on trees that are spread over devices, against the same trees in one place."""

import json
import os
import subprocess
import sys

import pytest

from tests import REPO

_SHARDED = """
import json, sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from imm_jax import merging
from tests.merging import cases
rng = np.random.default_rng(1)
names = {"w": "lm_head.weight", "stack": ("model.layers.0.w", "model.layers.1.w"), "bias": "model.norm.weight"}
def tree():
  return {"w": rng.normal(size=(16, 24)).astype(np.float32), "stack": rng.normal(size=(2, 8, 16)).astype(np.float32),
          "bias": rng.normal(size=(32,)).astype(np.float32)}
trees = [tree() for _ in range(4)]
found = {"different": [], "moved": []}
layouts = {2: {"w": P("x"), "stack": P(None, "x"), "bias": P("x")},
           8: {"w": P("x", "y"), "stack": P(None, "y", "x"), "bias": P(("x", "y"))}}
for method in cases.CASES:
  options = {"names": names, **({"importance": [1.0, 2.0]} if method == "iimm" else {})}
  expected = cases.call(method, trees, **options)
  for count, layout in layouts.items():
    if count == 2 and method not in ("imm", "ties", "model_stock"):
      continue  # nothing that the others do differs by the number of devices
    shape = (2, 1) if count == 2 else (2, 4)
    mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:count])
    put = lambda tr: {k: jax.device_put(v, NamedSharding(mesh, layout[k])) for k, v in tr.items()}
    got = cases.call(method, [put(tr) for tr in trees], **options)
    for name, leaf in got.items():
      if np.asarray(leaf).tobytes() != np.asarray(expected[name]).tobytes():
        found["different"].append([method, count, name])
      if not leaf.sharding.is_equivalent_to(NamedSharding(mesh, layout[name]), leaf.ndim):
        found["moved"].append([method, count, name])
thin = [{"w": rng.normal(size=(16, 64, 32)).astype(np.float32), "v": rng.normal(size=(64, 1, 8)).astype(np.float32)}
        for _ in range(3)]
whole = merging.linear(thin, weights=[0.3, 0.21, 0.4])
for kind in (AxisType.Auto, AxisType.Explicit):
  line = jax.make_mesh((8,), ("x",), axis_types=(kind,))
  apart = [jax.tree.map(lambda v: jax.device_put(v, NamedSharding(line, P(None, None, "x"))), tr) for tr in thin]
  for name, leaf in merging.linear(apart, weights=[0.3, 0.21, 0.4]).items():
    if np.asarray(leaf).tobytes() != np.asarray(whole[name]).tobytes():
      found["different"].append(["linear", str(kind), name])
  trimmed = merging.ties(apart[0], apart[1:], densities=0.3)
  expected = merging.ties(thin[0], thin[1:], densities=0.3)
  mixed = merging.ties(thin[0], apart[1:], densities=0.3)  # a base of numpy and models on the mesh
  found["different"] += [["ties", str(kind), n] for n in thin[0]
                         for t in (trimmed, mixed) if (np.asarray(t[n]) != expected[n]).any()]
put = [{k: jax.device_put(v, NamedSharding(mesh, layout[k])) for k, v in tr.items()} for tr in trees[:3]]
imm = lambda b, s, u: merging.imm(b, s, u, base_weight=0.4, drop_rate=0.3, key=cases.KEY, names=names)
hlo = jax.jit(imm).lower(*put).compile().as_text()
words = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
found["collectives"] = [word for word in words if word in hlo]
print(json.dumps(found))
"""


@pytest.mark.full
def test_sharded_merge_is_bitwise_equal():
  """Results lie where the inputs do, and IMM moves nothing between devices."""
  environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", _SHARDED], cwd=REPO, env=environment, capture_output=True, text=True,
                        check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  assert json.loads(done.stdout) == {"different": [], "moved": [], "collectives": []}
