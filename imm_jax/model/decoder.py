"""A decoder for all model families (`families.FAMILIES`), in Flax NNX.

Axes: B batch, T query length, S key length, L layers, D model, H heads, K key/value heads, G = H / K, h head dim,
F feed-forward, V vocabulary.

Products run in the compute dtype; the residual stream, norms, rotary embedding and gates are float32, as in torch's
autocast. A bfloat16 residual stream alone would cause more than half of a gradient's error (benchmarks/README.md).

Parameters have the names and the [out, in] layout of the HF checkpoint, so loading needs no transposition. Layers are
stacked on a leading axis and run under `lax.scan` (training, scoring), or are a list (decoding, where a scanned cache
would be copied at every step); `unstack_layers` converts the first form to the second.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imm_jax.model import attention, cached, rope
from imm_jax.model.attention import Attend
from imm_jax.model.cached import LayerCache, Prefix
from imm_jax.model.config import ModelConfig
from imm_jax.model.products import dot, weights_first

Params = dict[str, Any]
# Rematerialization policies: the backward pass keeps all of a layer's activations, the results of its products with
# weights, the inputs and outputs of attention, or only its input.
REMAT: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "attention": jax.checkpoint_policies.save_only_these_names(attention.NAME),
    "full": jax.checkpoint_policies.nothing_saveable}
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu, "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True), "relu": jax.nn.relu}


class Linear(nnx.Module):
  """Computes a linear map y = x W^T + b with W [out, in]."""

  def __init__(self, in_dim: int, out_dim: int, *, bias: bool, dtype: jnp.dtype, key: jax.Array):
    self.weight = nnx.Param(0.02 * jax.random.normal(key, (out_dim, in_dim), dtype))
    if bias:
      self.bias = nnx.Param(jnp.zeros((out_dim,), dtype))

  def __call__(self, x: jax.Array) -> jax.Array:
    y = dot(x, self.weight[...])
    return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y


class RMSNorm(nnx.Module):
  """Normalizes by the root mean square in float32; the result has `dtype`, by default that of x."""

  def __init__(self, dim: int, *, eps: float, dtype: jnp.dtype):
    self.weight = nnx.Param(jnp.ones((dim,), dtype))
    self.eps = eps

  def __call__(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
    return (self.weight[...].astype(jnp.float32) * x32).astype(dtype or x.dtype)


class Embedding(nnx.Module):
  """Holds a table [V, D] of token embeddings, which is also the head if the two are tied."""

  def __init__(self, vocab: int, dim: int, *, dtype: jnp.dtype, key: jax.Array):
    self.weight = nnx.Param(0.02 * jax.random.normal(key, (vocab, dim), dtype))


class Attention(nnx.Module):
  """Computes grouped-query attention with rotary position embeddings."""

  def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, key: jax.Array):
    q, k, v, o = jax.random.split(key, 4)
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    self.q_proj = Linear(config.hidden_size, heads, bias=config.qkv_bias, dtype=dtype, key=q)
    self.k_proj = Linear(config.hidden_size, kv_heads, bias=config.qkv_bias, dtype=dtype, key=k)
    self.v_proj = Linear(config.hidden_size, kv_heads, bias=config.qkv_bias, dtype=dtype, key=v)
    self.o_proj = Linear(heads, config.hidden_size, bias=config.o_bias, dtype=dtype, key=o)
    if config.qk_norm:
      self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
      self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
    self.head_dim, self.scale = config.head_dim, config.attention_scale

  def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend,
               write_cache: Callable[..., LayerCache] | None) -> tuple[jax.Array, LayerCache]:
    """Maps x [B, T, D] to ([B, T, D], keys and values); `write_cache` writes these to a cache if there is one."""
    batch, length, _ = x.shape

    def split_heads(y: jax.Array) -> jax.Array:  # -> [B, heads, T, h]
      return y.reshape(batch, length, -1, self.head_dim).swapaxes(1, 2)

    q, k = split_heads(self.q_proj(x)), split_heads(self.k_proj(x))
    if hasattr(self, "q_norm"):
      q, k = self.q_norm(q), self.k_norm(k)
    q, k = _rotate(q, rope), _rotate(k, rope)
    v = split_heads(self.v_proj(x))
    if write_cache is not None:
      k, v = write_cache(k, v)
    out = attend(q, k, v, scale=self.scale).swapaxes(1, 2).reshape(batch, length, -1)
    return self.o_proj(out), (k, v)


class MLP(nnx.Module):
  """Computes a gated feed-forward network, such as SwiGLU with silu."""

  def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, key: jax.Array):
    gate, up, down = jax.random.split(key, 3)
    self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, dtype=dtype, key=gate)
    self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, dtype=dtype, key=up)
    self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias, dtype=dtype, key=down)
    self.activation = ACTIVATIONS[config.activation]

  def __call__(self, x: jax.Array) -> jax.Array:

    @jax.checkpoint  # otherwise both and the intermediate results would be kept in float32 for the backward pass
    def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
      return (self.activation(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(x.dtype)

    return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


class Layer(nnx.Module):
  """Computes a pre-norm transformer layer: attention, then the feed-forward network."""

  def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, key: jax.Array):
    attention, mlp = jax.random.split(key)
    self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
    self.self_attn = Attention(config, dtype=dtype, key=attention)
    self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
    self.mlp = MLP(config, dtype=dtype, key=mlp)
    self.residual_multiplier = config.residual_multiplier

  def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend,
               write_cache: Callable[..., LayerCache] | None = None) -> tuple[jax.Array, LayerCache]:
    """Maps x [B, T, D] in the compute dtype to the layer's float32 residual update, and its keys and values."""
    attended, cache = self.self_attn(self.input_layernorm(x), rope, attend, write_cache)
    update = _scale(attended.astype(jnp.float32), self.residual_multiplier)
    mlp_update = self.mlp(self.post_attention_layernorm(x.astype(jnp.float32) + update, x.dtype)).astype(jnp.float32)
    return update + _scale(mlp_update, self.residual_multiplier), cache


class Decoder(nnx.Module):
  """Computes a decoder-only language model; `bind` builds it from parameters."""

  def __init__(self, config: ModelConfig, *, key: jax.Array, dtype: jnp.dtype = jnp.float32, scan: bool = True):
    embed, layers, head = jax.random.split(key, 3)
    self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, key=embed)
    keys = jax.random.split(layers, config.num_layers)
    if scan:
      self.layers = jax.vmap(lambda k: Layer(config, dtype=dtype, key=k))(keys)
    else:
      self.layers = nnx.List([Layer(config, dtype=dtype, key=k) for k in keys])
    self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
    if not config.tie_embeddings:
      self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, key=head)
    self.config = config
    self.scan = scan

  def __call__(self, tokens: jax.Array, *, positions: jax.Array, segment_ids: jax.Array,
               compute_dtype: jnp.dtype, remat: str = "none") -> jax.Array:
    """Computes float32 logits [B, T, V] of packed rows.

    `segment_ids` is int32 [B, T], 0 for padding; tokens attend to earlier tokens of their own segment. For the other
    arguments see `hidden`.
    """
    attend = attention.packed(segment_ids, backend="xla")
    return self._logits(self.hidden(tokens, positions=positions, attend=attend, compute_dtype=compute_dtype,
                                    remat=remat))

  def hidden(self, tokens: jax.Array, *, positions: jax.Array, attend: Attend, compute_dtype: jnp.dtype,
             remat: str = "none", transform_layer: Callable[..., Layer] = lambda layer: layer,
             extra_params: Params | None = None, constrain: Callable[[jax.Array], jax.Array] = lambda x: x,
             ) -> jax.Array:
    """Computes the final hidden states of packed rows, the input of the head.

    Args:
      tokens: int32 [B, T].
      positions: int32 [B, T], counted from 0 in every segment.
      attend: attention function, such as the result of `attention.packed`.
      compute_dtype: dtype of products and their operands; everything else is float32.
      remat: one of REMAT; what is not kept is recomputed in the backward pass.
      transform_layer: applied to each layer before it runs, for example to gather its weights.
      extra_params: further parameters, stacked like the layers; each layer's are passed to `transform_layer` with it.
      constrain: applied to the residual stream, for example a sharding constraint.

    Returns:
      [B, T, D] in the compute dtype.
    """
    rope = self._rope(positions)
    run = lambda layer, x, rope: transform_layer(*layer)(x, rope, attend)[0]
    layers = (self.layers,) if extra_params is None else (self.layers, extra_params)
    # The cast to the compute dtype stands outside the checkpoint, so that the backward pass keeps the narrower array.
    step = run if remat == "none" else jax.checkpoint(run, policy=REMAT[remat])
    x, _ = jax.lax.scan(lambda x, layer: (constrain(x + step(layer, x.astype(compute_dtype), rope)), None),
                        constrain(self._embed(tokens)), layers)
    return self._final_norm(x, compute_dtype)

  @property
  def head(self) -> jax.Array:
    """Weight [V, D] of the output head."""
    return (self.embed_tokens if self.config.tie_embeddings else self.lm_head).weight[...]

  def prefill(self, tokens: jax.Array, *, positions: jax.Array, segment_ids: jax.Array, last: jax.Array,
              prefix: Prefix, compute_dtype: jnp.dtype) -> tuple[jax.Array, list[LayerCache]]:
    """Runs rows packed with prompts that continue a prefix; needs layers as a list.

    Args:
      tokens: int32 [B, T].
      positions: int32 [B, T], counted from 0 in every prompt, after the prefix.
      segment_ids: int32 [B, T], one number for each prompt of a row.
      last: int32 [I], flat indices of the prompts' last tokens among all B T.
      prefix: the prefix of every prompt.
      compute_dtype: dtype of activations and cache.

    Returns:
      float32 logits [I, V] of the token after each prompt, and the caches with S = T.
    """
    rope = self._rope(prefix.length + positions)
    x, caches = self._embed(tokens), []
    for layer, prefix_cache in zip(self.layers, prefix.caches, strict=True):
      attend = functools.partial(cached.prefill_attention, prefix=prefix_cache, length=prefix.length,
                                 segment_ids=segment_ids)
      update, cache = layer(x.astype(compute_dtype), rope, attend)
      x += update
      caches.append(cache)
    x = jnp.take(x.reshape(-1, x.shape[-1]), last, axis=0)
    return self._logits(self._final_norm(x, compute_dtype)), caches

  def decode(self, tokens: jax.Array, *, used: jax.Array, caches: list[LayerCache], prefix: Prefix,
             compute_dtype: jnp.dtype, **kernel: Any) -> tuple[jax.Array, list[LayerCache]]:
    """Extends every row of a cache by one token; needs layers as a list.

    Args:
      tokens: int32 [B].
      used: int32 [B], number of tokens in each row's cache.
      caches: keys and values [B, K, S, h] of every layer; see `cached.decode_attention`.
      prefix: the prefix of every row.
      compute_dtype: dtype of activations and cache.
      **kernel: further arguments of `cached.decode_attention`.

    Returns:
      float32 logits [B, V], and the caches.
    """
    rope = self._rope((prefix.length + used)[:, None])
    x, new_caches = self._embed(tokens[:, None]), []
    with weights_first():
      for layer, cache, prefix_cache in zip(self.layers, caches, prefix.caches, strict=True):
        attend = functools.partial(cached.decode_attention, prefix=prefix_cache, length=prefix.length, used=used,
                                   **kernel)
        write_cache = functools.partial(cached.write_cache, cache, slots=used,
                                        columns=kernel.get("kernel") == "columns")
        update, cache = layer(x.astype(compute_dtype), rope, attend, write_cache)
        x += update
        new_caches.append(cache)
      return self._logits(self._final_norm(x[:, 0], compute_dtype)), new_caches

  def _embed(self, tokens: jax.Array) -> jax.Array:
    return _scale(jnp.take(self.embed_tokens.weight[...], tokens, axis=0).astype(jnp.float32),
                  self.config.embedding_multiplier)

  def _rope(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes cos and sin of the rotation angles, each [B, 1, T, h]."""
    config = self.config
    frequencies = rope.frequencies(config.rope_theta, config.rope_scaling, config.head_dim)
    angles = positions.astype(jnp.float32)[:, None, :, None] * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    magnitude = rope.magnitude(config.rope_scaling)
    return _scale(jnp.cos(angles), magnitude), _scale(jnp.sin(angles), magnitude)

  def _final_norm(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Applies the final norm, and the divisor of the logits, so that losses need not know of it."""
    return _scale(self.norm(x, dtype), 1 / self.config.logits_divisor)

  def _logits(self, x: jax.Array) -> jax.Array:
    return dot(x, self.head, out_dtype=jnp.float32)


def bind(config: ModelConfig, params: Params, *, scan: bool = True) -> Decoder:
  """Builds a decoder over these parameters without a copy; works under jit, grad and eval_shape.

  >>> config = ModelConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_layers=2, num_heads=2,
  ...     num_kv_heads=1, head_dim=2, rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=True, qkv_bias=True)
  >>> params = init_params(config, key=jax.random.key(0))
  >>> row = jnp.arange(3)[None]
  >>> bind(config, params)(row, positions=row, segment_ids=jnp.ones_like(row), compute_dtype=jnp.float32).shape
  (1, 3, 8)
  """
  graph, _ = nnx.split(nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0), scan=scan)))
  return nnx.merge(graph, params)


def init_params(config: ModelConfig, *, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> Params:
  """Initializes parameters (normal with standard deviation 0.02), with layers stacked."""
  return nnx.to_pure_dict(nnx.state(Decoder(config, key=key, dtype=dtype)))


def abstract_params(config: ModelConfig, *, dtype: jnp.dtype = jnp.float32) -> Params:
  """Returns shapes and dtypes of the parameters without allocating them."""
  return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0), dtype=dtype))))


def count_params(config: ModelConfig) -> int:
  """Returns the number of a model's parameters; tied embeddings count once."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def unstack_layers(params: Params, num_layers: int) -> Params:
  """Converts stacked layers to the list form, for decoding."""
  layers = {i: jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(num_layers)}
  return {**params, "layers": layers}


def _scale(x: jax.Array, factor: float) -> jax.Array:
  """Multiplies x by a factor of the config; adds no operation for 1, which most families have."""
  return x if factor == 1 else x * factor


def _rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Applies the rotary embedding in the half-split form of HF checkpoints; x [B, heads, T, h], angles in float32."""
  cos, sin = rope
  # Moving entries within the 128 lanes of a TPU is slow; multiplying by a permutation matrix is almost free.
  rotated = jax.lax.platform_dependent(x, tpu=_rotate_half_by_matrix, default=_rotate_half)
  return (x.astype(jnp.float32) * cos + rotated.astype(jnp.float32) * sin).astype(x.dtype)


def _rotate_half(x: jax.Array) -> jax.Array:
  """Maps the halves (a, b) of the last axis to (-b, a)."""
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([-second, first], axis=-1)


def _rotate_half_by_matrix(x: jax.Array) -> jax.Array:
  """Computes `_rotate_half` as a matrix product; each sum has one nonzero term, so it is exact."""
  return dot(x, jnp.asarray(np.kron([[0, -1], [1, 0]], np.eye(x.shape[-1] // 2)), x.dtype))
