"""Cost of the analyses relative to comparable work, in one interleaved run on the same cores. Linux only.

    python benchmarks/analysis.py --workdir=/tmp/analysis-benchmark --cores=2

Importance: `gradients.gradient` over packed batches, compared with forward and backward passes of SFT over the same
batches (`gradient_function`, jitted; no optimizer) and with whole SFT steps. They alternate pass by pass in one
process; reported is the fastest pass of each over all batches, including input.

Weight change: `python -m imm_jax.analyze --tuned`, compared with `python -m imm_jax.merge --method=linear` of the same
two checkpoints (which also reads the embeddings, and writes a third checkpoint), as alternating processes, and as
functions in one process. GB/s counts the bytes that each must read. Prints two Markdown tables.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import random_checkpoints
from absl import app, flags

_WORKDIR = flags.DEFINE_string("workdir", "/tmp/analysis-benchmark", "Folder for checkpoints and outputs.")
_SHAPE = flags.DEFINE_enum("shape", "sft", sorted(random_checkpoints.SHAPES), "Shape of the model for importance.")
_STREAMED = flags.DEFINE_enum("streamed", "0.5b", sorted(random_checkpoints.SHAPES), "Shape for weight change.")
_ROWS = flags.DEFINE_integer("rows", 8, "Rows per batch.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("row_length", 512, "Tokens per row.", lower_bound=2)
_BATCHES = flags.DEFINE_integer("batches", 6, "Batches per pass.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Passes and processes of each kind, interleaved.", lower_bound=1)
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Compute dtypes.")
_REMAT = flags.DEFINE_enum("remat", "full", ["none", "dots", "attention", "full"], "Rematerialization.")
_CORES = flags.DEFINE_integer("cores", 2, "Number of cores that processes are pinned to.", lower_bound=1)
REPO = Path(__file__).parent.parent


def make_passes(dtype: str, folder: Path) -> dict[str, Callable[[], None]]:
  """Returns functions by name, each of which runs a pass over all batches."""
  import jax
  import jax.numpy as jnp

  from imm_jax.model import attention, hf, sharding
  from imm_jax.training import gradients, optimization, step
  from imm_jax.training.computation import Computation
  from imm_jax.training.input import Input
  from imm_jax.training.packing import PackedBatches, TokenizedExample

  mesh = sharding.make_mesh(data=1, fsdp=1)
  place = lambda *_: jax.NamedSharding(mesh, sharding.P())
  config, params = hf.load(folder, dtype=jnp.float32, place=place)
  vocab = random_checkpoints.SHAPES[_SHAPE.value][-1]
  rows = np.random.default_rng(0).integers(0, vocab, (_BATCHES.value * _ROWS.value, _LENGTH.value)).tolist()
  batches = PackedBatches([TokenizedExample(row[:1], row[1:]) for row in rows], epochs=1, global_batch=_ROWS.value,
                          row_length=_LENGTH.value, seed=0)
  backend = attention.choose_backend("auto", config, dtype=dtype, length=_LENGTH.value, rows=_ROWS.value, mesh=mesh)
  computation = Computation(mesh, jnp.dtype(dtype), remat=_REMAT.value, attention=backend)
  gradient = jax.jit(step.gradient_function(config, computation))
  optimizer = optimization.make_optimizer(weight_decay=0.0, grad_clip=1.0)
  train_step = step.make_train_step(config, optimizer, computation)
  state = step.init_state(hf.load(folder, dtype=jnp.float32, place=place)[1], optimizer, mesh)

  def forward_and_backward() -> None:
    for batch in Input(batches, mesh):
      jax.block_until_ready(gradient(params, batch))

  def whole_steps() -> None:
    nonlocal state
    for batch in Input(batches, mesh):
      state, metrics = train_step(state, batch, 1e-5)
      jax.block_until_ready(metrics)

  return {"forward and backward": forward_and_backward,
          "importance": lambda: jax.block_until_ready(gradients.gradient(config, params, batches, computation)),
          "SFT steps": whole_steps}


def time_interleaved(functions: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
  """Measures the seconds of interleaved functions; a first round is warm-up."""
  seconds: dict[str, list[float]] = {name: [] for name in functions}
  for repeat in range(-1, repeats):
    for name, function in functions.items():
      started = time.perf_counter()
      function()
      if repeat >= 0:
        seconds[name].append(time.perf_counter() - started)
  return seconds


def make_streamed(root: Path) -> tuple[dict[str, Callable[[], None]], float, float]:
  """Returns functions by name that stream two checkpoints, and the bytes of all tensors and of the layers' matrices."""
  import jax

  from imm_jax.analysis.weight_change import weight_change
  from imm_jax.merging import masks, on_disk, registry
  from imm_jax.model import checkpoint_folder

  a, b = (random_checkpoints.make(root / f"{_STREAMED.value}-{i}", _STREAMED.value, i) for i in (0, 1))
  out = root / "out"

  def merge() -> None:
    shutil.rmtree(out, ignore_errors=True)
    with on_disk.CheckpointSource({"a": a, "b": b}) as source:
      plan = registry.METHODS["linear"](source, weights=[0.3, 0.7])
      on_disk.merge(source, [on_disk.Output(out, plan)], key=np.asarray(masks.key_words(jax.random.key(0))))

  def process(*command: str) -> None:
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run([sys.executable, "-m", *command, f"--out={out}"], cwd=REPO, check=True, capture_output=True)

  size = lambda only: 2 * sum(e.size * e.dtype.itemsize for name, e in checkpoint_folder.read_entries(a).items()
                              if only(name))
  return ({"linear": merge, "weight change": lambda: weight_change(a, b),
           "linear, process": lambda: process("imm_jax.merge", "--method=linear", f"--models={a},{b}",
                                              "--weights=[0.3, 0.7]"),
           "weight change, process": lambda: process("imm_jax.analyze", f"--model={a}", f"--tuned={b}")},
          size(lambda _: True), size(lambda name: name.endswith("_proj.weight")))


def main(_: list[str]) -> None:
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CORES.value])
  root = Path(_WORKDIR.value).resolve()
  folder = random_checkpoints.make(root / _SHAPE.value, _SHAPE.value, 0)
  tokens = _BATCHES.value * _ROWS.value * _LENGTH.value
  print(f"{_SHAPE.value}, {_BATCHES.value} x {_ROWS.value} x {_LENGTH.value} tokens, remat {_REMAT.value}, "
        f"{_CORES.value} cores, fastest of {_REPEATS.value}\n\n"
        "| dtype | work | s | tokens/s | times forward and backward | median s |\n|---|---|---|---|---|---|")
  for dtype in _DTYPES.value:
    times = time_interleaved(make_passes(dtype, folder), _REPEATS.value)
    for name, seconds in times.items():
      print(f"| {dtype} | {name} | {min(seconds):.2f} | {tokens / min(seconds):.0f} | "
            f"{min(seconds) / min(times['forward and backward']):.3f} | {statistics.median(seconds):.2f} |", flush=True)
  functions, everything, matrices = make_streamed(root)
  print(f"\n{_STREAMED.value}, bfloat16, {_CORES.value} cores, fastest of {_REPEATS.value}\n\n"
        "| work | s | GB read | GB/s | GB/s, over linear's | median s |\n|---|---|---|---|---|---|")
  times = time_interleaved(functions, _REPEATS.value)
  for name, seconds in times.items():
    read = (matrices if name.startswith("weight") else everything) / 1e9
    peer = everything / 1e9 / min(times["linear, process" if name.endswith("process") else "linear"])
    speed = read / min(seconds)
    print(f"| {name} | {min(seconds):.2f} | {read:.2f} | {speed:.2f} | {speed / peer:.2f} | "
          f"{statistics.median(seconds):.2f} |")


if __name__ == "__main__":
  app.run(main)
