"""A TPU pod that is not there: a repository with launch_tpu.sh, a stand-in for gcloud, and folders for workers.

The workers' half of the script is really run, but its `python3` makes no environment and its `imm_jax.main` only waits.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests import REPO

SCRIPTS = ("launch_tpu.sh", "launch_tpu_worker.sh")
START = ("start", "--name=pod", "--config=configs/common.py", "--workdir=gs://bucket/run")
QUOTA = "TPUV5sLitepodPerProjectPerZoneForTPUAPI"
SPOT_QUOTA = "TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI"
_SCENARIO = {
    "account": "me@example.org", "project": "p", "compute/zone": "us-west4-a", "api": True, "buckets": ["gs://bucket"],
    "types": ["v5litepod-16"],
    "quotas": {QUOTA: "0 us-east1-c\n32 us-west4-a us-west4-b", SPOT_QUOTA: "-1 us-west4-a"},
    "tpu-vm": [], "queued-resources": [], "type": "v5litepod-16", "slices": 1, "create_error": "",
    "after_create": ["READY"]}
_PYTHON = r"""#!/usr/bin/env bash
case "$1 $2" in
  "-c import"*) exit "${FAKE_OLD_PYTHON:-0}" ;;
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m uv") mkdir -p "${!#}/bin"; cp "$0" "${!#}/bin/python"; echo "$*" >>"$HOME/uv" ;;
  "-m pip") [[ $3 == --version ]] && exit; echo "$*" >>"$HOME/pip"; exit "${FAKE_PIP_FAILS:-0}" ;;
  "-m imm_jax.main")
    if [[ ${FAKE_DEAF:-} ]]; then trap '' TERM; else trap 'sleep 0.5; echo saved; exit 143' TERM; fi
    echo loading
    printf '%s\0' "$PWD" "${@:3}" >"$HOME/argv.new"
    mv "$HOME/argv.new" "$HOME/argv"
    until [[ -e $HOME/finish ]]; do sleep 0.05; done ;;
  *) exit 9 ;;
esac
"""
# A folder stands for the bucket, and a file in it for the mount.
_GCSFUSE = """#!/usr/bin/env bash
echo "$*" >>"$HOME/gcsfuse"
[[ -z ${FAKE_GCSFUSE_FAILS:-} ]]
"""


def wait_for(what: Callable[[], object]) -> None:
  end = time.monotonic() + 20
  while not what():
    assert time.monotonic() < end, "it did not come to be"
    time.sleep(0.05)


def make_template(folder: Path) -> Path:
  """A folder with a repository, and a bin with the fake gcloud and python3."""
  repository = folder / "repository"
  (repository / "configs").mkdir(parents=True)
  (folder / "bin").mkdir()
  for script in SCRIPTS:
    shutil.copy(REPO / script, repository)
  for name, text in {"configs/common.py": "old\n", "gone.py": "", "a file.py": "", ".gitignore": "runs/\n"}.items():
    (repository / name).write_text(text)
  git = ["git", "-C", repository, "-c", "user.name=me", "-c", "user.email=me@example.org"]
  for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
    subprocess.run([*git, *command], check=True)
  fake = Path(__file__).with_name("fake_gcloud.py").read_text()
  pythons = {f"python3{minor}": _PYTHON for minor in ("", ".11", ".12", ".13", ".14")}
  for name, text in {"gcloud": f"#!{sys.executable} -IS\n{fake}", "gcsfuse": _GCSFUSE, **pythons}.items():
    (folder / "bin" / name).write_text(text)
    (folder / "bin" / name).chmod(0o755)
  return folder


class Pod:
  """The repository, the fake gcloud and its workers, all in one folder."""

  def __init__(self, folder: Path):
    self.folder, self.repository = folder, folder / "repository"
    self.environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE_GCLOUD": str(folder)}
    self.scenario()

  def scenario(self, **changes: object) -> None:
    (self.folder / "scenario.json").write_text(json.dumps({**_SCENARIO, **changes}))

  def run(self, *arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
    done = subprocess.run([self.repository / "launch_tpu.sh", *arguments], env={**self.environment, **environment},
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done

  def calls(self) -> list[list[str]]:
    """Arguments of gcloud's calls so far."""
    file = self.folder / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

  def changes(self) -> list[str]:
    """Those of gcloud's calls that change something, as their verbs."""
    verbs = ("create", "delete", "scp", "ssh")
    return [verb for call in self.calls() for verb in verbs if verb in call[:4]]

  def workers(self) -> list[Path]:
    return sorted(self.folder.glob("slice*"))

  def argv(self, worker: Path) -> list[str]:
    """Folder and arguments of the imm_jax.main that a worker runs."""
    wait_for((worker / "argv").exists)
    return (worker / "argv").read_text().split("\0")[:-1]

  def running(self, worker: Path) -> list[int]:
    """Numbers of the processes that run imm_jax.main in a worker's folder, without their children."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
      try:
        here = worker in (process / "cwd").readlink().parents and os.getsid(int(process.name)) == int(process.name)
        if here and b"imm_jax.main" in (process / "cmdline").read_bytes():
          found.append(int(process.name))
      except OSError:  # it has ended, or belongs to another user
        continue
    return found
