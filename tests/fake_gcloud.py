"""A stand-in for gcloud: answers from scenario.json in $FAKE_GCLOUD, notes every call, runs ssh commands here.

A worker is a folder of its own, which is the home and the working directory of what ssh runs there.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path


def _fail(message: str) -> None:
  print(f"ERROR: (gcloud) {message}", file=sys.stderr)
  sys.exit(1)


def _workers(here: Path, flags: dict[str, str], slices: int) -> list[Path]:
  nodes = range(slices) if flags.get("--node") == "all" else [int(flags.get("--node", 0))]
  workers = range(2) if flags["--worker"] == "all" else [int(flags["--worker"])]
  return [here / f"slice{node}-worker{worker}" for node in nodes for worker in workers]


def main() -> None:
  arguments = sys.argv[1:]
  here = Path(os.environ["FAKE_GCLOUD"])
  with (here / "calls.jsonl").open("a") as f:
    f.write(json.dumps(arguments) + "\n")
  scenario = json.loads((here / "scenario.json").read_text())
  flags = dict(a.partition("=")[::2] for a in arguments if a.startswith("--"))
  words = [a for a in arguments if not a.startswith("--")]

  def save() -> None:
    (here / "scenario.json").write_text(json.dumps(scenario))

  match words:
    case ["auth", "list"]:
      print(scenario["account"])
    case ["config", "get", key]:
      print(scenario[key])
    case ["storage", "ls", bucket]:
      if bucket not in scenario["buckets"]:
        _fail(f"{bucket} not found: 404.")
    case ["beta", "quotas", "info", "describe", quota]:
      if quota not in scenario["quotas"]:
        _fail("PERMISSION_DENIED: Cloud Quotas API has not been used in project p before or it is disabled.")
      print(scenario["quotas"][quota])
    case ["compute", "tpus", *_] if not scenario["api"]:
      _fail("PERMISSION_DENIED: Cloud TPU API has not been used in project p before\nor it is disabled.")
    case ["compute", "tpus", "tpu-vm", "accelerator-types", "list"]:
      if flags["--filter"].removeprefix("type=") in scenario["types"]:
        print(flags["--filter"].removeprefix("type="))
    case ["compute", "tpus", kind, "describe", _]:
      if not scenario[kind]:
        _fail("NOT_FOUND: Resource was not found.")
      # What comes next shows at the next look; the last state stays.
      print(scenario[kind][0], scenario["type"])
      scenario[kind] = scenario[kind][1:] or scenario[kind]
      save()
    case ["compute", "tpus", kind, "create", _]:
      if scenario["create_error"]:
        _fail(scenario["create_error"])
      scenario[kind] = scenario["after_create"]
      scenario["type"] = flags["--accelerator-type"]
      scenario["slices"] = int(flags.get("--node-count", 1))
      save()
    case ["compute", "tpus", kind, "delete", _]:
      scenario[kind] = []
      save()
    case ["compute", "tpus", _, "scp", source, _]:
      for worker in _workers(here, flags, scenario["slices"]):
        shutil.copytree(source, worker / Path(source).name, dirs_exist_ok=True)
    case ["compute", "tpus", _, "ssh", _]:
      processes = []
      for worker in _workers(here, flags, scenario["slices"]):
        worker.mkdir(exist_ok=True)
        processes.append(subprocess.Popen(["bash", "-c", flags["--command"]], cwd=worker, env={
            **os.environ, "HOME": str(worker)}))
      sys.exit(max([p.wait() for p in processes]))
    case _:
      _fail(f"unrecognized arguments: {words}")


if __name__ == "__main__":
  main()
