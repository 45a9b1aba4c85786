"""launch_tpu.sh with a stand-in for gcloud: what the workers then really run."""

import shlex
import subprocess

import pytest

from tests.fake_pod import SCRIPTS, START, wait_for


def test_arguments_arrive_as_they_were_given(pod):
  overrides = ["--config.prompt.header=two  words", "it's", 'a "b" c', "$HOME `id` $(id)", "a;b & c | d > e", "*", "~",
               "x=~/y", "", "back\\slash", "new\nline", "ü", "--", "--name=other", "!1 {a,b} #c"]
  pod.run(*START, "--type", "v5litepod-16", "--", *overrides)
  assert len(pod.workers()) == 2
  for worker in pod.workers():
    assert pod.argv(worker) == [
        f"{worker}/imm_jax_run/code", "--config=configs/common.py", f"--workdir={worker}/imm_jax_run/bucket/run",
        "--config.sft.state_dir=gs://bucket/run/states", "--distributed=on", *overrides]
    assert (worker / "gcsfuse").read_text() == "--implicit-dirs --rename-dir-limit=1000000 bucket bucket\n"
    assert len(pod.running(worker)) == 1
  assert pod.changes() == ["create", "scp", "ssh", "ssh", "ssh"]


def test_the_working_tree_is_shipped(pod):
  (pod.repository / "configs" / "common.py").write_text("new\n")
  (pod.repository / "configs" / "mine.py").write_text("untracked\n")
  (pod.repository / "gone.py").unlink()
  (pod.repository / "runs").mkdir()
  (pod.repository / "runs" / "big").write_text("ignored")
  pod.scenario(**{"tpu-vm": ["READY"]})
  pod.run(*START, "--config=configs/mine.py:7b")
  for worker in pod.workers():
    code = worker / "imm_jax_run" / "code"
    files = {str(f.relative_to(code)) for f in code.rglob("*") if f.is_file()}
    assert files == {".gitignore", "a file.py", "configs/common.py", "configs/mine.py", *SCRIPTS}
    assert (code / "configs" / "common.py").read_text() == "new\n"
    assert (worker / "pip").read_text() == "-m pip install --quiet --editable ./code[tpu]\n"
    assert pod.argv(worker)[1] == "--config=configs/mine.py:7b"
  assert "create" not in pod.changes()


def test_an_old_python_is_replaced(pod):
  pod.scenario(**{"tpu-vm": ["READY"]})
  pod.run(*START, FAKE_OLD_PYTHON="1")
  for worker in pod.workers():
    assert "-m pip install --quiet --user uv\n" in (worker / "pip").read_text()
    assert (worker / "uv").read_text() == "-m uv venv --quiet --seed --python=3.12 venv\n"
    assert pod.argv(worker)


def test_a_second_start_ends_the_first_run(pod):
  pod.scenario(**{"tpu-vm": ["READY"]})
  pod.run(*START)
  first = {w: (pod.argv(w), pod.running(w)) for w in pod.workers()}
  pod.run(*START, "--", "--config.seed=2")
  for worker in pod.workers():
    wait_for(lambda w=worker: pod.argv(w)[-1] == "--config.seed=2")
    assert len(pod.running(worker)) == 1
    assert pod.running(worker) != first[worker][1]
    assert "saved" in (worker / "imm_jax_run" / "run.log").read_text()


def test_stop_waits_until_the_run_has_saved(pod):
  pod.scenario(**{"tpu-vm": ["READY"]})
  pod.run(*START)
  for worker in pod.workers():
    pod.argv(worker)
  pod.run("stop", "--name=pod")
  for worker in pod.workers():
    assert (worker / "imm_jax_run" / "run.log").read_text().endswith("loading\nsaved\n")
    assert pod.running(worker) == []
  assert pod.run("stop", "--name=pod").stderr.count("nothing runs") == 2


def test_stop_kills_what_does_not_end(pod):
  pod.scenario(**{"tpu-vm": ["READY"]})
  pod.run(*START, FAKE_DEAF="1")
  for worker in pod.workers():
    pod.argv(worker)
  assert pod.run("stop", "--name=pod", "--grace=1").stderr.count("no end after 1 s, SIGKILL") == 2
  assert all(pod.running(worker) == [] for worker in pod.workers())


def test_restart_keeps_code_and_arguments(pod):
  pod.scenario(**{"tpu-vm": ["READY"]})
  pod.run(*START, "--", "--config.prompt.header=a b")
  before = {w: (pod.argv(w), pod.running(w), (w / "pip").read_text()) for w in pod.workers()}
  (pod.repository / "configs" / "common.py").write_text("new\n")
  for install in (False, True):
    for worker in pod.workers():
      pod.argv(worker)
      (worker / "argv").unlink()
    pod.run("restart", "--name=pod", *(["--install"] if install else []))
    for worker, (argv, processes, pip) in before.items():
      assert pod.argv(worker) == argv
      assert len(pod.running(worker)) == 1
      assert pod.running(worker) != processes
      assert (worker / "pip").read_text() == pip * (1 + install)
      assert (worker / "imm_jax_run/code/configs/common.py").read_text() == ("new\n" if install else "old\n")


def test_an_install_that_fails_starts_nothing(pod):
  pod.scenario(**{"tpu-vm": ["READY"]})
  error = pod.run(*START, code=1, FAKE_PIP_FAILS="1").stderr
  assert error.splitlines()[-1] == "launch_tpu.sh: install failed on a worker of pod (messages above)"
  assert all(pod.running(worker) == [] for worker in pod.workers())


def test_shared_folder_is_taken(pod):
  """A folder that workers share is taken as it is."""
  pod.scenario(**{"tpu-vm": ["READY"]})
  pod.run(*START, "--workdir=/mnt/shared/run")
  for worker in pod.workers():
    assert pod.argv(worker)[2:] == ["--workdir=/mnt/shared/run", "--distributed=on"]
    assert not (worker / "gcsfuse").exists()


def test_failed_bucket_mount_starts_nothing(pod):
  """A bucket that cannot be mounted is an error."""
  pod.scenario(**{"tpu-vm": ["READY"]})
  error = pod.run(*START, code=1, FAKE_GCSFUSE_FAILS="1").stderr
  assert "gcsfuse cannot mount gs://bucket" in error
  assert all(pod.running(worker) == [] for worker in pod.workers())


def test_tail_and_status(pod):
  pod.scenario(**{"tpu-vm": ["READY"]})
  pod.run(*START)
  for worker in pod.workers():
    pod.argv(worker)
  status = pod.run("status", "--name=pod").stderr
  assert "pod is READY" in status
  assert status.count("runs as") == status.count(": loading") == 2
  with subprocess.Popen([pod.repository / "launch_tpu.sh", "tail", "--name=pod", "--worker=1"], env=pod.environment,
                        stdout=subprocess.PIPE, text=True) as tail:
    assert tail.stdout.readline().startswith("== ")
    assert tail.stdout.readline() == "loading\n"
    (pod.folder / "slice0-worker1" / "finish").touch()  # it ends with the run
    assert tail.wait(timeout=20) == 0


def test_two_slices(pod):
  pod.scenario(after_create=["ACTIVE"])
  pod.run(*START, "--type=v5litepod-16", "--slices=2")
  assert "--node-count=2" in next(call for call in pod.calls() if "create" in call)
  assert [w.name for w in pod.workers()] == [f"slice{s}-worker{w}" for s in (0, 1) for w in (0, 1)]
  assert all(pod.argv(worker) for worker in pod.workers())
  pod.run("stop", "--name=pod")
  assert all(pod.running(worker) == [] for worker in pod.workers())
  tail = pod.run("tail", "--name=pod", "--slice=1", "--worker=1", "--dry_run").stdout
  assert {"--node=1", "--worker=1"} <= {*shlex.split(tail)}
  pod.run("delete", "--name=pod")
  assert pod.calls()[-1][2:] == ["queued-resources", "delete", "pod", "--zone=us-west4-a", "--project=p", "--force"]


@pytest.mark.parametrize(("kind", "state"), [("tpu-vm", "PREEMPTED"), ("queued-resources", "SUSPENDED")])
def test_a_preempted_tpu_is_made_anew(pod, kind, state):
  pod.scenario(**{kind: [state], "after_create": ["ACTIVE" if kind == "queued-resources" else "READY"]})
  pod.run(*START, "--type=v5litepod-16", "--spot", *(["--queued"] if kind == "queued-resources" else []))
  assert pod.changes() == ["delete", "create", "scp", "ssh", "ssh", "ssh"]
  assert all(pod.argv(worker) for worker in pod.workers())
