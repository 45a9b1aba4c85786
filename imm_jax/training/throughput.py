"""How fast training goes, and how near that is to what the devices can do."""

import contextlib
import math
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from imm_jax.hardware import peak_flops
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import abstract_params
from imm_jax.training.packing import PackedBatches


def matmul_params(config: ModelConfig) -> int:
  """Weights that every token is multiplied with: projections and head, not the embedding table's lookup.

  >>> matmul_params(ModelConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_layers=2, num_heads=2,
  ...     num_kv_heads=1, head_dim=2, rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=True, qkv_bias=True))
  320
  """
  # Stacked matrices have three axes, biases and norms two.
  layers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)["layers"]) if leaf.ndim == 3)
  return layers + config.hidden_size * config.vocab_size


def train_flops(config: ModelConfig, *, tokens: float, squares: float) -> float:
  """Floating-point operations of a step, however it is computed: 6 for each weight and token, and attention's products.

  A segment of n tokens takes 6 n^2 h H in a layer, forward and backward, for scores and for values under a causal mask
  (PaLM, appendix B, with half of the square). What is computed again counts as nothing.

  Args:
    config: of the model.
    tokens: of the step, padding not counted.
    squares: sum over the segments of the squares of their lengths.
  """
  attention = 6 * config.num_layers * config.num_heads * config.head_dim
  return 6 * matmul_params(config) * tokens + attention * squares


def window(steps: str) -> tuple[int, int] | None:
  """The first step and the one after the last of a profile, from `first:end`; None for an empty string.

  >>> window("10:13"), window("")
  ((10, 13), None)

  Raises:
    ValueError: when it is neither.
  """
  if not steps:
    return None
  found = re.fullmatch(r"(\d+):(\d+)", steps)
  if not found or int(found[1]) >= int(found[2]):
    raise ValueError(f"{steps!r}: expected first:end, such as 10:13 for steps 10, 11 and 12")
  return int(found[1]), int(found[2])


class Profile:
  """Records some steps with jax's profiler, for TensorBoard and Perfetto."""

  def __init__(self, steps: str, folder: Path):
    self._window, self._folder, self._running = window(steps), folder, False

  def before(self, step: int) -> None:
    """To be called before each step."""
    if self._window and step == self._window[0]:
      jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
      self._running = True

  def after(self, step: int, result: Any, *, last: bool) -> None:
    """To be called after each step with what it gave, which is waited for where the recording ends."""
    if self._running and (last or step + 1 == self._window[1]):
      jax.block_until_ready(result)
      jax.profiler.stop_trace()
      self._running, self._window = False, None
    elif last and self._window and jax.process_index() == 0:
      print(f"note: config.profile={self._window[0]}:{self._window[1]}: nothing was recorded, for none of these steps "
            f"was run now (the last was {step})", file=sys.stderr)


class Meter:
  """Speed between two readings."""

  def __init__(self, config: ModelConfig, batches: PackedBatches, devices: int):
    self._flops = train_flops(config, tokens=batches.tokens_per_step, squares=batches.squares_per_step)
    self._tokens = batches.tokens_per_step
    peak = peak_flops(jax.devices()[0].device_kind)
    self._peak = peak and peak * devices
    self.start()

  def start(self) -> None:
    """What was before this counts as nothing."""
    self._waited, self._began = 0.0, time.monotonic()

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Around what waits for input."""
    began = time.monotonic()
    yield
    self._waited += time.monotonic() - began

  def read(self, steps: int) -> dict[str, float]:
    """What `steps` steps since the last reading took.

    Returns:
      `tokens_per_s` (all tokens but padding, prompts too), `step_s` and `input_wait_s` of a step; `mfu`, the share of
      the devices' bfloat16 peak, where that is known; `memory_gib`, the most a device held, where it says.
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
