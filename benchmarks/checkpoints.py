"""Loading and exporting checkpoints, compared with safetensors and transformers in one interleaved run. Linux only.

    python benchmarks/checkpoints.py --workdir=/tmp/checkpoint-benchmark --shape=0.5b --repeats=3

Makes a random bfloat16 checkpoint of Qwen2.5's shape and runs, each in its own process with the file in the page cache:
an in-memory copy of the same bytes; our load, as stored, to float32, and sharded over 8 simulated devices;
`safetensors` with tensors stacked by layer; transformers' `from_pretrained` in float32; our export and
`save_pretrained`. Each process reports the fastest of five repetitions, and the first, which on virtual machines pays
for the first touch of memory. Prints a Markdown table of medians over processes: seconds, and the rise of anonymous
memory, in GiB and relative to the size of the parameters.
"""

import json
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import random_checkpoints
from absl import app, flags

_WORKDIR = flags.DEFINE_string("workdir", "/tmp/checkpoint-benchmark", "Folder for checkpoints and outputs.")
_SHAPE = flags.DEFINE_enum("shape", "0.5b", sorted(random_checkpoints.SHAPES), "Shape of the checkpoint.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Number of runs, interleaved.", lower_bound=1)
_CHILD = flags.DEFINE_string("child", None, "Internal: the program to run.")
_DEVICES, _TIMES = 8, 5


def anonymous() -> int:
  """Returns the anonymous memory of this process in bytes."""
  lines = Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def measure(function: Callable[[], Any], clear: Callable[[], Any] = lambda: None) -> dict[str, float]:
  """Measures the seconds of the fastest and of the first repetition, and the largest rise of anonymous memory."""
  seconds, rise = [], 0
  for _ in range(_TIMES):
    clear()
    before, peak, done = anonymous(), 0, threading.Event()

    def watch(done: threading.Event = done) -> None:
      nonlocal peak
      while not done.wait(0.002):
        peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    result = function()
    seconds.append(time.perf_counter() - started)
    rise = max(rise, peak - before, anonymous() - before)
    done.set()
    watcher.join()
    del result
  return {"seconds": min(seconds), "first": seconds[0], "rise": rise}


def copy(folder: Path, _: Path) -> dict[str, float]:
  """Copies the file's bytes in memory."""
  source = np.fromfile(folder / "model.safetensors", np.uint8)
  return measure(source.copy)


def load(folder: Path, _: Path, *, dtype: str | None = None, devices: int = 1) -> dict[str, float]:
  """Loads the checkpoint with imm_jax."""
  import functools

  import jax

  from imm_jax.model import hf, sharding

  mesh = sharding.make_mesh(data=1, fsdp=devices)  # also initializes the devices
  place = functools.partial(sharding.param_sharding, mesh) if devices > 1 else None
  return measure(lambda: jax.block_until_ready(hf.load(folder, dtype=dtype, place=place)))


def stack(folder: Path, _: Path) -> dict[str, float]:
  """Loads the tensors with `safetensors` and stacks them by layer, as JAX arrays."""
  import re

  import jax
  import safetensors.numpy

  jax.devices()

  def load_and_stack() -> dict[str, jax.Array]:
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    groups: dict[str, dict[int, np.ndarray]] = {}
    for name in list(tensors):
      if match := re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name):
        groups.setdefault(match[2], {})[int(match[1])] = tensors.pop(name)
    result = {name: jax.device_put(tensor) for name, tensor in tensors.items()}
    for name in list(groups):
      layers = groups.pop(name)
      result[name] = jax.device_put(np.stack([layers[i] for i in range(len(layers))]))
    return jax.block_until_ready(result)

  return measure(load_and_stack)


def load_pretrained(folder: Path, _: Path) -> dict[str, float]:
  """Loads the checkpoint in float32 with transformers."""
  import torch
  import transformers

  transformers.utils.logging.disable_progress_bar()
  from transformers import Qwen2ForCausalLM

  return measure(lambda: Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32))


def export(folder: Path, out: Path, *, devices: int = 1) -> dict[str, float]:
  """Exports the checkpoint with imm_jax."""
  import functools

  from imm_jax.model import hf, sharding

  mesh = sharding.make_mesh(data=1, fsdp=devices)
  _, params = hf.load(folder, place=functools.partial(sharding.param_sharding, mesh) if devices > 1 else None)
  return measure(lambda: hf.save(params, out, like=folder), lambda: shutil.rmtree(out, ignore_errors=True))


def save_pretrained(folder: Path, out: Path) -> dict[str, float]:
  """Exports the checkpoint with transformers."""
  import torch
  from transformers import Qwen2ForCausalLM

  model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
  return measure(lambda: model.save_pretrained(out), lambda: shutil.rmtree(out, ignore_errors=True))


# Name -> (function, its options, name of the program it is compared with, bytes per parameter).
PROGRAMS: dict[str, tuple[Callable[..., dict[str, float]], dict[str, Any], str | None, int]] = {
    "copy in memory": (copy, {}, None, 2),
    "imm_jax load": (load, {}, "copy in memory", 2),
    "imm_jax load, 8 devices": (load, {"devices": _DEVICES}, "copy in memory", 2),
    "safetensors and stack": (stack, {}, "imm_jax load", 2),
    "imm_jax load float32": (load, {"dtype": "float32"}, None, 4),
    "transformers float32": (load_pretrained, {}, "imm_jax load float32", 4),
    "imm_jax export": (export, {}, None, 2),
    "imm_jax export, 8 devices": (export, {"devices": _DEVICES}, None, 2),
    "transformers export": (save_pretrained, {}, "imm_jax export", 2)}


def main(_: list[str]) -> None:
  root = Path(_WORKDIR.value).resolve()
  folder = random_checkpoints.make(root / _SHAPE.value, _SHAPE.value, 0)
  out = root / "out"
  shutil.rmtree(out, ignore_errors=True)
  if _CHILD.value:
    run, options, _, _ = PROGRAMS[_CHILD.value]
    print(json.dumps(run(folder, out, **options)))
    return
  results: dict[str, list[dict[str, float]]] = {name: [] for name in PROGRAMS}
  for repeat in range(-1, _REPEATS.value):  # the first round warms the page cache and does not count
    for name, (_, options, _, _) in PROGRAMS.items():
      env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={options.get('devices', 1)}"}
      measured = json.loads(random_checkpoints.run_child(__file__, name, env).splitlines()[-1])
      print(f"{name}: {measured}", file=sys.stderr, flush=True)
      if repeat >= 0:
        results[name].append(measured)
  table = {name: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for name, runs in results.items()}
  size = (folder / "model.safetensors").stat().st_size
  print(f"{_SHAPE.value}: a file of {size / 1e9:.2f} GB, median of {_REPEATS.value} runs, "
        f"{len(os.sched_getaffinity(0))} cores\n")
  print("| program | s | first s | GB/s | seconds beside | rise of anonymous memory GiB | beside the parameters |\n"
        "|---|---|---|---|---|---|---|")
  for name, (_, _, peer, width) in PROGRAMS.items():
    row = table[name]
    beside = f"{row['seconds'] / table[peer]['seconds']:.2f} x {peer}" if peer else ""
    print(f"| {name} | {row['seconds']:.2f} | {row['first']:.2f} | {size / 1e9 / row['seconds']:.2f} | {beside} | "
          f"{row['rise'] / 2**30:.2f} | {row['rise'] / (size * width / 2):.2f} |")


if __name__ == "__main__":
  app.run(main)
