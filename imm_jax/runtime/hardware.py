"""What devices can do: by the name that jax gives their kind, and for CPUs by what the system says."""

import contextlib
import functools
import re
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from imm_jax.errors import ResourceError, print_once

# What /proc/cpuinfo calls products of bfloat16, on x86 and on Arm.
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
_CPU = Path("/proc/cpuinfo")


@contextlib.contextmanager
def explain_missing_platform() -> Iterator[None]:
  """Makes one line of what jax raises in the block where it has no platform that JAX_PLATFORMS asks for.

  Raises:
    ResourceError: with what was asked for, what is there, and what to set.
  """
  try:
    yield
  except (AssertionError, RuntimeError) as e:
    asked = jax.config.jax_platforms
    if not asked or _has_devices():
      raise
    cause = re.sub(r"\.? \(set JAX_PLATFORMS.*", "", str(e)).partition("\n")[0]
    there = " and ".join(["cpu", *[name for name in ("cuda",) if name not in asked and _has_devices(name)]])
    raise ResourceError(f"JAX_PLATFORMS={asked}: not on this machine, or not in this installation of jax"
                        f"{f' ({cause})' if cause else ''}; it has {there}: unset JAX_PLATFORMS to have the best that "
                        "is there, or install what the other needs (the extras cuda13 and tpu)") from e


def _has_devices(name: str | None = None) -> bool:
  """Whether jax has devices: of what it is told to use, or where that failed of this platform."""
  if name:
    jax.config.update("jax_platforms", name)
  try:
    return bool(jax.devices())
  except (AssertionError, RuntimeError):
    return False


# Dense bfloat16 FLOP/s of one device, from the makers' data sheets; the first name that occurs in the kind counts.
_PEAK_FLOPS = (
    ("TPU v6", 918e12), ("TPU v5p", 459e12), ("TPU v5 lite", 197e12), ("TPU v5e", 197e12), ("TPU v5", 459e12),
    ("TPU v4", 275e12), ("B200", 2250e12), ("H200", 989e12), ("H100", 989e12), ("A100", 312e12), ("L40S", 362e12),
    ("L4", 121e12), ("A10", 125e12))


def peak_flops(kind: str) -> float | None:
  """bfloat16 FLOP/s of a device of this kind, or None where that is not known.

  >>> peak_flops("NVIDIA H200") == 989e12, peak_flops("cpu")
  (True, None)
  """
  return next((flops for name, flops in _PEAK_FLOPS if name.lower() in kind.lower()), None)


# Matrices of a measured product: together larger than a CPU's caches, as a model's weights are.
_MATRICES, _WIDTH = 24, 1024


@functools.cache
def measure_flops(rows: int, dtype: str, *, seconds: float = 0.5) -> float:
  """FLOP/s of this machine's first device in products of `rows` rows with weights, from so many seconds of them.

  With few rows, as when answers are sampled, it is memory that decides; with a thousand, as in training, arithmetic.

  Args:
    rows: of what is multiplied.
    dtype: of both factors.
    seconds: that it takes, besides compiling.

  >>> measure_flops(8, "float32", seconds=0.01) > 1e6
  True
  """
  weights = jnp.ones((_MATRICES, _WIDTH, _WIDTH), dtype)
  step = jax.jit(lambda x, weights: jax.lax.scan(lambda x, w: ((x @ w) / _WIDTH, None), x, weights)[0])
  x = jax.block_until_ready(step(jnp.ones((rows, _WIDTH), dtype), weights))
  steps, begin = 0, time.perf_counter()
  while (taken := time.perf_counter() - begin) < seconds or not steps:
    x, steps = jax.block_until_ready(step(x, weights)), steps + 1
  return 2.0 * rows * _WIDTH**2 * _MATRICES * steps / taken


def compute_dtype(name: str, *, gpu: bool = False) -> str:
  """The dtype that a setting means: for `auto` float32 on a CPU without products of bfloat16, else bfloat16.

  Args:
    name: `auto`, or a dtype.
    gpu: whether another process computes, on a GPU, whatever jax finds here.

  >>> compute_dtype("float32"), compute_dtype("auto", gpu=True)
  ('float32', 'bfloat16')
  """
  if name != "auto":
    return name
  if gpu or jax.default_backend() != "cpu" or cpu_has_bfloat16():
    return "bfloat16"
  print_once("note: compute_dtype=auto is float32 here: this CPU has no products of bfloat16")
  return "float32"


@functools.cache
def cpu_has_bfloat16() -> bool:
  """Whether this CPU multiplies bfloat16 itself; without that XLA widens every number first."""
  try:
    found = re.findall(r"(?m)^(?:flags|Features)\s*:\s*(.*)$", _CPU.read_text().partition("\n\n")[0])
  except OSError:
    return False
  return bool({*_BFLOAT16}.intersection(" ".join(found).split()))
