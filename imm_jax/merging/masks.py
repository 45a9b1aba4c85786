"""Random drop masks that depend only on the seed and on a tensor's name and row.

Row r of the tensor named n is drawn from `fold_in(fold_in(key, crc32(n)), r)` of `jax.random` (threefry), in 16-bit
draws, two to a 32-bit word, low half first. So a seed drops the same entries in memory, streamed from disk in blocks,
stacked or layer by layer, on any mesh and platform. A tensor with fewer than two axes is one row.

Threefry is implemented here so that every entry computes its own draw from its position: nothing is stored, and the
shards of a tensor draw their parts without communication.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

STEPS = 65_536
_PARITY = np.uint32(0x1BD11BDA)
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def quantize_drop_rate(drop_rate: float) -> int:
  """Rounds a drop rate to steps of 1/65536, which both the draws and the rescaling use.

  Raises:
    ValueError: unless 0 <= drop_rate < 1 after rounding.

  >>> quantize_drop_rate(0.2)
  13107
  """
  steps = round(drop_rate * STEPS) if math.isfinite(drop_rate) else -1
  if not 0 <= steps < STEPS or drop_rate < 0:
    raise ValueError(f"drop_rate={drop_rate}: expected 0 <= drop_rate < 1")
  return steps


def require_concrete(value: Any, name: str, tensor: str) -> Any:
  """Returns a setting that decides which entries of a tensor are kept; raises ValueError if jax traces it."""
  if isinstance(value, jax.core.Tracer):
    raise ValueError(f"{name} at {tensor!r} is traced by jax, but it decides which entries stay: give a number")
  return value


def drop_steps(drop_rate: Any, tensor: str) -> int:
  """Quantizes a tensor's drop rate; see `quantize_drop_rate`."""
  return quantize_drop_rate(float(require_concrete(drop_rate, "drop_rate", tensor)))


def tensor_code(name: str) -> np.uint32:
  """Hashes a tensor's name (CRC-32) for folding into a key.

  >>> int(tensor_code("model.norm.weight"))
  605179714
  """
  return np.uint32(zlib.crc32(name.encode()))


def key_words(key: jax.Array | None) -> jax.Array:
  """Returns the two words [2] of a threefry key, typed or raw.

  Raises:
    ValueError: unless `key` is one threefry key.
  """
  if not isinstance(key, jax.Array | np.ndarray):
    raise ValueError(f"key={key!r}: expected a key such as jax.random.key(0)")
  if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    if str(jax.random.key_impl(key)) != "threefry2x32":
      raise ValueError(f"key: expected a threefry key such as jax.random.key(0), got {jax.random.key_impl(key)}")
    key = jax.random.key_data(key)
  if key.shape != (2,) or key.dtype != jnp.uint32:
    raise ValueError(f"key: expected one key, got {key.dtype}{list(key.shape)}")
  return key


def seed_words(seed: int) -> np.ndarray:
  """Returns the words [2] of `jax.random.key(seed)` for a 32-bit seed, without initializing a device.

  >>> bool((seed_words(7) == jax.random.key_data(jax.random.key(7))).all())
  True
  """
  return np.array([0, seed], np.uint32)


def fold_in(words: Any, data: Any) -> tuple[Any, Any]:
  """Computes `jax.random.fold_in` on the words of keys (two arrays of jax or numpy); `data` broadcasts against them."""
  return _threefry(words[0], words[1], np.zeros((), np.uint32), data)


def draw_uint16(words: tuple[jax.Array, jax.Array], codes: jax.Array, shape: tuple[int, ...],
                first: tuple[jax.Array | int, jax.Array | int] = (0, 0), half: int | None = None) -> jax.Array:
  """Draws uniform integers in [0, 65536) for stacked tensors, or for a block of them.

  Args:
    words: the key's two words.
    codes: uint32 [L], a `tensor_code` for each tensor.
    shape: [L, rows, ...], or [L, columns] for tensors of one axis, or [L] for scalars.
    first: row and column of the tensor where the block begins.
    half: 0 or 1 if the block holds only the even or only the odd columns; it then begins at an even column.

  Returns:
    uint32 array of this shape.
  """
  rank = len(shape)
  codes = codes.reshape(-1, *(1,) * (rank - 1))
  # One key for each row, broadcast to the rank of the result.
  row = (jax.lax.broadcasted_iota(jnp.uint32, (1, shape[1], *(1,) * (rank - 2)), 1) + jnp.uint32(first[0])
         if rank > 2 else jnp.zeros((1,) * rank, jnp.uint32))
  row_key = fold_in(fold_in(words, codes), row)
  column = jnp.full((1,) * rank, jnp.uint32(first[1]) >> (half is not None), jnp.uint32)
  stride = 1
  for axis in reversed(range(2 if rank > 2 else 1, rank)):
    column = column + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    stride *= shape[axis]
  # Two columns share a word; computing it twice is faster than interleaving the halves.
  word, part = (column >> 1, column & 1) if half is None else (column, jnp.uint32(half))
  high, low = _threefry(row_key[0], row_key[1], np.zeros((), np.uint32), word)
  return jnp.broadcast_to(((high ^ low) >> (part * 16)) & 0xFFFF, shape)


def _threefry(k0: Any, k1: Any, x0: Any, x1: Any) -> tuple[Any, Any]:
  """Computes Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
  schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
  x0, x1 = x0 + k0, x1 + k1
  for i in range(5):
    for r in _ROTATIONS[i % 2]:
      x0 = x0 + x1
      x1 = ((x1 << np.uint32(r)) | (x1 >> np.uint32(32 - r))) ^ x0
    x0, x1 = x0 + schedule[(i + 1) % 3], x1 + (schedule[(i + 2) % 3] + np.uint32(i + 1))
  return x0, x1
