"""Attention of a decoding step: to a prefix and a row's own slots, by XLA and by kernels, against numpy in float64."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from imm_jax.aot import topology
from imm_jax.model import cached, decode_kernels, sharding

B, K, G, S, L, H = 4, 2, 3, 128, 64, 64
USED = np.array([0, 5, 63, 127], np.int32)


def _inputs() -> dict[str, jax.Array]:
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  return {"q": draw(B, K * G, 1, H), "k": draw(B, K, S, H), "v": draw(B, K, S, H),
          "prefix": (draw(K, L, H), draw(K, L, H))}


def _laid(given: dict[str, jax.Array], kernel: str) -> dict[str, jax.Array]:
  return {**given, "k": given["k"].swapaxes(2, 3)} if kernel == "columns" else given


def _expected(q, k, v, prefix, length: int) -> np.ndarray:
  """Each row alone, the prefix's keys before its own."""
  q, k, v, pk, pv = (np.asarray(x, np.float64) for x in (q, k, v, *prefix))
  out = np.zeros((B, K * G, 1, H))
  for b, head in np.ndindex(B, K * G):
    keys, values = (np.concatenate([p[head // G, :length], x[b, head // G, :USED[b] + 1]])
                    for p, x in ((pk, k), (pv, v)))
    weights = np.exp(keys @ q[b, head, 0] / 8)
    out[b, head, 0] = weights @ values / weights.sum()
  return out


@pytest.mark.full
@pytest.mark.parametrize("length", [0, 40, L])
@pytest.mark.parametrize("kernel", decode_kernels.KERNELS)
def test_a_softmax_over_two_parts_is_one_over_all(kernel: str, length: int) -> None:
  given = _inputs()
  run = functools.partial(cached.decode_attention, length=jnp.int32(length), used=jnp.asarray(USED), kernel=kernel,
                          interpret=True)
  got = run(**_laid(given, kernel))
  np.testing.assert_allclose(got, _expected(**given, length=length), rtol=1e-5, atol=2e-6)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install -e '.[aot]'")
@pytest.mark.parametrize(("heads", "group", "head_dim"), [(2, 6, 128), (4, 7, 128), (2, 7, 64), (8, 4, 128)])
def test_the_kernel_for_tpus_compiles_for_one(heads: int, group: int, head_dim: int) -> None:
  """In the shapes of Qwen2.5-1.5B, 7B, 0.5B and Llama-3-8B, on the four chips of a host."""
  slice_ = topology.describe_slice("v5e:2x2")
  mesh = sharding.decoding_mesh(slice_.mesh(data=1, fsdp=1, tensor=-1), heads)
  shape = lambda spec, *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
  rows = P("data", "tensor")
  prefix = (shape(P("tensor"), heads, 1024, head_dim),) * 2
  cache = shape(rows, 8, heads, 640, head_dim)
  used = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=NamedSharding(mesh, P()))
  run = lambda q, k, v, prefix, used: cached.decode_attention(
      q, k, v, prefix=prefix, length=jnp.int32(1000), used=used, kernel="ragged", mesh=mesh)
  with topology.quiet_libtpu():
    compiled = jax.jit(run).lower(shape(rows, 8, heads * group, 1, head_dim), cache, cache, prefix, used).compile()
  assert "ragged_decode" in compiled.as_text()


def test_what_lies_past_a_row_s_slots_does_not_count() -> None:
  given = _inputs()
  options = {"length": jnp.int32(40), "used": jnp.asarray(USED)}
  for kernel in decode_kernels.KERNELS:
    run = functools.partial(cached.decode_attention, **options, kernel=kernel, interpret=True)
    beyond = np.arange(S)[None, :] > USED[:, None]
    other = {**given, "k": jnp.where(beyond[:, None, :, None], 1e4, given["k"]),
             "prefix": tuple(x.at[:, 40:].set(1e4) for x in given["prefix"])}
    np.testing.assert_array_equal(run(**_laid(given, kernel)), run(**_laid(other, kernel)))
