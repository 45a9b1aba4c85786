"""Estimates of sampling on a TPU slice: what the compiled programs take, and what is said of the splits."""

import dataclasses
import math
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from configs import common
from imm_jax.aot import check, decoding, topology
from imm_jax.model import sharding
from tests.aot.test_check import LAYER, MODEL, _slice, needs_libtpu

GIB = 2**30
BFLOAT16 = jnp.dtype("bfloat16")


@pytest.mark.full
@needs_libtpu
def test_sampling_on_a_host_of_a_slice() -> None:
  host = decoding.host_slice(topology.describe_slice("v5e:4x4"))
  assert len(host.devices) == 4
  deep = dataclasses.replace(MODEL, num_layers=10)
  default, other = decoding.candidate_meshes(deep, host.devices)
  assert (default.shape["tensor"], other.shape["tensor"]) == (2, 1)
  step = decoding.compile_sampling(deep, default, host, rows=8, new_tokens=60, dtype=BFLOAT16)
  # The products' own are two sums of a layer. Of the rest one sum is the embedding's, five sums and three gathers draw
  # from a vocabulary that is split, two sums and a gather are of random numbers and tokens, whose rows are split.
  assert {kind: count for kind, count, _ in step.collectives} == {"all-reduce": 2 * 10 + 8, "all-gather": 4}
  assert step.weights == pytest.approx((10 * LAYER + 2 * 2 * 2048 * 256) / 2, rel=0.01)
  # Keys and values of a head: a layer's 192 slots of 4 rows, and 1024 of the prefix.
  assert step.cache == 2 * 10 * 64 * 2 * (4 * 192 + 1024)
  # A full pack has 32 rows of 256 tokens, of which a chip holds half of the rows and one head, and 512 prompts.
  assert step.prompts == pytest.approx(2 * 10 * 64 * 2 * 16 * 256 + 512 * 2048 * 4, rel=0.01)
  assert step.peak == step.weights + step.cache + step.prompts + max(step.temporaries, step.prefill_temporaries)


def _step(mesh: SimpleNamespace, *, prompts: float = 1.0, links: float = 0.0) -> decoding.Step:
  return decoding.Step(mesh, 64, 4.0 * GIB, GIB, prompts * GIB, 0.5 * GIB, 2.0 * GIB, (("all-reduce", 4, 1e6),), links,
                       1e9)


@pytest.fixture
def meshes(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
  """Stands for the splits of a host with four chips."""
  result = [SimpleNamespace(shape={"data": data, "tensor": 4 // data}) for data in (1, 4, 2)]
  result = [type("Mesh", (), {"shape": mesh.shape})() for mesh in result]
  monkeypatch.setattr(decoding, "host_slice", lambda _: _slice("v5e:2x2", (2, 2), "v5e"))
  monkeypatch.setattr(decoding, "candidate_meshes", lambda *_: result)
  return result


@pytest.mark.parametrize(("first", "second", "said"), [
    ({}, {"links": 1.0}, "which is the faster one by this estimate"),
    ({"links": 0.1}, {}, "which takes "),
    ({"prompts": 9.0}, {}, "which does not fit, while the other does"),
    ({}, {"prompts": 9.0}, "which is the faster one by this estimate"),
    ({"prompts": math.inf}, {}, "which does not fit, while the other does")], ids=str)
def test_the_default_split_is_compared_with_another(
    monkeypatch: pytest.MonkeyPatch, meshes: list, first: dict, second: dict, said: str) -> None:
  made = []

  def compile_sampling(model: object, mesh: object, *_: object, **options: object) -> decoding.Step:
    made.append(mesh)
    changes = first if mesh is meshes[0] else second
    if changes.get("prompts") == math.inf:
      raise MemoryError("20.1G of 15.75G")
    return _step(mesh, **changes)

  monkeypatch.setattr(decoding, "compile_sampling", compile_sampling)
  lines = [*decoding.describe(MODEL, _slice("v5e:4x4", (4, 4), "v5e"), rows=6, new_tokens=512, dtype=BFLOAT16)]
  assert made == meshes[:2]  # also where the rows cannot be split
  assert "on each of 4 hosts with 4 chips, bfloat16" in lines[0]
  assert "packs of 32 x 256 tokens" in lines[0]
  for line, changes in ((lines[1], first), (lines[2], second)):
    assert ("DOES NOT FIT" in line) is ("prompts" in changes)
  if not first.get("prompts"):
    assert "peak 8.00 of 15.75: fits" in lines[1]
  assert "data 4 x tensor 1 (which does not divide 6 rows, so that all are decoded 4 times)" in lines[2]
  assert lines[3].startswith("  the sampler takes the first, ")
  assert said in lines[3]


def test_sampling_settings_match_the_estimate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
  """The settings of sampling are those that are estimated."""
  config = common.get_config()
  config.sft.compute_dtype, config.sample.compute_dtype = "bfloat16", "float32"
  config.sampler.attention = "ragged"
  plan = check.StepPlan(MODEL, _slice("v5e:4x4", (4, 4), "v5e"), sharding.make_mesh(data=1, fsdp=-1), 1, 256, 1, "full",
                        "xla", BFLOAT16)
  said = {}
  for name, value in (("make_plan", plan), ("compile_step", check.Report("xla", {})), ("describe", ()),
                      ("_describe_importance", ()), ("_describe_merge", ())):
    monkeypatch.setattr(check, name, lambda *_, value=value, **__: value)
  monkeypatch.setattr(decoding, "describe", lambda *_, **options: said.update(options) or ())
  check.run(config, topology_name="v5e:4x4", slices=1, rows_per_chip=1)
  assert said == {"rows": 64, "new_tokens": 512, "dtype": jnp.dtype("float32"), "attention": "ragged"}
  config.sample.compute_dtype = "auto"
  check.run(config, topology_name="v5e:4x4", slices=1, rows_per_chip=1)
  assert said["dtype"] == BFLOAT16
  assert "nothing runs on a TPU" in capsys.readouterr().out
