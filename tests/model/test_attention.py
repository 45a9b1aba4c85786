"""Attention of every backend against a plain softmax over each segment, and which backend is chosen where."""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from imm_jax import config_checks
from imm_jax.errors import UserError
from imm_jax.model import attention, sharding
from imm_jax.model.config import ModelConfig

CONFIG = ModelConfig(vocab_size=64, hidden_size=256, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
                     head_dim=64, rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=False, qkv_bias=True)


def _inputs(batch: int, heads: int, kv_heads: int, length: int, head_dim: int, dtype: jnp.dtype) -> list[jax.Array]:
  """q, k, v and a direction for the output's gradient."""
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=(batch, n, length, head_dim)), dtype) for n in (heads, kv_heads, kv_heads, heads)]


def _segments(batch: int, length: int) -> np.ndarray:
  """Rows with three segments and padding, one segment, none."""
  ids = np.zeros((batch, length), np.int32)
  for row, ends in enumerate(((length // 3, length // 2 + 3, length - 9), (length,))):
    ids[row, :ends[-1]] = 1 + np.searchsorted(ends, np.arange(ends[-1]), side="right")
  return ids


def _run(attend: attention.Attend, q: jax.Array, k: jax.Array, v: jax.Array, direction: jax.Array) -> list[np.ndarray]:
  """The output, and the gradients of q, k and v."""

  def along(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
    out = attend(*qkv)
    return jnp.vdot(out.astype(jnp.float32), direction.astype(jnp.float32)), out

  (_, out), grads = jax.jit(jax.value_and_grad(along, (0, 1, 2), has_aux=True))(q, k, v)
  return [np.asarray(x, np.float32) for x in (out, *grads)]


def _close(got: list[np.ndarray], want: list[np.ndarray], tolerance: float) -> None:
  for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=name)


def test_xla_is_a_softmax_over_each_segment() -> None:
  q, k, v, _ = _inputs(2, 4, 2, 48, 8, jnp.float32)
  ids = _segments(2, 48)
  got = attention.packed(jnp.asarray(ids), backend="xla")(q, k, v)
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  for b, h, t in np.ndindex(2, 4, 48):
    seen = [s for s in range(t + 1) if ids[b, s] == ids[b, t]]
    weights = np.exp(k[b, h // 2, seen] @ q[b, h, t] / 8**0.5)
    np.testing.assert_allclose(got[b, h, t], weights @ v[b, h // 2, seen] / weights.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("length", "dtype", "tolerance"), [
    (40, jnp.float32, 2e-6), (300, jnp.float32, 2e-6), (256, jnp.bfloat16, 1e-2),
    pytest.param(2100, jnp.float32, 4e-6, marks=pytest.mark.full)], ids=str)
def test_blockwise_equals_xla(length: int, dtype: Any, tolerance: float) -> None:
  inputs, ids = _inputs(3, 4, 2, length, 8, dtype), jnp.asarray(_segments(3, length))  # 1, 3, 16 and 2 blocks
  got = _run(attention.packed(ids, backend="blockwise"), *inputs)
  _close(got, _run(attention.packed(ids, backend="xla"), *inputs), tolerance)


def test_branches_see_their_own_past() -> None:
  """Branches see what is before them in their own text."""
  rng = np.random.default_rng(1)
  length, parents = 150, np.full((2, 150), -1)
  for row, t in np.ndindex(2, length):  # each token follows the one before, or one of its ancestors
    line = [t - 1] if t else [-1]
    while line[-1] >= 0:
      line.append(parents[row, line[-1]])
    parents[row, t] = line[0] if rng.random() < 0.7 else rng.choice(line)
  sees = np.zeros((2, length, length), bool)
  for row, t in np.ndindex(2, length):
    sees[row, t, t] = True
    if parents[row, t] >= 0:
      sees[row, t] |= sees[row, parents[row, t]]
  until = np.array([[np.flatnonzero(sees[row, :, t]).max() for t in range(length)] for row in range(2)], np.int32)
  inputs = _inputs(2, 4, 2, length, 8, jnp.float32)
  plain = _run(functools.partial(attention.masked, mask=jnp.asarray(sees)), *inputs)
  for backend in ("xla", "blockwise", "cudnn"):
    with mock.patch.object(attention, "cudnn", functools.partial(attention.cudnn, implementation="xla")):
      _close(_run(attention.branching(jnp.asarray(until), backend=backend), *inputs), plain, 2e-6)


def test_blockwise_holds_no_whole_scores() -> None:
  q, k, v, direction = _inputs(2, 4, 2, 512, 8, jnp.float32)
  attend = attention.packed(jnp.asarray(_segments(2, 512)), backend="blockwise")
  step = jax.jit(jax.grad(lambda *qkv: jnp.vdot(attend(*qkv), direction), (0, 1, 2)))
  text = step.lower(q, k, v).as_text()
  assert "tensor<2x2x256x512x" in text  # two queries a key/value head, 128 of each
  assert "x512x512x" not in text
  assert "x1024x512x" not in text


@pytest.mark.full
@pytest.mark.parametrize(("heads", "kv_heads", "length", "head_dim", "dtype", "tolerance"), [
    (4, 2, 256, 64, jnp.float32, 2e-6), (2, 2, 384, 128, jnp.bfloat16, 1e-2)], ids=str)
def test_splash_equals_xla(heads: int, kv_heads: int, length: int, head_dim: int, dtype: Any, tolerance: float) -> None:
  inputs, ids = _inputs(3, heads, kv_heads, length, head_dim, dtype), jnp.asarray(_segments(3, length))
  got = _run(attention.packed(ids, backend="splash", interpret=True), *inputs)
  _close(got, _run(attention.packed(ids, backend="xla"), *inputs), tolerance)


def _main(out: Path) -> None:
  """Runs on four devices: rows over two, heads over two."""
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)
  inputs, ids = _inputs(2, 4, 2, 128, 64, jnp.float32), jnp.asarray(_segments(2, 128))
  got = _run(attention.packed(ids, backend="splash", mesh=mesh, interpret=True), *inputs)
  placed = jax.device_put(inputs, jax.NamedSharding(mesh, sharding.P(("data", "fsdp"), "tensor")))
  blocks = _run(attention.packed(ids, backend="blockwise", mesh=mesh), *placed)
  want = _run(attention.packed(ids, backend="xla"), *inputs)
  error = lambda a, b: float(np.abs(a - b).max() / np.abs(b).max())
  out.write_text(json.dumps([error(a, b) for some in (got, blocks) for a, b in zip(some, want, strict=True)]))


@pytest.mark.full
def test_splash_and_blockwise_on_a_mesh_equal_xla(run_on_devices: Callable[..., None], tmp_path: Path) -> None:
  run_on_devices(__file__, tmp_path / "errors.json", devices=4)
  assert max(json.loads((tmp_path / "errors.json").read_text())) < 2e-6


def test_the_mask_for_cudnn_says_what_segments_say() -> None:
  inputs, ids = _inputs(3, 4, 2, 48, 8, jnp.float32), jnp.asarray(_segments(3, 48))
  with mock.patch.object(attention, "cudnn", functools.partial(attention.cudnn, implementation="xla")):
    attend = attention.packed(ids, backend="cudnn")
  _close(_run(attend, *inputs), _run(attention.packed(ids, backend="xla"), *inputs), 2e-6)


def test_cudnn_lowers_to_one_fused_kernel_each_way() -> None:
  library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
  q, k, v, direction = _inputs(2, 4, 2, 128, 64, jnp.bfloat16)
  attend = attention.packed(jnp.asarray(_segments(2, 128)), backend="cudnn")
  step = jax.jit(jax.grad(lambda *qkv: jnp.vdot(attend(*qkv), direction), (0, 1, 2)))
  with mock.patch.object(library, "check_cudnn_version", return_value=91000):  # none is installed here
    text = step.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("@__cudnn$fmhaScaleBiasSoftmax(") == text.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
  assert "tensor<2x4x128x128x" not in text  # the scores


@pytest.mark.parametrize("backend", ["xla", "blockwise", "splash", "cudnn"])
def test_custom_scale_multiplies_queries(backend: str) -> None:
  """A scale in place of the usual one is a multiple of the queries."""
  q, k, v, direction = _inputs(2, 4, 2, 128, 64, jnp.float32)
  ids, scale = jnp.asarray(_segments(2, 128)), 0.3
  plain = attention.packed(ids, backend="xla")
  with mock.patch.object(attention, "cudnn", functools.partial(attention.cudnn, implementation="xla")):
    attend = attention.packed(ids, backend=backend, **({"interpret": True} if backend == "splash" else {}))
  got = _run(functools.partial(attend, scale=scale), q, k, v, direction)
  _close(got, _run(lambda q, k, v: plain(q * (scale * 64**0.5), k, v), q, k, v, direction), 4e-6)


@pytest.mark.parametrize("backend", ["xla", "blockwise", "splash"])
def test_padding_is_finite_and_inert(backend: str) -> None:
  """It gets no gradient from tokens."""
  q, k, v, direction = _inputs(1, 2, 1, 128, 64, jnp.float32)
  ids = jnp.asarray(np.arange(128)[None] < 100, jnp.int32)
  direction = direction * ids[:, None, :, None]
  interpret = {"interpret": True} if backend == "splash" else {}
  out, *grads = _run(attention.packed(ids, backend=backend, **interpret), q, k, v, direction)
  assert np.isfinite(out).all()
  for grad in grads:
    assert (grad[:, :, 100:] == 0).all()
    assert (grad[:, :, :100] != 0).any()


def _mesh(platform: str, *, kind: str = "chip", capability: str = "9.0", sizes: tuple[int, ...] = (1, 8, 1)) -> Any:
  """What `choose` looks at, of devices that are not here."""
  device = SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability,
                           client=SimpleNamespace(platform_version="cuda 13000"))
  return SimpleNamespace(devices=np.full(sizes, device), size=int(np.prod(sizes)),
                         shape=dict(zip(sharding.AXES, sizes, strict=True)))


@pytest.mark.parametrize(("platform", "changes", "want"), [
    ("tpu", {}, "splash"), ("gpu", {}, "cudnn"), ("cpu", {}, "blockwise"),
    ("tpu", {"dtype": jnp.float32}, "xla"), ("gpu", {"dtype": jnp.float32}, "xla"),
    ("tpu", {"length": 200}, "xla"), ("gpu", {"length": 200}, "cudnn"), ("gpu", {"length": 201}, "xla"),
    ("tpu", {"head_dim": 80}, "xla"), ("gpu", {"head_dim": 80}, "cudnn"), ("gpu", {"head_dim": 10}, "xla"),
    ("tpu", {"rows": 12}, "xla"), ("gpu", {"rows": 12}, "xla"),
    ("tpu", {"sizes": (1, 2, 4)}, "xla"), ("tpu", {"sizes": (1, 4, 2)}, "splash"),
    ("gpu", {"capability": "7.0"}, "xla"), ("gpu", {"head_dim": 256}, "cudnn"),
    ("gpu", {"head_dim": 256, "capability": "8.0"}, "xla")], ids=str)
def test_auto_takes_a_kernel_that_runs(platform: str, changes: dict[str, Any], want: str,) -> None:
  """The kernel of the platform where it can run."""
  mesh = _mesh(platform, **{k: v for k, v in changes.items() if k in ("sizes", "capability")})
  config = dataclasses.replace(CONFIG, head_dim=changes.get("head_dim", 64))
  choose = functools.partial(attention.choose_backend, config=config, dtype=changes.get("dtype", jnp.bfloat16),
                             mesh=mesh, length=changes.get("length", 256), rows=changes.get("rows", 8))
  assert choose("auto") == want
  assert choose("xla") == "xla"
  kernel = {"tpu": "splash", "gpu": "cudnn", "cpu": "splash"}[platform]
  if want in ("xla", "blockwise"):
    with pytest.raises(UserError, match=f"config.sft.attention='{kernel}' (needs|computes)") as error:
      choose(kernel)
    assert "\n" not in str(error.value)
  else:
    assert choose(kernel) == want


def test_unknown_backend_is_refused() -> None:
  """The message has the nearest name."""
  config = tiny.get_config()
  config.sft.attention = "splsh"
  with pytest.raises(UserError, match=r"config\.sft\.attention='splsh': did you mean splash"):
    config_checks.validate(config)


if __name__ == "__main__":
  _main(Path(sys.argv[1]))
