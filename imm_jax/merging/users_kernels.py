"""Checks and digests the kernels of a user's own methods; those of this package are tried in its tests.

Blocks from disk are parts of tensors, and leaves in memory are stacks of tensors. A kernel that mixes what is computed
apart, such as by a mean, would be silently wrong.
"""

import ast
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from imm_jax.merging import kernels
from imm_jax.merging.registry import Plan

# Shapes of the tensors that are tried; the larger one if a kernel fails on the smaller.
_SHAPES = ((4, 8), (64, 128))
# A merge tries this many different sets of numbers: an option may be 0 in some layers, and hide there what it does.
_MAX_NUMBERS = 16
# Sizes of the changes from the first model to the others: thresholds may be above all of them, or below.
_CHANGES = (1e-3, 1.0)
_checked: set[Any] = set()


def check_kernel(plan: Plan, names: Iterable[str], count: int) -> None:
  """Tries the kernel of a user's own method on small random tensors; with the same numbers once per process.

  Args:
    plan: the merge.
    names: names of the tensors, with whose numbers it is tried; with traced ones it is not.
    count: number of models.

  Raises:
    KernelError: when a part, or one of stacked tensors, gets other values than in the whole.
  """
  if not kernels.is_users(plan.kernel):
    return
  tried = 0
  for name in names:
    numbers = plan.numbers(name)
    if any(isinstance(value, jax.core.Tracer) for value in jax.tree.leaves(dict(numbers))):
      return
    arrays = {key: np.asarray(value) for key, value in numbers.items()}
    key = (plan.kernel, tuple(plan.static.items()), plan.whole, plan.draws, count,
           *((key, value.tobytes()) for key, value in arrays.items() if key != "code"))  # each tensor has another code
    if key in _checked:
      continue
    with jax.ensure_compile_time_eval():  # the caller may be traced
      for change in _CHANGES:
        if message := _try(plan, arrays, count, change):
          raise kernels.KernelError(f"{kernels.find_file(plan.kernel)}: {plan.kernel.__name__} {message}")
    _checked.add(key)
    tried += 1
    if tried == _MAX_NUMBERS:
      return


def digest_code(kernel: Callable[..., Any]) -> str:
  """Digests the code of the file that a user's kernel is written in, without comments and a config's `get_config`.

  Returns:
    16 hexadecimal digits; nothing for a kernel of this package, or if its file cannot be read (in a notebook).
  """
  try:
    code = Path(kernels.find_file(kernel)).read_bytes() if kernels.is_users(kernel) else b""
  except OSError:
    return ""
  if not code:
    return ""
  parts = [ast.dump(node) for node in ast.parse(code).body  # which knows the bytes' encoding
           if not (isinstance(node, ast.FunctionDef) and node.name == "get_config")]
  return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _try(plan: Plan, numbers: Mapping[str, np.ndarray], count: int, change: float) -> str:
  """Returns what is wrong with a kernel; nothing if it fails on whole tensors, which the merge will report."""
  for shape in _SHAPES:
    tensors = _make_tensors(count, change, shape)
    try:
      stacked = _compute(plan, numbers, tensors)
      break
    except kernels.KernelError:  # perhaps for want of entries
      continue
  else:
    return ""
  for layer in range(2):
    if not _gives(plan, numbers, tuple(t[layer:layer + 1] for t in tensors), stacked[layer:layer + 1]):
      return ("gives stacked tensors other values than each of them. Their first axis counts tensors: sums go over all "
              "others, axis=tuple(range(1, d.ndim)); random masks need draws=True and kernels.drop_mask")
  for part, expected, first in _list_parts(plan, tuple(t[:1] for t in tensors), stacked[:1]):
    if not _gives(plan, numbers, part, expected, first):
      return ('gives a part of a tensor other values than the whole. A kernel that is not elementwise needs '
              'whole="tensor" (or "row") or prepare=; random masks need draws=True and kernels.drop_mask')
  return ""


def _gives(plan: Plan, numbers: Mapping[str, np.ndarray], tensors: tuple[np.ndarray, ...], expected: np.ndarray,
           first: tuple[int, int] = (0, 0)) -> bool:
  """Returns whether a kernel gives these values; one that fails, as for want of entries, does not."""
  try:
    return _are_close(_compute(plan, numbers, tensors, first), expected)
  except kernels.KernelError:
    return False


def _list_parts(plan: Plan, tensors: tuple[np.ndarray, ...], merged: np.ndarray,
                ) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray, tuple[int, int]]]:
  """Yields parts as they come from disk, what is expected of each, and the row and column where it begins."""
  if plan.whole == "tensor":
    return
  _, rows, columns = merged.shape
  half = rows // 2
  yield tuple(t[:, half:] for t in tensors), merged[:, half:], (half, 0)
  if plan.whole:
    return
  if plan.draws:
    half = columns // 2
    yield tuple(t[:, 1:2, half:] for t in tensors), merged[:, 1:2, half:], (1, half)
    return
  flat, size = tuple(t.reshape(1, -1) for t in tensors), rows * columns // 2
  for cut in (slice(size), slice(size, None)):
    yield tuple(t[:, cut] for t in flat), merged.reshape(1, -1)[:, cut], (0, 0)


def _compute(plan: Plan, numbers: Mapping[str, np.ndarray], tensors: tuple[np.ndarray, ...],
             first: tuple[int, int] = (0, 0)) -> np.ndarray:
  shared = {"key": np.zeros(2, np.uint32), "zero": np.uint32(0), "first": np.array(first, np.uint32)}
  stacked = {name: np.stack([value.astype(np.float32) if value.dtype == np.float64 else value] * len(tensors[0]))
             for name, value in numbers.items()}
  return np.asarray(_compile(plan.kernel, tuple(plan.static.items()))(tensors, stacked, shared))


@functools.lru_cache(maxsize=32)
def _compile(kernel: Callable[..., jax.Array], static: tuple[tuple[str, Any], ...]) -> Callable[..., jax.Array]:
  return jax.jit(lambda tensors, numbers, shared: kernels.call(kernel, tensors, numbers, shared, dict(static)))


def _make_tensors(count: int, change: float, shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
  """Makes two stacked tensors for each model, whose rows have different scales."""
  rng = np.random.default_rng(0)
  draw = lambda: rng.normal(size=(2, *shape)) * np.resize([1.0, 10.0, 0.1, 3.0], shape[0])[:, None]
  base = 0.02 * draw()
  return tuple((base + 0.02 * change * draw() * bool(i)).astype(np.float32) for i in range(count))


def _are_close(first: np.ndarray, second: np.ndarray) -> bool:
  scale = float(np.nan_to_num(np.abs(second), posinf=0.0).max())
  return first.shape == second.shape and np.allclose(first, second, rtol=1e-4, atol=1e-6 * scale, equal_nan=True)
