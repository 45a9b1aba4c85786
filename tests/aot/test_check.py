"""What is read from compiled programs, and, where libtpu is installed, programs compiled for TPU slices.

The programs with collectives run on eight faked devices in another process (`_main`).
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs import common
from imm_jax.aot import check, costs, hlo, topology
from imm_jax.errors import UserError
from imm_jax.model import sharding
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import count_params
from tests import REPO

CONFIG = {"model_type": "llama", "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512,
          "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
MODEL = ModelConfig.from_hf(CONFIG)
LAYER, TABLE = 2 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512), 2 * 2048 * 256  # bytes in bfloat16, norms left out
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install -e '.[aot]'")

# As a TPU's compiler writes it: a gather that runs beside a product stands in three computations, under one chain.
TEXT = """HloModule step, is_scheduled=true

%cond (p: (s32[], bf16[8,16])) -> pred[] {
  %limit = s32[] constant(6)
  %p = (s32[], bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %count = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%count, %limit), direction=LT
}

%start (a: bf16[8,16]) -> bf16[32,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  ROOT %gather.1 = bf16[32,16]{1,0} all-gather(%a), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, \
dimensions={0}, frontend_attributes={chain_id="7"}
}

%beside (b: bf16[8,16], c: bf16[64,64], d: bf16[100,64,64]) -> (bf16[64,64], bf16[32,16]) {
  %b = bf16[8,16]{1,0} parameter(0)
  %c = bf16[64,64]{1,0} parameter(1)
  %d = bf16[100,64,64]{2,1,0} parameter(2)
  %cut = bf16[1,64,64]{2,1,0} dynamic-slice(%d), dynamic_slice_sizes={1,64,64}
  %dot = bf16[64,64]{1,0} convolution(%c, %cut), dim_labels=bf_io->bf
  %gather.2 = bf16[32,16]{1,0} all-gather(%b), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, \
dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %both = (bf16[64,64]{1,0}, bf16[32,16]{1,0}) tuple(%dot, %gather.2)
}

%body (q: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %q = (s32[], bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %count.2 = s32[] get-tuple-element(%q), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%q), index=1
  %w = bf16[64,64]{1,0} get-tuple-element(%q), index=2
  %fast = bf16[100,64,64]{2,1,0} get-tuple-element(%q), index=3
  %async.1 = bf16[32,16]{1,0} fusion(%x), kind=kCustom, calls=%start
  %fusion.2 = (bf16[64,64]{1,0}, bf16[32,16]{1,0}) fusion(%x, %w, %fast), kind=kOutput, calls=%beside, \
backend_config={"window_config":{"estimated_cycles":"1000"}}
  %reduced = f32[4,4]{1,0} reduce-scatter(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %next = (s32[], bf16[8,16]{1,0}) tuple(%count.2, %x)
}

ENTRY %main (arg: bf16[8,16]) -> bf16[8,16] {
  %arg = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %loop = (s32[], bf16[8,16]{1,0}) while(%arg), condition=%cond, body=%body
  %quick = f32[128]{0:T(128)S(1)} negate(%arg), backend_config={"window_config":{"estimated_cycles":"500"}}
  %summed = f32[10]{0} all-reduce(%quick), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%cond
  ROOT %out = bf16[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


def _main(out: Path) -> None:
  """Runs on eight devices: five gathers and scatters in a loop, one reduction over all."""
  mesh = sharding.make_mesh(data=2, fsdp=4)

  def local(w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:

    def step(x: jax.Array, part: jax.Array) -> tuple[jax.Array, jax.Array]:
      whole = jax.lax.all_gather(part, "fsdp", tiled=True)
      x = jnp.tanh(x @ whole)
      return x, jax.lax.psum_scatter(x.T @ x, "fsdp", tiled=True)

    x, scattered = jax.lax.scan(step, x, w)
    return jax.lax.psum(jnp.sum(x), ("data", "fsdp")), scattered

  run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(None, "fsdp"), sharding.BATCH),
                              out_specs=(P(), P(None, "fsdp")), check_vma=False))
  traced = run.trace(jax.ShapeDtypeStruct((5, 32, 32), jnp.float32), jax.ShapeDtypeStruct((64, 32), jnp.float32))
  found = hlo.Module(traced.lower().compile().as_text()).collectives()
  out.write_text(json.dumps({"flops": costs.count_flops(traced.jaxpr), "collectives": [
      [c.kind, c.size, sorted(c.group), c.times] for c in found]}))


def test_collectives_of_a_compiled_loop_are_counted(run_on_devices: Callable[..., None], tmp_path: Path) -> None:
  run_on_devices(__file__, tmp_path / "seen.json")
  seen = json.loads((tmp_path / "seen.json").read_text())
  # Each of 8 devices multiplies its 8 rows by [32, 32], and [32, 8] by [8, 32], five times.
  assert seen["flops"] == 8 * 5 * (2 * 8 * 32 * 32) * 2
  by_kind = {kind: (size, group, times) for kind, size, group, times in seen["collectives"]}
  assert by_kind == {"all-gather": (32 * 32 * 4, [0, 1, 2, 3], 5), "reduce-scatter": (32 * 32 * 4, [0, 1, 2, 3], 5),
                     "all-reduce": (4, list(range(8)), 1)}


def test_flops_count_loops_and_recomputation() -> None:
  """Products in loops, in gradients and in what is computed again for them."""
  w, x = jnp.ones((3, 8, 8)), jnp.ones((4, 8))
  product = 2 * 4 * 8 * 8

  def loss(w: jax.Array, again: bool) -> jax.Array:
    layer = lambda x, w: jnp.tanh(x @ w)
    layer = jax.checkpoint(layer) if again else layer
    return jnp.sum(jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)[0])

  count = lambda f, *args: costs.count_flops(jax.make_jaxpr(f)(*args))
  plain, again = functools.partial(loss, again=False), functools.partial(loss, again=True)
  assert count(plain, w) == 3 * product
  assert count(jax.grad(plain), w) == 3 * 3 * product
  assert count(jax.grad(again), w) == 3 * 4 * product
  assert count(lambda x: jnp.einsum("bk,bk->b", x, x), x) == 2 * 4 * 8
  with pytest.raises(ValueError, match="does not say how often"):
    count(lambda x: jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ w[0], x), x)


def test_tpu_program_is_parsed() -> None:
  """Its regions, cycles and collectives are found."""
  module = hlo.Module(TEXT)
  entry, body = module.regions()
  assert [(r.name, r.times, module.cycles(r)) for r in (entry, body)] == [("main", 1, 500), ("body", 6, 1000)]
  found = {c.kind: c for c in module.collectives()}
  assert len(module.collectives()) == len(found) == 3
  gather, scatter, total = found["all-gather"], found["reduce-scatter"], found["all-reduce"]
  assert (gather.size, gather.times, gather.overlapped, gather.group) == (32 * 16 * 2, 6, True, (0, 1, 2, 3))
  assert (scatter.size, scatter.times, scatter.overlapped, scatter.group) == (4 * 4 * 4 * 4, 6, False, (0, 1, 2, 3))
  assert (total.size, total.times, total.overlapped, total.group) == (40, 1, False, (0, 4))


def test_traffic_counts_hbm_and_slices() -> None:
  """Only what lies in HBM counts, and of a slice the part that is read."""
  module = hlo.Module(TEXT)
  entry, body = module.regions()
  assert module.traffic(entry) == 8 * 16 * 2  # read; the result stays on the chip
  # w whole, of the stack one slice, the product; the gather and its operand are no traffic of the fusion.
  assert module.traffic(body) == 2 * 64 * 64 * 3


@pytest.mark.parametrize(("groups", "want"), [
    ("{{0,2},{1,3}}", (0, 2)), ("[2,2]<=[4]", (0, 1)), ("[2,2]<=[2,2]T(1,0)", (0, 2)),
    ("mesh['a'=2,'b'=2] {'b'}", (0, 1)), ("mesh['a'=2,'b'=1,'c'=2] {'a','b','c'}", (0, 1, 2, 3)),
    ("mesh['a'=2,'b'=2], device_ids=([4]) {'a'}", (0, 2)),
    ("mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}", (0, 1)), ("new form", None)])
def test_the_group_of_a_collective(groups: str, want: tuple[int, ...] | None) -> None:
  module = hlo.Module(f"""HloModule m
ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %y = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=%add
}}""")
  if want is None:
    with pytest.raises(ValueError, match=r"y: its replica_groups cannot be read: .*new form"):
      module.collectives()
  else:
    assert [c.group for c in module.collectives()] == [want]


def _slice(name: str, sizes: tuple[int, ...], chip: str) -> topology.TpuSlice:
  devices = tuple(SimpleNamespace(coords=[*c, 0, 0][:3]) for c in np.ndindex(sizes))
  return topology.TpuSlice(name, topology.CHIPS[chip], sizes, 1, devices)


@pytest.mark.parametrize(("kind", "sizes", "group", "want"), [
    # GB/s of all links: on a 4 x 4 mesh a corner has two links of 50, on the 16 x 16 torus a chip has four.
    ("all-gather", (4, 4), slice(None), 1e9 * 15 / 16 / 100e9),
    ("all-reduce", (4, 4), slice(None), 2e9 * 15 / 16 / 100e9),
    ("all-gather", (4, 4), slice(4), 1e9 * 3 / 4 / 50e9),
    ("all-gather", (16, 16), slice(16), 1e9 * 15 / 16 / 100e9),
    ("reduce-scatter", (16, 16), slice(None), 1e9 * 255 / 256 / 200e9),
    ("collective-permute", (4, 4), slice(2), 1e9 / 50e9), ("send", (4, 4), slice(0), 1e9 / 3.125e9)],
    ids=["gather-corner", "reduce-corner", "gather-row", "gather-torus", "scatter-torus", "permute", "send"])
def test_seconds_of_a_collective(kind: str, sizes: tuple[int, ...], group: slice, want: float) -> None:
  v5e = _slice("v5e", sizes, "v5e")
  assert v5e.seconds(kind, 1e9, v5e.devices[group]) == pytest.approx(want)


def test_an_estimate_adds_up_regions() -> None:
  v5e = _slice("v5e:2x4", (2, 4), "v5e")
  mesh = SimpleNamespace(devices=np.array(v5e.devices, object))
  e = costs.estimate(hlo.Module(TEXT), v5e, mesh)
  gather, scatter, total = 1024 * 3 / 4 / 50e9, 256 * 3 / 4 / 50e9, 40 * 2 / 2 / 50e9
  assert e.compute == pytest.approx(6500 / 1.5e9)
  assert e.overlapped == pytest.approx(6 * gather)
  assert e.exposed == pytest.approx(6 * scatter + total)
  assert e.seconds == pytest.approx(6 * (1000 / 1.5e9 + scatter) + 500 / 1.5e9 + total)
  assert e.traffic == pytest.approx(256 + 80 + 6 * (2 * 64 * 64 * 3 + 2 * 1024 + 2 * 256))


def test_what_cannot_be_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
  config = common.get_config()
  config.model = str(tmp_path / "none")
  plan = functools.partial(check.make_plan, slices=1, rows_per_chip=1)
  with pytest.raises(UserError, match=r"none: no such checkpoint folder; expected .* or a hub id"):
    plan(config, topology_name="v5e:4x4")
  with pytest.raises(UserError, match="rows_per_chip=0: expected 1 or more"):
    check.make_plan(config, topology_name="v5e:4x4", slices=1, rows_per_chip=0)
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  config.model = str(tmp_path)
  for libtpu, name, message in ((None, "v5e:4x4", r"needs libtpu, TPU's compiler: pip install -e '\.\[aot\]'"),
                                ("here", "v5:4x4", r"--topology=v5:4x4: did you mean v5\w\?"),
                                ("here", "v5e-16", "such as v5e:4x4"), ("here", "v5e:four", "expected the chips")):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _, found=libtpu: found)
    with pytest.raises(UserError, match=message) as error:
      plan(config, topology_name=name)
    assert "\n" not in str(error.value)


def _plan(tmp_path: Path, topology_name: str, *, slices: int = 1, rows: int = 2, **sft: Any) -> check.StepPlan:
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  config = common.get_config()
  config.model = str(tmp_path)
  config.sft.row_length = 256
  config.sft.update(sft)
  return check.make_plan(config, topology_name=topology_name, slices=slices, rows_per_chip=rows)


@pytest.mark.full
@needs_libtpu
@pytest.mark.parametrize(("name", "slices", "remat"), [
    ("v5e:2x2", 1, "full"), pytest.param("v5e:4x4", 1, "attention", marks=pytest.mark.full),
    pytest.param("v5e:2x2", 2, "full", marks=pytest.mark.full)])
def test_a_step_compiles_for_a_slice(tmp_path: Path, name: str, slices: int, remat: str) -> None:
  plan = _plan(tmp_path, name, slices=slices, remat=remat)
  report = check.compile_step(plan)
  assert (report.attention, report.excess) == ("splash", "")
  # Master weights and two moments in float32, split over fsdp; of the peak they are a part.
  state = 12 * count_params(MODEL) / plan.mesh.shape["fsdp"]
  assert report.memory["arguments"] == pytest.approx(state, rel=0.1)
  assert state < report.memory["peak"] < 0.1 * plan.slice_.chip.hbm
  gathers = [c for c in report.estimate.collectives if c.kind == "all-gather"]
  assert {c.times for c in gathers} >= {MODEL.num_layers}
  assert max(c.size for c in gathers) == TABLE  # no stack of layers, each of LAYER bytes
  assert sum(c.size * c.times for c in gathers) >= 2 * (2 * LAYER) + 2 * TABLE  # in the forward and backward pass
  assert sum(c.size for c in report.estimate.collectives if c.kind == "send") * plan.mesh.shape["fsdp"] * (
      plan.mesh.shape["data"] // slices) == pytest.approx(4 * count_params(MODEL) * (slices > 1), rel=0.05)
  assert report.flops * plan.mesh.size > 6 * (count_params(MODEL) - TABLE / 2) * plan.tokens * plan.mesh.size
  assert report.estimate.seconds > report.ideal
  text = "\n".join(check.describe(plan, report))
  assert ": fits" in text
  assert "layer by layer" in text


@pytest.mark.full
@needs_libtpu
def test_a_step_that_does_not_fit_says_what_would(tmp_path: Path) -> None:
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  done = subprocess.run(
      [sys.executable, "-m", "imm_jax.main", "--config=configs/common.py", f"--config.model={tmp_path}",
       "--config.sft.row_length=256", "--compile_only", "--topology=v5e:2x2", "--rows_per_chip=20000"],
      cwd=REPO, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=600, check=False)
  assert done.returncode == 1
  assert "Traceback" not in done.stderr
  error = done.stderr.strip().splitlines()[-1]
  assert "does not fit a chip's memory" in error
  assert "of 15.75G" in error
  assert "fits with --rows_per_chip=" in error


@needs_libtpu
def test_slices_and_meshes_that_cannot_be(tmp_path: Path) -> None:
  with pytest.raises(UserError, match=r"--topology=v5e:3x3: .*known are such as v5e:4x4"):
    _plan(tmp_path, "v5e:3x3")
  config = common.get_config()
  config.model = str(tmp_path)
  for mesh, message in (({"data": 3}, "does not fit 4 device"), ({"tensor": -1, "fsdp": 4}, None)):
    config.mesh.update({"data": 1, "fsdp": -1, "tensor": 1} | mesh)
    plan = functools.partial(check.make_plan, config, topology_name="v5e:2x2", slices=1, rows_per_chip=1)
    if message is None:
      assert dict(plan().mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 1}
    else:
      with pytest.raises(UserError, match=message):
        plan()
  for data, message in ((3, r"config\.mesh data=3, .* does not fit 8 device"), (1, "2 slices must divide it")):
    config.mesh.update({"data": data, "fsdp": -1, "tensor": 1})
    with pytest.raises(UserError, match=message):
      check.make_plan(config, topology_name="v5e:2x2", slices=2, rows_per_chip=1)


if __name__ == "__main__":
  _main(Path(sys.argv[1]))
