"""Merging of checkpoints on disk, compared with mergekit as whole processes in one interleaved run. Linux only.

    python benchmarks/merge.py --workdir=/tmp/merge-benchmark --shape=0.5b --repeats=3

Makes random bfloat16 checkpoints of Qwen2.5's shape, installs mergekit into a separate environment in the work folder,
and repeatedly runs the floor (a program that only reads the inputs and writes as many bytes as the output), imm_jax and
mergekit. Prints a Markdown table of medians: wall and CPU seconds, CPU seconds beyond those of imports, and the peak of
anonymous memory.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path

import random_checkpoints
from absl import app, flags

_WORKDIR = flags.DEFINE_string("workdir", "/tmp/merge-benchmark", "Folder for checkpoints, environment and outputs.")
_SHAPE = flags.DEFINE_enum("shape", "0.5b", ["tiny", "0.5b", "3b"], "Shape of the checkpoints.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Number of runs, interleaved.", lower_bound=1)
_PEER = flags.DEFINE_bool("mergekit", True, "Also run mergekit.")
MERGEKIT = "mergekit==0.1.5"
REPO = Path(__file__).parent.parent
FLOOR = """
import os, sys
*inputs, out = sys.argv[1:]
block = bytearray(1 << 21)
with open(out, "wb", buffering=0) as target:
  for i, name in enumerate(inputs):
    with open(name, "rb", buffering=0) as source:
      while count := source.readinto(block):
        if i == 0:
          target.write(memoryview(block)[:count])
"""


def measure(command: list[str]) -> dict[str, float]:
  """Runs a command; returns its wall and CPU seconds (with children) and the peak of its anonymous memory in GiB."""
  started, before, peak = time.monotonic(), os.times(), 0
  with subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
    while process.poll() is None:
      status = Path(f"/proc/{process.pid}/status")
      try:
        lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
      except (FileNotFoundError, ProcessLookupError):  # the process has just ended
        break
      peak = max(peak, *(int(line.split()[1]) for line in lines), 0)
      time.sleep(0.005)
    _, errors = process.communicate()
  if process.returncode:
    raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{errors[-2000:]}")
  after = os.times()
  cpu = after.children_user + after.children_system - before.children_user - before.children_system
  return {"wall": time.monotonic() - started, "cpu": cpu, "anonymous": peak / 2**20}


def peer_program(root: Path) -> Path:
  """Installs mergekit into a separate environment, unless it is there; returns the program."""
  home = root / "mergekit"
  program = home / "bin" / "mergekit-yaml"
  if not program.exists():
    venv.create(home, with_pip=True, clear=True)
    subprocess.run([home / "bin" / "pip", "install", "--quiet", MERGEKIT, "torch==2.13.0"], check=True)
  return program


def main(_: list[str]) -> None:
  os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # otherwise every process compiles the package again
  root = Path(_WORKDIR.value).resolve() / _SHAPE.value
  base, a, b = (root / name for name in ("base", "a", "b"))
  for i, folder in enumerate((base, a, b)):
    random_checkpoints.make(folder, _SHAPE.value, i, near=None if folder == base else base)
  out = root / "out"
  ours = [sys.executable, "-m", "imm_jax.merge", f"--out={out}"]
  recipes = {
      "linear": {"merge_method": "linear", "dtype": "float32", "out_dtype": "bfloat16",
                 "models": [{"model": str(m), "parameters": {"weight": w}} for m, w in ((a, 0.3), (b, 0.7))]},
      "dare_linear": {"merge_method": "dare_linear", "dtype": "float32", "out_dtype": "bfloat16",
                      "base_model": str(base),
                      "models": [{"model": str(a), "parameters": {"weight": 0.5, "density": 0.5}}]}}
  commands = {"imports": [sys.executable, "-c", "import imm_jax.merge"],
              "floor": [sys.executable, "-c", FLOOR, *(str(m / "model.safetensors") for m in (a, b)), str(out)]}
  for name, recipe in recipes.items():
    path = root / f"{name}.yml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    commands[f"imm_jax {name}"] = [*ours, f"--recipe={path}"]
    if _PEER.value:
      commands[f"mergekit {name}"] = [str(peer_program(root.parent)), str(path), str(out), "--quiet"]
  commands["imm_jax imm"] = [*ours, "--method=imm", f"--base={base}", f"--tuned={a}", "--drop_rate=0.5"]
  results: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
  for repeat in range(-1, _REPEATS.value):  # the first round warms the page cache and does not count
    for name, command in commands.items():
      if out.is_dir():
        shutil.rmtree(out)
      out.unlink(missing_ok=True)
      measured = measure(command)
      if repeat >= 0:
        results[name].append(measured)
      print(f"{name}: {measured}", file=sys.stderr, flush=True)
  table = {name: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for name, runs in results.items()}
  bare = measure([sys.executable, "-c", "pass"])["cpu"]
  floor = table["floor"]["cpu"] - bare
  size = (a / "model.safetensors").stat().st_size / 1e9
  print(f"{_SHAPE.value}: two inputs and one output of {size:.2f} GB, median of {_REPEATS.value} runs, "
        f"{len(os.sched_getaffinity(0))} cores\n")
  print("| process | wall s | CPU s | CPU s beyond imports | times the floor | anonymous GiB | wall, mergekit / this |")
  print("|---|---|---|---|---|---|---|")
  for name, row in table.items():
    beyond = {"floor": row["cpu"] - bare}.get(name, row["cpu"] - table["imports"]["cpu"])
    peer = table.get(name.replace("imm_jax", "mergekit")) if name.startswith("imm_jax") else None
    known = name.startswith(("imm_jax", "floor"))
    cells = [name, f"{row['wall']:.2f}", f"{row['cpu']:.2f}", f"{beyond:.2f}" if known else "",
             f"{beyond / floor:.1f}" if known else "", f"{row['anonymous']:.2f}",
             f"{peer['wall'] / row['wall']:.1f}" if peer else ""]
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
  app.run(main)
