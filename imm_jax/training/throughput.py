"""Training speed, model FLOPs utilization, and profiles."""

import contextlib
import math
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import abstract_params
from imm_jax.runtime.hardware import peak_flops
from imm_jax.training.packing import PackedBatches


def matmul_params(config: ModelConfig) -> int:
  """Counts the weights that every token is multiplied with: projections and head, but not the embedding lookup.

  >>> matmul_params(ModelConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_layers=2, num_heads=2,
  ...     num_kv_heads=1, head_dim=2, rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=True, qkv_bias=True))
  320
  """
  # Stacked matrices have three axes, biases and norms two.
  layers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)["layers"]) if leaf.ndim == 3)
  return layers + config.hidden_size * config.vocab_size


def train_flops(config: ModelConfig, *, tokens: float, squares: float) -> float:
  """Returns the model FLOPs of a step: 6 per weight and token, plus those of attention.

  In each layer a segment of n tokens takes 6 n^2 h H forward and backward, for scores and values under a causal mask
  (PaLM, appendix B, halved for causality). Recomputation is not counted.

  Args:
    config: model config.
    tokens: tokens of the step, without padding.
    squares: sum of the squared lengths of the segments.
  """
  attention = 6 * config.num_layers * config.num_heads * config.head_dim
  return 6 * matmul_params(config) * tokens + attention * squares


def parse_window(steps: str) -> tuple[int, int] | None:
  """Parses `first:end`, the steps to profile, into a half-open range; an empty string gives None.

  >>> parse_window("10:13"), parse_window("")
  ((10, 13), None)

  Raises:
    ValueError: for any other string.
  """
  if not steps:
    return None
  match = re.fullmatch(r"(\d+):(\d+)", steps)
  if not match or int(match[1]) >= int(match[2]):
    raise ValueError(f"{steps!r}: expected first:end, such as 10:13 for steps 10, 11 and 12")
  return int(match[1]), int(match[2])


class Profile:
  """Profiles a range of steps with jax's profiler, for TensorBoard and Perfetto."""

  def __init__(self, steps: str, folder: Path):
    self._window, self._folder, self._running = parse_window(steps), folder, False

  def maybe_start(self, step: int) -> None:
    """Starts the recording if it begins with this step; to be called before each step."""
    if self._window and step == self._window[0]:
      jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
      self._running = True

  def maybe_stop(self, step: int, result: Any, *, last: bool) -> None:
    """Ends the recording if it ends with this step, once `result` is ready; to be called after each step."""
    if self._running and (last or step + 1 == self._window[1]):
      jax.block_until_ready(result)
      jax.profiler.stop_trace()
      self._running, self._window = False, None
    elif last and self._window and jax.process_index() == 0:
      print(f"note: config.profile={self._window[0]}:{self._window[1]}: nothing was recorded, for none of these steps "
            f"was run now (the last was {step})", file=sys.stderr)


class Meter:
  """Measures the training speed between readings."""

  def __init__(self, config: ModelConfig, batches: PackedBatches, devices: int):
    self._flops = train_flops(config, tokens=batches.tokens_per_step, squares=batches.squares_per_step)
    self._tokens = batches.tokens_per_step
    peak = peak_flops(jax.devices()[0].device_kind)
    self._peak = peak and peak * devices
    self.start()

  def start(self) -> None:
    """Restarts the measurement."""
    self._waited, self._began = 0.0, time.monotonic()

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts the time within this block as waiting for input."""
    began = time.monotonic()
    yield
    self._waited += time.monotonic() - began

  def read(self, steps: int) -> dict[str, float]:
    """Returns the mean speed of the `steps` steps since the last reading, and restarts the measurement.

    Returns:
      `tokens_per_s` (including prompts, without padding), `step_s` and `input_wait_s` per step; `mfu`, the share of the
      devices' peak bfloat16 FLOP/s, if that is known; `memory_gib`, the device's peak memory, if it reports that.
    """
    seconds, waited = (time.monotonic() - self._began) / steps, self._waited / steps
    self.start()
    values = {"tokens_per_s": self._tokens / seconds, "step_s": seconds, "input_wait_s": waited}
    if self._peak:
      values["mfu"] = self._flops / seconds / self._peak
    memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if memory:
      values["memory_gib"] = memory / 2**30
    return values
