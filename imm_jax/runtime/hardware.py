"""Knows what the devices can do: peak FLOP/s by their kind, measured FLOP/s, and whether a CPU has bfloat16."""

import contextlib
import functools
import re
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from imm_jax.errors import ResourceError, print_once

# CPU flags for bfloat16 products in /proc/cpuinfo, on x86 and on Arm.
_BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
_CPUINFO = Path("/proc/cpuinfo")


@contextlib.contextmanager
def explain_missing_platform() -> Iterator[None]:
  """Turns jax's error in the block, if it has no platform that JAX_PLATFORMS names, into one line.

  Raises:
    ResourceError: with the platforms that were asked for, those that exist, and the settings to change.
  """
  try:
    yield
  except (AssertionError, RuntimeError) as e:
    requested = jax.config.jax_platforms
    if not requested or _has_devices():
      raise
    cause = re.sub(r"\.? \(set JAX_PLATFORMS.*", "", str(e)).partition("\n")[0]
    available = " and ".join(["cpu"] + ["cuda"] * ("cuda" not in requested and _has_devices("cuda")))
    raise ResourceError(f"JAX_PLATFORMS={requested}: not on this machine, or not in this installation of jax"
                        f"{f' ({cause})' if cause else ''}; it has {available}: unset JAX_PLATFORMS to have the best "
                        "that is there, or install what the other needs (the extras cuda13 and tpu)") from e


def _has_devices(name: str | None = None) -> bool:
  """Returns whether jax has devices of the configured platforms, or of the platform `name`."""
  if name:
    jax.config.update("jax_platforms", name)
  try:
    return bool(jax.devices())
  except (AssertionError, RuntimeError):
    return False


# Dense bfloat16 FLOP/s of one device, from the makers' data sheets. The first name that is part of the kind applies.
_PEAK_FLOPS = (
    ("TPU v6", 918e12), ("TPU v5p", 459e12), ("TPU v5 lite", 197e12), ("TPU v5e", 197e12), ("TPU v5", 459e12),
    ("TPU v4", 275e12), ("B200", 2250e12), ("H200", 989e12), ("H100", 989e12), ("A100", 312e12), ("L40S", 362e12),
    ("L4", 121e12), ("A10", 125e12))


def peak_flops(kind: str) -> float | None:
  """Returns the peak bfloat16 FLOP/s of a device by jax's name of its kind, or None if unknown.

  >>> peak_flops("NVIDIA H200") == 989e12, peak_flops("cpu")
  (True, None)
  """
  return next((flops for name, flops in _PEAK_FLOPS if name.lower() in kind.lower()), None)


# Number and width of the matrices in a measurement: together larger than a CPU's caches, as a model's weights are.
_MATRICES, _WIDTH = 24, 1024


@functools.cache
def measure_flops(rows: int, dtype: str, *, seconds: float = 0.5) -> float:
  """Measures FLOP/s of this machine's first device in products of [rows, 1024] activations with weights.

  With few rows, as in sampling, memory bandwidth is the limit; with a thousand, as in training, arithmetic is.

  Args:
    rows: rows of the activations.
    dtype: dtype of both factors.
    seconds: duration of the measurement, without compilation.

  >>> measure_flops(8, "float32", seconds=0.01) > 1e6
  True
  """
  weights = jnp.ones((_MATRICES, _WIDTH, _WIDTH), dtype)
  step = jax.jit(lambda x, weights: jax.lax.scan(lambda x, w: ((x @ w) / _WIDTH, None), x, weights)[0])
  x = jax.block_until_ready(step(jnp.ones((rows, _WIDTH), dtype), weights))
  steps, begin = 0, time.perf_counter()
  while (elapsed := time.perf_counter() - begin) < seconds or not steps:
    x, steps = jax.block_until_ready(step(x, weights)), steps + 1
  return 2.0 * rows * _WIDTH**2 * _MATRICES * steps / elapsed


def compute_dtype(name: str, *, gpu: bool = False) -> str:
  """Resolves a `compute_dtype` setting: `auto` is float32 on a CPU without bfloat16 products, else bfloat16.

  Args:
    name: `auto`, or a dtype, which is returned as it is.
    gpu: whether the computation runs in another process on a GPU, whatever devices jax has in this one.

  >>> compute_dtype("float32"), compute_dtype("auto", gpu=True)
  ('float32', 'bfloat16')
  """
  if name != "auto":
    return name
  if gpu or jax.default_backend() != "cpu" or cpu_has_bfloat16():
    return "bfloat16"
  print_once("note: compute_dtype=auto is float32 here: this CPU has no products of bfloat16")
  return "float32"


def cpu_device() -> jax.Device:
  """Returns the CPU, or the first device if the user has disabled jax's CPU backend (JAX_PLATFORMS=cuda)."""
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    return jax.local_devices()[0]


@functools.cache
def cpu_has_bfloat16() -> bool:
  """Returns whether this CPU has instructions for bfloat16 products; without them XLA converts to float32 first."""
  try:
    flags = re.findall(r"(?m)^(?:flags|Features)\s*:\s*(.*)$", _CPUINFO.read_text().partition("\n\n")[0])
  except OSError:
    return False
  return bool({*_BFLOAT16_FLAGS}.intersection(" ".join(flags).split()))
