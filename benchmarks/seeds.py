"""The loop over many seeds: does merging keep out-of-domain accuracy at little cost in domain?

    python benchmarks/seeds.py --workdir=runs/seeds --seeds=10

Every run is the command of the README (`python -m imm_jax.main --config=configs/tiny.py`) with its own seed and method;
`real` is the control that trains on gold answers in place of samples. A killed benchmark goes on where it was. Prints a
Markdown table with mean and standard error, and the checks of imm and star against the base.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from absl import app, flags

from imm_jax.report import Results

_WORKDIR = flags.DEFINE_string("workdir", "runs/seeds", "Where the run directories go.")
_SEEDS = flags.DEFINE_integer("seeds", 10, "Runs of each method.", lower_bound=2)
_METHODS = flags.DEFINE_list("methods", ["star", "imm", "real"], "Methods to compare.")
_OVERRIDES = flags.DEFINE_multi_string("override", [], "A flag passed on to every run, such as --config.rounds=2.")

REPO = Path(__file__).parent.parent


def run_all(jobs: list[tuple[str, int]], root: Path) -> None:
  """Runs all (method, seed), one process a core."""
  cores: SimpleQueue[int] = SimpleQueue()
  for core in os.sched_getaffinity(0):
    cores.put(core)
  environment = os.environ | {
      "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "PYTHONPATH": str(REPO), "PYTHONWARNINGS": "ignore"}

  def run(job: tuple[str, int]) -> None:
    method, seed = job
    core = cores.get()
    command = ["taskset", "-c", str(core), sys.executable, "-m", "imm_jax.main", "--config=configs/tiny.py",
               f"--workdir={root / f'{method}_{seed}'}", f"--config.method={method}", f"--config.seed={seed}",
               *_OVERRIDES.value]
    with (root / f"{method}_{seed}.log").open("w") as log:
      code = subprocess.run(command, cwd=REPO, env=environment, stdout=log, stderr=log, check=False).returncode
    cores.put(core)
    if code:
      raise SystemExit(f"{' '.join(command)} ended with {code}; see {log.name}")
    print(f"{method} seed {seed} done", flush=True)

  with ThreadPoolExecutor(cores.qsize()) as pool:
    list(pool.map(run, jobs))


def mean(values: list[float]) -> str:
  """Mean and standard error."""
  return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def main(_: list[str]) -> None:
  root = Path(_WORKDIR.value).resolve()
  root.mkdir(parents=True, exist_ok=True)
  run_all([(method, seed) for seed in range(_SEEDS.value) for method in _METHODS.value], root)
  final: dict[str, list[tuple[float, float]]] = {}
  for method in _METHODS.value:
    results = [Results.of(root / f"{method}_{seed}") for seed in range(_SEEDS.value)]
    base = results[0].models[0]
    base_id, base_ood = results[0].in_domain(base).value, results[0].out_of_domain(base).value
    final[method] = [(r.in_domain(r.models[-1]).value, r.out_of_domain(r.models[-1]).value) for r in results]
  rounds = json.loads((root / f"{_METHODS.value[0]}_0" / "config.json").read_text())["rounds"]
  lines = [f"| {_SEEDS.value} seeds, round {rounds} | ID | OOD | ID gain | OOD change |", "|---|---|---|---|---|",
           f"| base | {base_id:.3f} | {base_ood:.3f} | | |"]
  for method, scores in final.items():
    ids, oods = ([s[i] for s in scores] for i in (0, 1))
    lines.append(f"| `{method}` | {mean(ids)} | {mean(oods)} | {mean([v - base_id for v in ids])} | "
                 f"{mean([v - base_ood for v in oods])} |")
  print("\n".join(lines))
  if {"star", "imm"} <= final.keys():
    gain, change = ({m: statistics.mean(s[i] - base for s in final[m]) for m in ("star", "imm")}
                    for i, base in ((0, base_id), (1, base_ood)))
    print(f"\nstar gains {gain['star']:+.3f} in domain (at least +0.08: {gain['star'] >= 0.08}) and changes by "
          f"{change['star']:+.3f} out of domain (at most -0.10: {change['star'] <= -0.10})")
    print(f"imm changes by {change['imm']:+.3f} out of domain (at least -0.02: {change['imm'] >= -0.02}) and keeps "
          f"{gain['imm'] / gain['star']:.0%} of star's gain (at least 75 %: {gain['imm'] >= 0.75 * gain['star']})")


if __name__ == "__main__":
  app.run(main)
