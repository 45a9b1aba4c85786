"""Training steps compared with transformers and torch, in one interleaved run on the same cores.

    python benchmarks/sft.py --workdir=/tmp/sft-benchmark --cores=2

The model is a random Qwen2 of 6 layers, width 256 and vocabulary 16,384. A step has full rows with all tokens learned,
float32 master weights, AdamW and clipping. The peer is transformers' model with scaled-dot-product attention (which for
full rows skips masked blocks), `torch.autocast` for bfloat16 and torch's fused AdamW. Each program runs in several
processes; reported are the fastest step after warm-up, and the peak of anonymous memory. Prints a Markdown table; both
programs have the same weights and tokens, so losses are equal up to rounding. `--additions=kl,lora` also runs steps
with these additions to SFT, anchored to the same weights, and prints their cost relative to plain steps.
"""

import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import random_checkpoints
from absl import app, flags

_WORKDIR = flags.DEFINE_string("workdir", "/tmp/sft-benchmark", "Folder for the checkpoint.")
_SHAPE = flags.DEFINE_enum("shape", "sft", sorted(random_checkpoints.SHAPES), "Shape of the checkpoint.")
_ROWS = flags.DEFINE_integer("rows", 8, "Rows per step.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("row_length", 512, "Tokens per row.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 10, "Timed steps, after WARM_UP.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Processes of each kind, interleaved.", lower_bound=1)
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Compute dtypes.")
_REMAT = flags.DEFINE_list("remat", ["none", "full"], "Rematerialization; in torch gradient checkpointing or none.")
_ADDITIONS = flags.DEFINE_list("additions", [], "Additions (of ADDITIONS) to benchmark too.")
_PEER = flags.DEFINE_bool("transformers", True, "Also run transformers.")
_CORES = flags.DEFINE_integer("cores", 2, "Number of cores that processes are pinned to.", lower_bound=1)
_CHILD = flags.DEFINE_string("child", None, "Internal: dtype,remat,program.")
WARM_UP = 3
ADDITIONS = ("l2_sp", "kl", "ema", "lora")


def tokens() -> np.ndarray:
  """Returns the token ids of a step's rows."""
  vocab = random_checkpoints.SHAPES[_SHAPE.value][-1]
  return np.random.default_rng(0).integers(0, vocab, (_ROWS.value, _LENGTH.value))


def ours(dtype: str, remat: str, folder: Path, added: str = "") -> Callable[[], float]:
  """Returns a function that runs a training step, possibly with an addition to SFT, and returns its loss."""
  import jax

  from imm_jax.model import attention, hf, sharding
  from imm_jax.training import lora
  from imm_jax.training.additions import Additions
  from imm_jax.training.computation import Computation
  from imm_jax.training.optimization import make_optimizer
  from imm_jax.training.packing import PackedBatches, TokenizedExample
  from imm_jax.training.step import init_state, make_train_step

  mesh = sharding.make_mesh(data=1, fsdp=1)
  load = lambda dtype: hf.load(folder, dtype=dtype, place=lambda *_: jax.NamedSharding(mesh, sharding.P()))
  additions = Additions(**({added: lora.Lora(16, 32.0) if added == "lora" else 0.9} if added else {}))
  config, params = load("float32")
  frozen = {"base" if added == "lora" else "anchor": load(dtype)[1]} if added in ("l2_sp", "kl", "lora") else {}
  if added == "lora":
    params = lora.init(config, additions.lora, mesh, key=jax.random.key(0))
  optimizer = make_optimizer(weight_decay=0.0, grad_clip=1.0)
  state = init_state(params, optimizer, mesh, additions=additions, frozen=frozen)
  del params, frozen
  backend = attention.choose_backend("auto", config, dtype=dtype, length=_LENGTH.value, rows=_ROWS.value, mesh=mesh)
  train_step = make_train_step(config, optimizer, Computation(mesh, dtype, remat=remat, attention=backend),
                               additions=additions)
  examples = [TokenizedExample(row[:1].tolist(), row[1:].tolist()) for row in tokens()]
  batch = PackedBatches(examples, epochs=1, global_batch=len(examples), row_length=_LENGTH.value, seed=0)[0]
  place = jax.NamedSharding(mesh, sharding.BATCH)

  def step() -> float:
    nonlocal state
    state, metrics = train_step(state, jax.device_put(batch, place), 1e-4)
    return float(jax.block_until_ready((state, metrics))[1]["loss"])

  return step


def theirs(dtype: str, remat: str, folder: Path) -> Callable[[], float]:
  """Returns the same function for torch."""
  import torch
  import transformers

  torch.set_num_threads(_CORES.value)
  transformers.utils.logging.disable_progress_bar()
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
  model.config.use_cache = False
  model.train()
  if remat != "none":
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
  ids = torch.tensor(tokens())

  def step() -> float:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
      loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()

  return step


def anonymous() -> float:
  """Returns the anonymous memory of this process in GiB."""
  lines = Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20


def measure(step: Callable[[], float]) -> dict[str, float]:
  """Measures wall-clock and CPU seconds of the fastest step, first and last loss, and peak memory in GiB."""
  peak, done = 0.0, threading.Event()

  def watch() -> None:
    nonlocal peak
    while not done.wait(0.005):
      peak = max(peak, anonymous())

  started = time.perf_counter()
  first = step()
  compiled = time.perf_counter() - started
  for _ in range(WARM_UP - 1):
    step()
  watcher = threading.Thread(target=watch)
  watcher.start()
  wall, cpu = [], []
  for _ in range(_STEPS.value):
    started = time.perf_counter(), time.process_time()
    last = step()
    wall.append(time.perf_counter() - started[0])
    cpu.append(time.process_time() - started[1])
  done.set()
  watcher.join()
  return {"s": min(wall), "median": float(np.median(wall)), "cpu": min(cpu), "gib": peak, "compile": compiled,
          "first": first, "last": last}


def main(_: list[str]) -> None:
  folder = Path(_WORKDIR.value) / _SHAPE.value
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CORES.value])  # and all children
  if _CHILD.value:
    dtype, remat, program = _CHILD.value.split(",")
    run = {"transformers": theirs, "imm_jax": ours}.get(program, functools.partial(ours, added=program))
    print(json.dumps(measure(run(dtype, remat, folder))))
    return
  random_checkpoints.make(folder, _SHAPE.value, 0)
  programs = ["imm_jax", *_ADDITIONS.value] + ["transformers"] * _PEER.value
  kinds = [(dtype, remat, program) for dtype in _DTYPES.value for remat in _REMAT.value for program in programs]
  runs: dict[tuple[str, str, str], list[dict]] = {kind: [] for kind in kinds}
  for _ in range(_REPEATS.value):
    for kind in kinds:
      command = [sys.executable, __file__, *sys.argv[1:], f"--child={','.join(kind)}"]
      output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
      runs[kind].append(json.loads(output.splitlines()[-1]))
  count = _ROWS.value * _LENGTH.value
  print(f"{_SHAPE.value}, {_ROWS.value} x {_LENGTH.value} tokens a step, {_CORES.value} cores\n\n"
        "| dtype | remat | program | ms | median ms | CPU ms | tokens/s | GiB | first loss | last loss | first step s "
        "| tokens/s, this / transformers | CPU | GiB |\n|" + "---|" * 14)
  for kind in kinds:
    best = {name: min(run[name] for run in runs[kind]) for name in ("s", "median", "cpu", "gib", "compile")}
    beside = ""
    if kind[2] == "imm_jax" and _PEER.value:
      peer = {name: min(run[name] for run in runs[*kind[:2], "transformers"]) for name in ("s", "cpu", "gib")}
      beside = " | ".join(f"{x:.2f}" for x in (peer["s"] / best["s"], peer["cpu"] / best["cpu"],
                                               best["gib"] / peer["gib"]))
    print(f"| {' | '.join(kind)} | {best['s'] * 1e3:.0f} | {best['median'] * 1e3:.0f} | {best['cpu'] * 1e3:.0f} | "
          f"{count / best['s']:.0f} | {best['gib']:.2f} | {runs[kind][0]['first']:.4f} | {runs[kind][0]['last']:.4f} | "
          f"{best['compile']:.1f} | {beside or ' | | '} |", flush=True)
  if _ADDITIONS.value:
    print("\n| dtype | remat | added | time | CPU | GiB | GiB more |\n" + "|---" * 7 + "|")
  for *setting, program in kinds:
    if program in _ADDITIONS.value:
      added, plain = ({name: min(run[name] for run in runs[*setting, of]) for name in ("s", "cpu", "gib")}
                      for of in (program, "imm_jax"))
      ratios = " | ".join(f"{added[name] / plain[name]:.2f}" for name in added)
      print(f"| {' | '.join(setting)} | {program} | {ratios} | {added['gib'] - plain['gib']:.2f} |", flush=True)


if __name__ == "__main__":
  app.run(main)
