"""Attention over packed rows, with backends by platform: XLA, blockwise, cuDNN's flash attention, TPU splash kernel.

A token attends to itself and the earlier tokens of its own segment (`packed`) or branch (`branching`). Either mask is
given by one number for each token, the last position that attends to it. All backends compute the same function: scores
and softmax in float32, products with the weights in the compute dtype. Every token, also padding, attends to itself, so
no softmax is empty and nothing becomes NaN.

`xla` holds all scores [B, H, T, T] at once, `blockwise` those of a block of queries, the two kernels a tile of them.
`splash` skips tiles above the diagonal and takes segment ids, so it does not support branches. cuDNN's interface in JAX
does not take segment ids: `cudnn` passes a mask [B, 1, T, T], shared by all heads, and lets the kernel skip the causal
half. That path was lowered for CUDA, and its mask compared through `implementation="xla"`; it has not run on a GPU.

Axes: B batch, T length, S key length, H heads, K key/value heads, G = H / K, h head dim.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import Mesh, PartitionSpec as P

from imm_jax.errors import UserError
from imm_jax.model.blockwise import blockwise, precision, score_scale
from imm_jax.model.config import ModelConfig

# (q [B, H, T, h], k [B, K, S, h], v [B, K, S, h], scale=None for h^-0.5) -> [B, H, T, h]
Attend = Callable[..., jax.Array]
BACKENDS = ("auto", "xla", "blockwise", "cudnn", "splash")
# Name under which `jax.checkpoint` policies find the inputs and outputs of attention.
NAME = "attention"
_ROWS, _HEADS = ("data", "fsdp"), "tensor"
# Tile sizes of the splash kernel; the first that divides the length is used. Large tiles keep the matrix units busy;
# smaller ones leave more tiles above the diagonal, which are skipped.
_TILES = (512, 256, 128)


def choose_backend(backend: str, config: ModelConfig, *, dtype: jnp.dtype, length: int, rows: int,
                   mesh: Mesh | None = None) -> str:
  """Chooses the backend: the requested one, or for `auto` the fastest that can run.

  The fastest is the platform's kernel, on CPUs `blockwise`, otherwise `xla`.

  Args:
    backend: one of BACKENDS.
    config: the model's config.
    dtype: dtype of the activations.
    length: T.
    rows: B of one forward pass, over all devices.
    mesh: devices, or descriptions of those to compile for; None for the default device.

  Returns:
    `xla`, `blockwise`, `cudnn` or `splash`.

  Raises:
    UserError: if a backend is requested by name and cannot run there.

  >>> config = ModelConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_layers=2, num_heads=2,
  ...     num_kv_heads=1, head_dim=2, rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=True, qkv_bias=True)
  >>> choose_backend("xla", config, dtype=jnp.float32, length=16, rows=1)
  'xla'
  """
  if backend in ("xla", "blockwise"):
    return backend
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  if backend == "auto" and device.platform == "cpu":
    return "blockwise"
  candidates = ("splash", "cudnn") if backend == "auto" else (backend,)
  obstacles = {name: _find_obstacle(name, config, jnp.dtype(dtype), length, rows, mesh) for name in candidates}
  chosen = next((name for name, obstacle in obstacles.items() if obstacle is None), "xla")
  if backend not in ("auto", chosen):
    raise UserError(f"config.sft.attention={backend!r} {obstacles[backend]}; use auto or xla")
  return chosen


def _find_obstacle(backend: str, config: ModelConfig, dtype: jnp.dtype, length: int, rows: int, mesh: Mesh | None,
              ) -> str | None:
  """Returns the reason why a kernel cannot run, or None if it can."""
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  if backend == "splash":
    if device.platform != "tpu":
      return f"needs a TPU, and this is {device.device_kind}"
    if dtype != jnp.bfloat16:
      return f"computes in bfloat16, and compute_dtype is {dtype}"
    if length % _TILES[-1] or config.head_dim % 64:
      return (f"needs rows in multiples of {_TILES[-1]} tokens and heads in multiples of 64, and has row_length="
              f"{length}, head_dim={config.head_dim}")
  else:
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
      return f"needs an NVIDIA GPU, and this is {device.device_kind}"
    capability = float(device.compute_capability)
    largest = 256 if capability >= 9 else 128
    if capability < 8:
      return f"needs compute capability 8.0, and {device.device_kind} has {capability}"
    if dtype not in (jnp.bfloat16, jnp.float16):
      return f"computes in bfloat16, and compute_dtype is {dtype}"
    if length % 2 or config.head_dim % 8 or config.head_dim > largest:
      return (f"needs an even row_length and heads in multiples of 8 up to {largest}, and has row_length={length}, "
              f"head_dim={config.head_dim}")
  if mesh is not None and mesh.size > 1:
    row_parts = mesh.size // mesh.shape[_HEADS]
    if rows % row_parts or config.num_kv_heads % mesh.shape[_HEADS]:
      return (f"needs rows and key/value heads that the mesh divides, and has {rows} rows on {row_parts} parts, "
              f"{config.num_kv_heads} heads on {mesh.shape[_HEADS]}")
  return None


def packed(segment_ids: jax.Array, *, backend: str, mesh: Mesh | None = None, interpret: bool = False) -> Attend:
  """Returns attention within the segments of packed rows.

  Args:
    segment_ids: int32 [B, T], 0 for padding.
    backend: a result of `choose_backend`.
    mesh: devices to shard the kernels over, rows by `data` and `fsdp`, heads by `tensor`.
    interpret: runs splash in Pallas' interpreter, for tests without a TPU.

  Returns:
    A function (q [B, H, T, h], k and v [B, K, T, h], scale of the scores or None for h^-0.5) -> [B, H, T, h];
    gradients flow to q, k and v.

  >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 4, 8))
  >>> out = packed(jnp.array([[1, 1, 2, 0]]), backend="xla")(q, k, v)
  >>> bool((out[:, :, [0, 2, 3]] == v[:, :, [0, 2, 3]]).all())  # a segment's first token attends only to itself
  True
  """
  if backend == "splash":
    return _shard_over_mesh(functools.partial(_splash, interpret=interpret), segment_ids, mesh)
  return branching(_segment_ends(segment_ids), backend=backend, mesh=mesh)


def branching(until: jax.Array, *, backend: str, mesh: Mesh | None = None) -> Attend:
  """Returns attention over rows in which texts share their common prefixes.

  The tokens form a tree in depth-first order, so the descendants of a token are those up to some position, and each
  token attends to exactly the tokens that precede it in its own text.

  Args:
    until: int32 [B, T], the last descendant of each token; its own position if there is none.
    backend: `xla`, `blockwise` or `cudnn`.
    mesh: see `packed`.

  Returns:
    A function as `packed` does.

  >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 3, 8))
  >>> out = branching(jnp.array([[2, 1, 2]]), backend="xla")(q, k, v)  # the texts 0 1 and 0 2
  >>> separate = branching(jnp.array([[1, 1]]), backend="xla")(q[:, :, ::2], k[:, :, ::2], v[:, :, ::2])
  >>> bool(jnp.allclose(out[:, :, ::2], separate))
  True
  """
  if backend == "blockwise":
    return lambda *qkv, scale=None: _checkpoint(blockwise(*map(_checkpoint, qkv), until, scale))
  positions = jnp.arange(until.shape[1])
  seen = positions[:, None] <= until[:, None, :]
  if backend == "cudnn":
    return _shard_over_mesh(cudnn, seen[:, None], mesh)
  mask = seen & (positions[:, None] >= positions)
  return lambda *qkv, scale=None: _checkpoint(masked(*map(_checkpoint, qkv), mask=mask, scale=scale))


def _segment_ends(segment_ids: jax.Array) -> jax.Array:
  """Finds the last position of each token's segment: [B, T]."""
  length = segment_ids.shape[1]
  last = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (0, 1)), constant_values=True)
  return jax.lax.cummin(jnp.where(last, jnp.arange(length), length), axis=1, reverse=True)


def _shard_over_mesh(kernel: Attend, seen: jax.Array, mesh: Mesh | None) -> Attend:
  """Maps a kernel over each device's rows and heads; `seen` is its mask or segment ids."""
  if mesh is None or mesh.size == 1:
    return functools.partial(kernel, seen=seen)
  qkv_spec = P(_ROWS, _HEADS)

  def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float | None = None) -> jax.Array:
    # Kernels do not declare over which mesh axes their results vary, so that check is off.
    mapped = jax.shard_map(lambda q, k, v, seen: kernel(q, k, v, seen=seen, scale=scale), mesh=mesh,
                           in_specs=(qkv_spec, qkv_spec, qkv_spec, P(_ROWS)), out_specs=qkv_spec, check_vma=False)
    return mapped(q, k, v, seen)

  return attend


def masked(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array, scale: float | None = None) -> jax.Array:
  """Computes plain attention: q [B, H, T, h], k and v [B, K, S, h], mask [B or 1, T, S] -> [B, H, T, h]."""
  batch, heads, length, head_dim = q.shape
  grouped = q.reshape(batch, k.shape[1], -1, length, head_dim)
  einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision(q.dtype))
  scores = einsum("bkgth,bksh->bkgts", grouped, k) * score_scale(q, scale)
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
  return einsum("bkgts,bksh->bkgth", weights, v).astype(q.dtype).reshape(batch, heads, length, head_dim)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, seen: jax.Array, scale: float | None = None,
          implementation: str = "cudnn") -> jax.Array:
  """Runs cuDNN's flash attention, which takes [B, T, heads, h], with a mask [B, 1, T, T]."""
  q, k, v = (_checkpoint(x.swapaxes(1, 2)) for x in (q, k, v))
  return jax.nn.dot_product_attention(q, k, v, mask=seen, is_causal=True, scale=scale,
                                      implementation=implementation).swapaxes(1, 2)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, *, seen: jax.Array, scale: float | None = None,
            interpret: bool) -> jax.Array:
  """Runs the splash kernel on one device's rows and segment ids [B, T], without repeating key/value heads."""
  heads, length = q.shape[1:3]
  tile = splash_tile(length)
  # The fused backward kernel would compute scores once, not twice, but leaves q's gradient in one part for each key
  # tile. By the compiler's estimate, adding these up takes longer than is saved.
  sizes = splash_attention_kernel.BlockSizes(
      block_q=tile, block_kv=tile, block_kv_compute=tile, block_q_dkv=tile, block_kv_dkv=tile,
      block_kv_dkv_compute=tile, block_q_dq=tile, block_kv_dq=tile)
  mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * heads)
  kernel = splash_attention_kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1,
                                                   residual_checkpoint_name=NAME, interpret=interpret)
  run = lambda q, k, v, ids: kernel(q, k, v, segment_ids=splash_attention_kernel.SegmentIds(ids, ids))
  return jax.vmap(run)(_checkpoint(q * score_scale(q, scale)), _checkpoint(k), _checkpoint(v), seen)


def splash_tile(length: int) -> int:
  """Returns the size of the splash kernel's tiles of scores."""
  return next(tile for tile in _TILES if length % tile == 0)


def _checkpoint(x: jax.Array) -> jax.Array:
  """Names an array that the backward pass need not recompute; see `decoder.REMAT`."""
  return checkpoint_name(x, NAME)
