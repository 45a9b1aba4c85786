"""The chunked loss of the head, compared with the loss of whole logits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imm_jax.training.loss import head_loss

ROWS, LENGTH, WIDTH, VOCAB = 3, 14, 8, 37


def _inputs(dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(ROWS, LENGTH, WIDTH)), rng.normal(size=(VOCAB, WIDTH))
  return (jnp.asarray(x, dtype), jnp.asarray(w, jnp.float32), jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH))),
          jnp.asarray(rng.integers(0, 3, (ROWS, LENGTH)), jnp.float32))


def _whole(x: jax.Array, w: jax.Array, targets: jax.Array, loss_mask: jax.Array) -> jax.Array:
  logits = jnp.einsum("btd,vd->btv", x.astype(jnp.float32), w)
  return jnp.sum(loss_mask * optax.softmax_cross_entropy_with_integer_labels(logits, targets))


@pytest.mark.parametrize("chunk", [1, 4, 5, 14, 100])
def test_chunked_loss_equals_whole(chunk: int) -> None:
  """Loss and gradients equal those of whole logits."""
  x, w, targets, loss_mask = _inputs(jnp.float32)
  # A factor, as in a mean, must scale the gradients.
  chunked = jax.jit(jax.value_and_grad(lambda x, w: 0.3 * head_loss(x, w, targets, loss_mask, chunk), (0, 1)))
  loss, (dx, dw) = chunked(x, w)
  whole = lambda x, w: 0.3 * _whole(x, w, targets, loss_mask)
  expected, (expected_dx, expected_dw) = jax.value_and_grad(whole, (0, 1))(x, w)
  assert float(loss) == pytest.approx(float(expected), rel=1e-6)
  value = jax.jit(head_loss, static_argnums=4)(x, w, targets, loss_mask, chunk)
  assert float(value) == pytest.approx(float(expected) / 0.3, rel=1e-6)
  np.testing.assert_allclose(dx, expected_dx, atol=1e-6)
  np.testing.assert_allclose(dw, expected_dw, atol=1e-5)


def test_bfloat16_is_within_its_rounding_error() -> None:
  x, w, targets, loss_mask = _inputs(jnp.bfloat16)
  loss, (dx, dw) = jax.value_and_grad(lambda x, w: head_loss(x, w, targets, loss_mask, 5), (0, 1))(x, w)
  expected, (expected_dx, expected_dw) = jax.value_and_grad(lambda x, w: _whole(x, w, targets, loss_mask), (0, 1))(x, w)
  assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
  assert float(loss) == pytest.approx(float(expected), rel=1e-2)
  for actual, target in ((dx, expected_dx), (dw, expected_dw)):
    error = np.linalg.norm(np.asarray(actual, np.float32) - np.asarray(target, np.float32))
    assert error < 2e-2 * np.linalg.norm(np.asarray(target, np.float32))


def test_whole_logits_never_exist() -> None:
  x, w, targets, loss_mask = _inputs(jnp.float32)

  def largest(jaxpr: Any) -> int:
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, "size")]
    inner = [largest(getattr(p, "jaxpr", p)) for eqn in jaxpr.eqns for p in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr"))
        if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
    return max([*sizes, *inner], default=0)

  measure = lambda loss: largest(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, w).jaxpr)
  assert measure(lambda x, w: _whole(x, w, targets, loss_mask)) == ROWS * LENGTH * VOCAB
  assert measure(lambda x, w: head_loss(x, w, targets, loss_mask, 2)) < ROWS * LENGTH * VOCAB
