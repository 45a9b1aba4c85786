"""Checks the arguments of the Python API, where a wrong one would give a result or an error that explains nothing."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imm_jax.runtime import hardware

_DTYPES = ("bfloat16", "float16", "float32", "float64")
_COMPUTE_DTYPES = ("auto", "bfloat16", "float16", "float32")


def check_prompts(prompts: Any) -> None:
  """Raises ValueError for a single text in place of a list, which would count as one prompt a character."""
  if isinstance(prompts, str):
    raise ValueError(f"prompts={prompts[:40]!r}: expected a list of texts, such as [prompt]")


def check_pairs(pairs: Any) -> None:
  """Raises ValueError unless every pair is two texts.

  >>> check_pairs([("3+4=", "7")])
  >>> check_pairs(["ab"])
  Traceback (most recent call last):
  ValueError: pairs[0]='ab': expected a pair of texts, (prompt, answer)
  """
  for i, pair in enumerate([pairs] if isinstance(pairs, str) else pairs):
    if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
      raise ValueError(f"pairs[{i}]={pair!r:.80}: expected a pair of texts, (prompt, answer)")


def check_ids(ids: np.ndarray, vocab_size: int, max_positions: int | None) -> None:
  """Raises ValueError for token ids that the model has no row or no position of.

  Args:
    ids: as given, [T] or [B, T].
    vocab_size: rows of the embedding.
    max_positions: the model's context; None for no limit.
  """
  if ids.ndim not in (1, 2) or not ids.size:
    raise ValueError(f"tokens: of shape {ids.shape}; expected ids [T] or [B, T], at least one")
  if not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(f"tokens: of dtype {ids.dtype}; expected whole numbers")
  if ids.min() < 0 or ids.max() >= vocab_size:
    raise ValueError(f"tokens: from {ids.min()} to {ids.max()}; expected 0 to {vocab_size - 1}")
  if max_positions and ids.shape[-1] > max_positions:
    raise ValueError(f"tokens: {ids.shape[-1]} of them, and the model's context has {max_positions}")


def check_dtype(dtype: Any) -> None:
  """Raises ValueError for a dtype that parameters cannot have; None is fine."""
  if dtype is not None and getattr(dtype, "__name__", str(dtype)) not in _DTYPES:
    raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(_DTYPES)}")


def check_choice(name: str, value: Any, allowed: Sequence[str] | Mapping[str, Any]) -> None:
  """Raises ValueError for a value that is none of those allowed.

  >>> check_choice("schedule", "cos", ("cosine", "linear"))
  Traceback (most recent call last):
  ValueError: schedule='cos': expected one of cosine, linear
  """
  if value not in allowed:
    raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")


def check_numbers(low: float, **values: float) -> None:
  """Raises ValueError for a number that is not finite, or below `low`.

  >>> check_numbers(1, epochs=3, global_batch=0)
  Traceback (most recent call last):
  ValueError: global_batch=0: expected a finite number, 1 or more
  """
  for name, value in values.items():
    if not (math.isfinite(value) and value >= low):
      raise ValueError(f"{name}={value!r}: expected a finite number, {low} or more")


def resolve_compute_dtype(name: str) -> str:
  """Resolves `compute_dtype`, for which `auto` is the one that suits the device.

  Raises:
    ValueError: for one that nothing is computed in.

  >>> resolve_compute_dtype("float32")
  'float32'
  """
  check_choice("compute_dtype", name, _COMPUTE_DTYPES)
  return hardware.compute_dtype(name)
