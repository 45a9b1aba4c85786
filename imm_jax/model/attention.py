"""Attention over packed rows, by platform: XLA, whole or by blocks, cuDNN's flash attention, or TPUs' splash kernel.

A token sees itself and the earlier tokens of its own segment (`packed`), or of its own branch (`branching`). Both come
to one number a token, the last position that sees it. All backends compute the same thing: scores and softmax in
float32, products of the weights in the compute dtype. Every token sees itself, padding too, so no row of scores is ever
empty and nothing becomes NaN.

`xla` holds all scores [B, H, T, T] at once, `blockwise` those of some queries, the two kernels a tile of them.
`splash` skips tiles above the diagonal and reads segment ids, so it knows no branches. cuDNN's interface in JAX has
none: `cudnn` gives it a mask [B, 1, T, T], one for all heads, and leaves the causal half to the kernel, which skips it.
That path was lowered for CUDA, and its mask compared through `implementation="xla"`; on a GPU it has not run.

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
from imm_jax.model.blockwise import blockwise, precision, scale_of
from imm_jax.model.config import ModelConfig

# (q [B, H, T, h], k [B, K, S, h], v [B, K, S, h], scale of the scores: None for h^-0.5) -> [B, H, T, h]
Attend = Callable[..., jax.Array]
BACKENDS = ("auto", "xla", "blockwise", "cudnn", "splash")
# Under this name `jax.checkpoint` keeps what attention reads and gives.
NAME = "attention"
_ROWS, _HEADS = ("data", "fsdp"), "tensor"
# Tiles of the splash kernel, the first that divides the length: large ones keep the matrix units busy, and several to a
# row leave more of them above the diagonal, where they are skipped.
_TILES = (512, 256, 128)


def choose(backend: str, config: ModelConfig, *, dtype: jnp.dtype, length: int, rows: int, mesh: Mesh | None = None,
           ) -> str:
  """The backend that will run: the one asked for, or for `auto` what is fastest of those that can run.

  That is the platform's kernel, on CPUs `blockwise`, else `xla`.

  Args:
    backend: one of BACKENDS.
    config: of the model.
    dtype: of the activations.
    length: T.
    rows: B of one forward pass, over all devices.
    mesh: devices, or the description of those that are compiled for; None means the default device.

  Returns:
    `xla`, `blockwise`, `cudnn` or `splash`.

  Raises:
    UserError: when a backend is asked for by name and cannot run there.

  >>> config = ModelConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_layers=2, num_heads=2,
  ...     num_kv_heads=1, head_dim=2, rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=True, qkv_bias=True)
  >>> choose("xla", config, dtype=jnp.float32, length=16, rows=1)
  'xla'
  """
  if backend in ("xla", "blockwise"):
    return backend
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  if backend == "auto" and device.platform == "cpu":
    return "blockwise"
  wanted = ("splash", "cudnn") if backend == "auto" else (backend,)
  obstacles = {name: _obstacle(name, config, jnp.dtype(dtype), length, rows, mesh) for name in wanted}
  chosen = next((name for name, obstacle in obstacles.items() if obstacle is None), "xla")
  if backend not in ("auto", chosen):
    raise UserError(f"config.sft.attention={backend!r} {obstacles[backend]}; use auto or xla")
  return chosen


def _obstacle(backend: str, config: ModelConfig, dtype: jnp.dtype, length: int, rows: int, mesh: Mesh | None,
              ) -> str | None:
  """Why a kernel cannot run, None when it can."""
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
    parts = mesh.size // mesh.shape[_HEADS]
    if rows % parts or config.num_kv_heads % mesh.shape[_HEADS]:
      return (f"needs rows and key/value heads that the mesh divides, and has {rows} rows on {parts} parts, "
              f"{config.num_kv_heads} heads on {mesh.shape[_HEADS]}")
  return None


def packed(segment_ids: jax.Array, *, backend: str, mesh: Mesh | None = None, interpret: bool = False) -> Attend:
  """Attention within the segments of packed rows.

  Args:
    segment_ids: int32 [B, T], 0 where there is padding.
    backend: what `choose` gave.
    mesh: devices that the kernels are mapped over, rows by `data` and `fsdp`, heads by `tensor`.
    interpret: runs splash in Pallas' interpreter, for tests on machines without a TPU.

  Returns:
    A function of q [B, H, T, h], k and v [B, K, T, h], and the scale of the scores (None for h^-0.5), that gives
    [B, H, T, h]; gradients flow to q, k and v.

  >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 4, 8))
  >>> out = packed(jnp.array([[1, 1, 2, 0]]), backend="xla")(q, k, v)
  >>> bool((out[:, :, [0, 2, 3]] == v[:, :, [0, 2, 3]]).all())  # the first of a segment sees itself alone
  True
  """
  if backend == "splash":
    return _mapped(functools.partial(_splash, interpret=interpret), segment_ids, mesh)
  return branching(_ends(segment_ids), backend=backend, mesh=mesh)


def branching(until: jax.Array, *, backend: str, mesh: Mesh | None = None) -> Attend:
  """Attention where texts that begin alike share what they begin with.

  A tree of tokens lies in the order in which its branches are walked, each to its end before the next. So the tokens
  that follow one are those up to some position, and each sees exactly what precedes it in its own text.

  Args:
    until: int32 [B, T], that position for each token; its own where nothing follows it.
    backend: `xla`, `blockwise` or `cudnn`.
    mesh: as in `packed`.

  Returns:
    As `packed` does.

  >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 3, 8))
  >>> out = branching(jnp.array([[2, 1, 2]]), backend="xla")(q, k, v)  # the texts 0 1 and 0 2
  >>> alone = branching(jnp.array([[1, 1]]), backend="xla")(q[:, :, ::2], k[:, :, ::2], v[:, :, ::2])
  >>> bool(jnp.allclose(out[:, :, ::2], alone))
  True
  """
  if backend == "blockwise":
    return lambda *qkv, scale=None: _keep(blockwise(*map(_keep, qkv), until, scale))
  positions = jnp.arange(until.shape[1])
  seen = positions[:, None] <= until[:, None, :]
  if backend == "cudnn":
    return _mapped(cudnn, seen[:, None], mesh)
  mask = seen & (positions[:, None] >= positions)
  return lambda *qkv, scale=None: _keep(masked(*map(_keep, qkv), mask=mask, scale=scale))


def _ends(segment_ids: jax.Array) -> jax.Array:
  """The last position of each token's segment: [B, T]."""
  length = segment_ids.shape[1]
  last = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (0, 1)), constant_values=True)
  return jax.lax.cummin(jnp.where(last, jnp.arange(length), length), axis=1, reverse=True)


def _mapped(kernel: Attend, seen: jax.Array, mesh: Mesh | None) -> Attend:
  """A kernel that reads of `seen` who sees whom, on each device's rows and heads."""
  if mesh is None or mesh.size == 1:
    return functools.partial(kernel, seen=seen)
  where = P(_ROWS, _HEADS)

  def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float | None = None) -> jax.Array:
    # What a kernel is made of says nothing about the mesh axes that its results vary over.
    mapped = jax.shard_map(lambda q, k, v, seen: kernel(q, k, v, seen=seen, scale=scale), mesh=mesh,
                           in_specs=(where, where, where, P(_ROWS)), out_specs=where, check_vma=False)
    return mapped(q, k, v, seen)

  return attend


def masked(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array, scale: float | None = None) -> jax.Array:
  """Plain attention: q [B, H, T, h], k and v [B, K, S, h], mask [B or 1, T, S] -> [B, H, T, h]."""
  batch, heads, length, head_dim = q.shape
  grouped = q.reshape(batch, k.shape[1], -1, length, head_dim)
  einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision(q.dtype))
  scores = einsum("bkgth,bksh->bkgts", grouped, k) * scale_of(q, scale)
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
  return einsum("bkgts,bksh->bkgth", weights, v).astype(q.dtype).reshape(batch, heads, length, head_dim)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, seen: jax.Array, scale: float | None = None,
          implementation: str = "cudnn") -> jax.Array:
  """cuDNN's flash attention with a mask [B, 1, T, T]; it takes [B, T, heads, h]."""
  q, k, v = (_keep(x.swapaxes(1, 2)) for x in (q, k, v))
  return jax.nn.dot_product_attention(q, k, v, mask=seen, is_causal=True, scale=scale,
                                      implementation=implementation).swapaxes(1, 2)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, *, seen: jax.Array, scale: float | None = None,
            interpret: bool) -> jax.Array:
  """The splash kernel on one device's rows and their segment ids [B, T]; no key/value head is repeated for a group."""
  heads, length = q.shape[1:3]
  tile = splash_tile(length)
  # The fused backward kernel would compute scores once, not twice, but leaves q's gradient in parts, one of each key
  # tile: by the compiler's estimate it takes longer to add them up than was saved.
  sizes = splash_attention_kernel.BlockSizes(
      block_q=tile, block_kv=tile, block_kv_compute=tile, block_q_dkv=tile, block_kv_dkv=tile,
      block_kv_dkv_compute=tile, block_q_dq=tile, block_kv_dq=tile)
  mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * heads)
  kernel = splash_attention_kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1,
                                                   residual_checkpoint_name=NAME, interpret=interpret)
  run = lambda q, k, v, ids: kernel(q, k, v, segment_ids=splash_attention_kernel.SegmentIds(ids, ids))
  return jax.vmap(run)(_keep(q * scale_of(q, scale)), _keep(k), _keep(v), seen)


def splash_tile(length: int) -> int:
  """The edge of the tiles that the splash kernel cuts scores into."""
  return next(tile for tile in _TILES if length % tile == 0)


def _keep(x: jax.Array) -> jax.Array:
  """Marks what the backward pass need not compute again, see `decoder.REMAT`."""
  return checkpoint_name(x, NAME)
