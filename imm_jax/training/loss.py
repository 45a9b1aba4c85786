"""Cross-entropy of a language model's head, computed in chunks of positions.

The logits [tokens, vocabulary] in float32 are by far the largest array of a batch. Here they exist for one chunk of
positions at a time. Since the loss is a sum over tokens, the gradients of a chunk are computed along with its logits,
and nothing is computed twice.

Axes: B rows, T positions, D model, V vocabulary, C positions of a chunk.
"""

import functools

import jax
import jax.numpy as jnp

from imm_jax.model.attention import precision

# Upper bounds on the positions whose logits exist at once: per row, and over all rows of a device.
CHUNK, CHUNK_OF_ALL = 512, 4096


def choose_chunk(rows: int) -> int:
  """Returns the chunk length for a number of rows: large enough for fast matrix products, but no larger.

  >>> choose_chunk(8), choose_chunk(32), choose_chunk(5000)
  (512, 128, 1)
  """
  return max(1, min(CHUNK, CHUNK_OF_ALL // rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def head_loss(x: jax.Array, head: jax.Array, targets: jax.Array, loss_mask: jax.Array, chunk: int) -> jax.Array:
  """Computes the weighted sum of -log softmax(x W^T)[target] over all positions.

  Args:
    x: [B, T, D], inputs of the head, in the compute dtype.
    head: [V, D], the head.
    targets: int32 [B, T].
    loss_mask: float32 [B, T], the weight of each position: 1 where its target is learned, and otherwise 0.
    chunk: C; logits are [B, C, V]. See `choose_chunk`.

  Returns:
    A float32 scalar. Gradients flow to `x` and `head`.

  >>> x, w = jnp.array([[[1.0, 0.0]]]), jnp.eye(2)
  >>> round(float(head_loss(x, w, jnp.array([[0]]), jnp.ones((1, 1)), 1)), 4)
  0.3133
  """
  return _scan(x, head, targets, loss_mask, chunk, gradients=False)[0]


def _forward(x: jax.Array, head: jax.Array, targets: jax.Array, loss_mask: jax.Array, chunk: int):
  loss, _, dx, dw = _scan(x, head, targets, loss_mask, chunk, gradients=True)
  return loss, (dx, dw)


def _backward(chunk: int, residuals: tuple[jax.Array, jax.Array], g: jax.Array):
  del chunk
  dx, dw = residuals
  return (g * dx).astype(dx.dtype), (g * dw).astype(dw.dtype), None, None


head_loss.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def anchored_loss(x: jax.Array, head: jax.Array, base_x: jax.Array, base_head: jax.Array, targets: jax.Array,
                  loss_mask: jax.Array, chunk: int, share: float) -> tuple[jax.Array, jax.Array]:
  """Returns `head_loss` plus `share` times the weighted sum of KL(p_base || p) over all positions, and that sum.

  p = softmax(x W^T) over the whole vocabulary, p_base = softmax(x_base W_base^T). This is the distillation term of
  Learning without Forgetting (Li & Hoiem 2016, https://arxiv.org/abs/1606.09282) with the base model's distributions as
  soft targets at temperature 1, up to the entropy of p_base, which is constant. The gradient of the KL with respect to
  the logits is p - p_base, so it is computed along with the logits of a chunk.

  Args:
    x: [B, T, D], inputs of the head, in the compute dtype.
    head: [V, D], the head.
    base_x: [B, T, D'], inputs of the base model's head.
    base_head: [V, D'], the base model's head.
    targets: int32 [B, T].
    loss_mask: float32 [B, T].
    chunk: as for `head_loss`.
    share: factor of the KL.

  Returns:
    Two float32 scalars. Gradients flow only from the first, and only to `x` and `head`.

  >>> x, w, base = jnp.array([[[1.0, 0.0]]]), jnp.eye(2), jnp.zeros((1, 1, 2))
  >>> total, kl = anchored_loss(x, w, base, w, jnp.array([[0]]), jnp.ones((1, 1)), 1, 0.5)
  >>> round(float(kl), 4), round(float(total), 4)  # ln cosh(1/2), and 0.3133 + a half of it
  (0.1201, 0.3733)
  """
  return _scan(x, head, targets, loss_mask, chunk, gradients=False, base=(base_x, base_head), share=share)[:2]


def _anchored_forward(x: jax.Array, head: jax.Array, base_x: jax.Array, base_head: jax.Array, targets: jax.Array,
                      loss_mask: jax.Array, chunk: int, share: float):
  loss, kl, dx, dw = _scan(x, head, targets, loss_mask, chunk, gradients=True, base=(base_x, base_head), share=share)
  return (loss, kl), (dx, dw)


def _anchored_backward(chunk: int, share: float, residuals: tuple[jax.Array, jax.Array],
                       g: tuple[jax.Array, jax.Array]):
  del share
  dx, dw, *rest = _backward(chunk, residuals, g[0])
  return dx, dw, None, None, *rest


anchored_loss.defvjp(_anchored_forward, _anchored_backward)


def head_entropy(x: jax.Array, head: jax.Array, loss_mask: jax.Array, chunk: int) -> jax.Array:
  """Computes the weighted sum of the entropies of softmax(x W^T) over all positions, in nats; see `head_loss`.

  >>> x, w = jnp.zeros((1, 1, 2)), jnp.eye(2)
  >>> round(float(head_entropy(x, w, jnp.ones((1, 1)), 1)), 4)  # log 2
  0.6931
  """
  w = head.astype(x.dtype)

  def step(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    x, loss_mask = part
    return total + jnp.sum(loss_mask * _entropies(_log_probs(x, w))), None

  return jax.lax.scan(step, jnp.zeros((), jnp.float32), (_chunked(x, chunk), _chunked(loss_mask, chunk)))[0]


def compare_heads(x: jax.Array, head: jax.Array, base_x: jax.Array, base_head: jax.Array, targets: jax.Array,
                  loss_mask: jax.Array, chunk: int) -> jax.Array:
  """Compares two models on the same texts by weighted sums over all positions, in nats.

  Takes arguments as `anchored_loss` does; not meant to be differentiated.

  Returns:
    Float32 [5], the sums of KL(p_base || p) over the whole vocabulary, -log p[target], -log p_base[target], and the
    entropies of p and of p_base.

  >>> x, w, base = jnp.array([[[1.0, 0.0]]]), jnp.eye(2), jnp.zeros((1, 1, 2))
  >>> sums = compare_heads(x, w, base, w, jnp.array([[0]]), jnp.ones((1, 1)), 1)
  >>> [round(float(s), 4) for s in sums]  # the first is ln cosh(1/2)
  [0.1201, 0.3133, 0.6931, 0.5822, 0.6931]
  """
  w, base_w = head.astype(x.dtype), base_head.astype(base_x.dtype)

  def step(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
    x, base_x, targets, loss_mask = part
    log_p, base_log_p = _log_probs(x, w), _log_probs(base_x, base_w)
    hit = jnp.arange(w.shape[0]) == targets[..., None]
    loss = lambda log_p: -jnp.sum(jnp.where(hit, log_p, 0.0), axis=-1)
    values = [jnp.sum(jnp.exp(base_log_p) * (base_log_p - log_p), axis=-1), loss(log_p), loss(base_log_p),
              _entropies(log_p), _entropies(base_log_p)]
    return total + jnp.stack([jnp.sum(loss_mask * value) for value in values]), None

  inputs = tuple(_chunked(a, chunk) for a in (x, base_x, targets, loss_mask))
  return jax.lax.scan(step, jnp.zeros(5, jnp.float32), inputs)[0]


def _log_probs(x: jax.Array, w: jax.Array) -> jax.Array:
  """Returns log softmax(x W^T) in float32."""
  return jax.nn.log_softmax(jax.lax.dot_general(x, w, (((2,), (1,)), ((), ())), precision=precision(x.dtype),
                                                preferred_element_type=jnp.float32))


def _entropies(log_p: jax.Array) -> jax.Array:
  """Returns the entropies of log-probabilities along the last axis."""
  return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def token_scores(x: jax.Array, head: jax.Array, indices: jax.Array, targets: jax.Array, chunk: int,
                 ) -> tuple[jax.Array, jax.Array]:
  """Returns the log-probabilities log softmax(x W^T) of given tokens, possibly several per position.

  Args:
    x: [B, S, D], inputs of the head, in the compute dtype.
    head: [V, D], the head.
    indices: int32 [B, E], the position in S of each token.
    targets: int32 [B, E], the tokens.
    chunk: C; logits are [B, C, V].

  Returns:
    Log-probabilities, float32 [B, E], and whether each token is the most likely at its position, bool [B, E].

  >>> x, w = jnp.array([[[1.0, 0.0]]]), jnp.eye(2)
  >>> logprobs, best = token_scores(x, w, jnp.array([[0, 0]]), jnp.array([[0, 1]]), 1)
  >>> [round(float(p), 4) for p in logprobs[0]], best.tolist()
  ([-0.3133, -1.3133], [[True, False]])
  """
  w = head.astype(x.dtype)
  options = {"precision": precision(x.dtype), "preferred_element_type": jnp.float32}

  def step(_: None, part: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
    logits = jax.lax.dot_general(part, w, (((2,), (1,)), ((), ())), **options)
    return None, (jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1))

  norms, best = (jnp.moveaxis(chunks, 0, 1).reshape(x.shape[0], -1) for chunks in jax.lax.scan(
      step, None, _chunked(x, chunk))[1])
  at = lambda values: jnp.take_along_axis(values, indices, axis=1)
  # Target logits are computed separately: gathering them would need the logits of all positions in memory.
  logits = jnp.einsum("bed,bed->be", jnp.take_along_axis(x, indices[..., None], axis=1), jnp.take(w, targets, axis=0),
                      **options)
  return logits - at(norms), at(best) == targets


def _chunked(a: jax.Array, chunk: int) -> jax.Array:
  """Reshapes [B, T, ...] to [number of chunks, B, C, ...], padded with zeros; rows stay on their devices."""
  length = a.shape[1]
  chunks = -(-length // chunk)
  size = -(-length // chunks)
  padded = jnp.pad(a, ((0, 0), (0, chunks * size - length), *((0, 0),) * (a.ndim - 2)))
  return jnp.moveaxis(padded.reshape(a.shape[0], chunks, size, *a.shape[2:]), 1, 0)


def _scan(x: jax.Array, head: jax.Array, targets: jax.Array, loss_mask: jax.Array, chunk: int, *, gradients: bool,
          base: tuple[jax.Array, jax.Array] | None = None, share: float = 0.0):
  """Returns (loss, KL to the base, d loss/dx, d loss/dhead); the gradients are None unless `gradients`."""
  batch, length, _ = x.shape
  w = head.astype(x.dtype)
  base_w = base and base[1].astype(base[0].dtype)
  dot = functools.partial(jax.lax.dot_general, precision=precision(x.dtype), preferred_element_type=jnp.float32)

  def step(carry, part):
    loss, kl, dw = carry
    x, targets, loss_mask, *base_x = part
    logits = dot(x, w, (((2,), (1,)), ((), ())))
    norm = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    hit = jnp.arange(w.shape[0]) == targets[..., None]
    loss += jnp.sum(loss_mask * (norm[..., 0] - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)))
    p = jnp.exp(logits - norm)
    d = p - hit
    if base_x:
      base_logits = dot(base_x[0], base_w, (((2,), (1,)), ((), ())))
      base_norm = jax.nn.logsumexp(base_logits, axis=-1, keepdims=True)
      base_p = jnp.exp(base_logits - base_norm)
      chunk_kl = jnp.sum(loss_mask * jnp.sum(base_p * (base_logits - base_norm - (logits - norm)), axis=-1))
      loss, kl, d = loss + share * chunk_kl, kl + chunk_kl, d + share * (p - base_p)
    if not gradients:
      return (loss, kl, dw), None
    d = (d * loss_mask[..., None]).astype(x.dtype)
    dx = dot(d, w, (((2,), (0,)), ((), ()))).astype(x.dtype)
    # Summed as [D, V], twice as fast on CPU: XLA transposes the first operand in memory, and x is the narrower one.
    dw += dot(x, d, (((0, 1), (0, 1)), ((), ())))
    return (loss, kl, dw), dx

  zero = jnp.zeros(w.shape[::-1], jnp.float32) if gradients else None
  scalar = jnp.zeros((), jnp.float32)
  (loss, kl, dw), dx = jax.lax.scan(step, (scalar, scalar, zero),
                                    tuple(_chunked(a, chunk) for a in (x, targets, loss_mask, *(base or ())[:1])))
  if not gradients:
    return loss, kl, None, None
  dx = jnp.moveaxis(dx, 0, 1).reshape(batch, -1, x.shape[2])[:, :length]
  # With a single chunk XLA would swap the operands back, to a bfloat16 product that its CPU backend cannot run; the
  # barrier prevents that.
  return loss, kl, dx, jax.lax.optimization_barrier(dw).T.astype(head.dtype)
