"""Many runs of the command, one process per core; computations that methods share are done once."""

import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

REPO = Path(__file__).parent.parent


def run_all(methods: Mapping[str, Sequence[str]], seeds: Mapping[str, int], root: Path, command: Sequence[str], *,
            done: Collection[str] = (), processes: int = 0) -> None:
  """Runs every method with its seeds in ROOT/METHOD_SEED, one run per core; finished stages are not repeated.

  Stages that a method shares with star (the base's scores, the first samples and their SFT) are computed once: star
  runs first, and the others start from a copy of its run, in which the stages that differ are run again.

  Args:
    methods: the flags of each method.
    seeds: the number of seeds of each method, from 0 on.
    root: folder for the runs.
    command: the flags of all runs.
    done: runs, as METHOD_SEED, whose scores are known from elsewhere; they are not run.
    processes: maximum number of concurrent processes; 0 for one per core.

  Raises:
    SystemExit: when a run fails, with the last line of its log; runs that have begun go on to their end.
  """
  root.mkdir(parents=True, exist_ok=True)
  cores: SimpleQueue[int] = SimpleQueue()
  for core in sorted(os.sched_getaffinity(0))[:processes or None]:
    cores.put(core)

  def run_one(method: str, seed: int) -> None:
    workdir, core = root / f"{method}_{seed}", cores.get()
    try:
      again = method != "star" and _copy(root / f"star_{seed}", workdir)
      run([*command, f"--config.seed={seed}", *methods[method]] + ["--rerun"] * again, workdir,
          compiled=root / "compiled", core=core)
      print(f"{method} seed {seed} done", flush=True)
    finally:
      cores.put(core)

  runs = [(method, seed) for seed in range(max(seeds.values(), default=0)) for method in methods
          if seed < seeds[method] and f"{method}_{seed}" not in done]
  with ThreadPoolExecutor(cores.qsize()) as pool:
    for is_star in (True, False):
      started = [pool.submit(run_one, *one) for one in runs if (one[0] == "star") == is_star]
      try:
        for future in started:
          future.result()
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def run(flags: Sequence[str], workdir: Path, *, compiled: Path, core: int | None = None) -> None:
  """Runs the command in a work directory, with its output in WORKDIR.log.

  Args:
    flags: flags of the command except --workdir.
    workdir: run directory.
    compiled: folder for compiled programs, which runs share.
    core: core to pin the run to; None for all.

  Raises:
    SystemExit: when the run fails, with the last line and the path of its log.
  """
  environment = os.environ | {
      "JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "PYTHONPATH": str(REPO), "PYTHONWARNINGS": "ignore"}
  pinned = [] if core is None else ["taskset", "-c", str(core)]
  command = [*pinned, sys.executable, "-m", "imm_jax.main", f"--workdir={workdir}", *flags]
  workdir.parent.mkdir(parents=True, exist_ok=True)
  log = workdir.with_name(f"{workdir.name}.log")
  with log.open("w") as output:
    code = subprocess.run(command, cwd=REPO, env=environment, stdout=output, stderr=output, check=False).returncode
  if code:
    *_, last = log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
    raise SystemExit(f"{workdir.name} ended with {code}: {last}\nThe whole output is in {log}")


def _copy(first: Path, workdir: Path) -> bool:
  """Copies the first run to `workdir`, unless that exists; returns whether there is a first run."""
  if not first.exists():
    return False
  if not workdir.exists():
    shutil.copytree(first, started := workdir.with_name(f"{workdir.name}.part"), dirs_exist_ok=True)
    started.rename(workdir)
  return True
