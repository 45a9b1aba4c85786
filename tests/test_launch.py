"""launch_tpu.sh with a stand-in for gcloud: what it asks, what it would run, and what it refuses."""

import http.server
import json
import re
import shlex
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from tests import REPO
from tests.fake_pod import QUOTA, SCRIPTS, SPOT_QUOTA, START


def test_a_dry_run_prints_the_commands_and_runs_none(pod):
  overrides = ["--config.prompt.header=it's $HOME; \"x\"", "--config.seed=3"]
  done = pod.run(*START, "--type=v5e-16", "--dry_run", "--", *overrides)
  lines = [shlex.split(line) for line in done.stdout.splitlines()]
  verbs = [line[4] if line[0] == "gcloud" else line[0] for line in lines]
  assert verbs == ["create", "mkdir", "cp", "tar", "scp", "ssh", "ssh", "ssh"]
  where = ["--zone=us-west4-a", "--project=p"]
  assert lines[0] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "pod", *where, "--accelerator-type=v5litepod-16",
                      "--version=v2-alpha-tpuv5-lite"]
  assert all({*where, "--worker=all"} <= {*line} for line in lines[4:])
  remote = [shlex.split(next(w for w in line if w.startswith("--command=")).removeprefix("--command="))[2:]
            for line in lines[5:]]
  assert remote[0] == ["stop", "300"]
  assert remote[1][0] == "install"
  assert remote[2] == ["run", "--config=configs/common.py", "--workdir=gs://bucket/run", "--distributed=on",
                       *overrides]
  assert pod.changes() == []
  assert pod.workers() == []


@pytest.mark.parametrize(("scenario", "arguments", "line"), [
    ({"account": ""}, (), "gcloud is not logged in: gcloud auth login"),
    ({"project": ""}, (), "no project: give --project"),
    ({"compute/zone": ""}, (), "no zone: give --zone"),
    ({"api": False}, (), "the TPU API does not say whether there is a pod in us-west4-a: its API is off: gcloud"),
    ({"types": []}, (), "zone us-west4-a has no v5litepod-16"),
    ({"quotas": {QUOTA: "8 us-west4-a"}}, (), f"quota {QUOTA} in us-west4-a is 8, 16 needed; more is asked for at"),
    ({}, ("--slices=3",), f"quota {QUOTA} in us-west4-a is 32, 48 needed"),
    ({}, ("--zone=us-east1-c",), f"quota {QUOTA} in us-east1-c is 0, 16 needed"),
    ({"create_error": "RESOURCE_EXHAUSTED: no capacity"}, (), "pod could not be made (gcloud's message above)"),
    ({}, ("--workdir=gs://other/run",), "--workdir: gs://other cannot be reached: ERROR: (gcloud) gs://other"),
    ({}, ("--config=configs/none.py",), "--config: configs/none.py is not among the files of"),
    ({}, ("--config=runs/secret.py",), "--config: runs/secret.py is not among the files of"),
    ({"tpu-vm": ["READY"], "type": "v5p-32"}, (), "pod is a v5p-32, not a v5litepod-16: give another --name"),
    ({"tpu-vm": ["STOPPED"]}, (), "pod is STOPPED, not READY"),
])
def test_what_is_not_there_is_one_line(pod, scenario, arguments, line):
  (pod.repository / "runs").mkdir()
  (pod.repository / "runs" / "secret.py").write_text("ignored by git")
  pod.scenario(**scenario)
  error = pod.run(*START, "--type=v5litepod-16", *arguments, code=1).stderr.splitlines()
  assert error[-1].startswith(f"launch_tpu.sh: {line}")
  assert len(error) == (2 if scenario.get("create_error") else 1)  # and gcloud's own
  assert not {"scp", "ssh"} & {*pod.changes()}


def test_without_gcloud_or_git_it_says_so(pod):
  tools = pod.folder / "tools"
  tools.mkdir()
  for tool in ("bash", "dirname", "env", "mktemp", "rm"):
    (tools / tool).symlink_to(shutil.which(tool))
  assert "gcloud is not installed" in pod.run(*START, code=1, PATH=str(tools)).stderr
  shutil.rmtree(pod.repository / ".git")
  assert "is no git checkout" in pod.run(*START, code=1, GIT_CEILING_DIRECTORIES=str(pod.folder)).stderr


@pytest.mark.parametrize(("arguments", "line"), [
    ((), "'' is no command"),
    (("launch",), "'launch' is no command"),
    (("stop",), "--name='': lower case letters"),
    (("stop", "--name=pod", "--nmae=x"), "no option '--nmae=x'"),
    (("stop", "--name"), "--name needs a value"),
    (("stop", "--name=pod", "--grace=long"), "--grace='long' is no whole number"),
    (("stop", "--name=pod", "--dry_run=1"), "--dry_run takes no value"),
    (("start", "--name=pod", "--config=configs/common.py", "--workdir=gs://bucket"),
     "--workdir=gs://bucket: a folder in the bucket is needed"),
    (("start", "--name=pod"), "start needs --config and --workdir"),
    (("restart", "--name=pod", "--", "--config.seed=1"), "--config, --workdir, --type and overrides are for start"),
    ((*START, "--config.seed=1"), "no option '--config.seed=1'; what imm_jax.main is to get follows --"),
    ((*START, "--type=pod"), "--type='pod': v5litepod-16, say, is right"),
    (START, "there is no pod in us-west4-a yet: give --type to make it"),
    ((*START, "--type=v9x-16"), "--type=v9x-16 has no default --version"),
])
def test_wrong_usage_ends_in_code_2(pod, arguments, line):
  assert f"launch_tpu.sh: {line}" in pod.run(*arguments, code=2).stderr
  assert pod.changes() == []


def test_help_names_every_command_and_option(pod):
  text = pod.run("--help").stdout
  source = (REPO / "launch_tpu.sh").read_text().split("\nparse() {")[1]
  for option in {*re.findall(r"(--[a-z]\w+)", source.split("esac")[0])} - {"--help"}:
    assert option in text, option
  for command in re.findall(r"^  (\w+)\)", source, re.MULTILINE):
    assert f"\n  {command} " in text, command


@pytest.mark.parametrize("command", ["restart", "stop", "tail", "delete"])
def test_a_tpu_that_is_not_there(pod, command):
  assert "there is no TPU or queued resource pod in us-west4-a of p" in pod.run(command, "--name=pod", code=1).stderr
  assert "pod is not there" in pod.run("status", "--name=pod").stderr


def test_a_queued_resource_is_waited_for(pod):
  pod.scenario(after_create=["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
  error = pod.run(*START, "--type=v5litepod-16", "--queued", "--spot", "--poll=0").stderr
  assert re.findall(r"pod is (\w+); waiting", error) == ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"]
  assert next(call for call in pod.calls() if "create" in call) == [
      "compute", "tpus", "queued-resources", "create", "pod", "--zone=us-west4-a", "--project=p",
      "--accelerator-type=v5litepod-16", "--spot", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=pod"]
  assert any(SPOT_QUOTA in call for call in pod.calls())
  assert len(pod.workers()) == 2
  assert all(pod.argv(worker) for worker in pod.workers())


def test_a_queued_resource_that_fails(pod):
  pod.scenario(after_create=["ACCEPTED", "FAILED"])
  error = pod.run(*START, "--type=v5litepod-16", "--queued", "--poll=0", code=1).stderr
  assert error.splitlines()[-1] == "launch_tpu.sh: pod is FAILED: start again requests it again"
  assert pod.changes() == ["create"]


@pytest.mark.parametrize(("arguments", "quotas", "line"), [
    ((), {}, f"quota {QUOTA} cannot be read (its API is off"),
    ((), {QUOTA: "8 us-east1-c"}, f"quota {QUOTA} cannot be read (it does not name the zone); going on"),
    (("--create_flag=--reserved",), {}, "the quota for this v5litepod-16 is not known here; going on"),
    (("--spot",), {SPOT_QUOTA: "-1 us-west4-a"}, ""),
])
def test_a_quota_that_cannot_be_read_stops_nothing(pod, arguments, quotas, line):
  pod.scenario(quotas=quotas)
  done = pod.run(*START, "--type=v5litepod-16", "--dry_run", *arguments)
  assert line in done.stderr
  assert ("quota" in done.stderr) == bool(line)
  assert " create pod " in done.stdout


def test_shellcheck():
  if not shutil.which("shellcheck"):
    pytest.skip("shellcheck is not installed")
  done = subprocess.run(["shellcheck", *SCRIPTS], cwd=REPO, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


def test_gcloud_knows_every_flag(pod):
  gcloud = shutil.which("gcloud")
  tree_file = Path(gcloud or "").resolve().parent.parent / "data" / "cli" / "gcloud_completions.py"
  if not gcloud or not tree_file.exists():
    pytest.skip("gcloud is not installed")
  tree = json.loads(tree_file.read_text().partition("STATIC_COMPLETION_CLI_TREE =")[2])
  runs = [({}, (*START, "--type=v5litepod-16", *more)) for more in (["--spot"], ["--queued"], ["--slices=2"])]
  runs += [({kind: [state]}, (command, "--name=pod"))
           for kind, state in (("tpu-vm", "READY"), ("queued-resources", "ACTIVE")) for command in ("tail", "delete")]
  printed = []
  for scenario, arguments in runs:
    pod.scenario(**scenario)
    printed += map(shlex.split, pod.run(*arguments, "--dry_run").stdout.splitlines())
  seen = set()
  for call in [line[1:] for line in printed if line[0] == "gcloud"] + pod.calls():
    node, path = tree, []
    for word in call:
      if word not in node["commands"]:
        break
      node, path = node["commands"][word], [*path, word]
    flags = {word.partition("=")[0] for word in call[len(path):] if word.startswith("--")}
    assert not node["commands"], f"{call} ends at a group"
    assert flags <= {*node["flags"], *tree["flags"]}, path
    seen.add(" ".join(path[-2:]))
  assert {f"{kind} {verb}" for kind in ("tpu-vm", "queued-resources")
          for verb in ("create", "describe", "delete", "ssh", "scp")} <= seen
  assert {"info describe", "accelerator-types list", "storage ls", "auth list"} <= seen


def test_the_real_gcloud_reads_what_the_api_says(pod):
  """Its formats, filters and messages are what the script expects; login and buckets stay faked."""
  if not shutil.which("gcloud"):
    pytest.skip("gcloud is not installed")
  where = "projects/p/locations/us-west4-a"
  nodes = {"tpu": {"nodeSpec": [{"nodeId": "a", "node": {"acceleratorType": "v5litepod-16"}}]}}
  answers = {
      f"/v2/{where}/queuedResources/two": {"name": "two", "state": {"state": "ACTIVE"}, **nodes},
      f"/v2/{where}/acceleratorTypes": {"acceleratorTypes": [
          {"name": f"{where}/acceleratorTypes/{t}", "type": t} for t in ("v5litepod-16", "v5litepod-160")]},
      f"/v1beta/projects/p/locations/global/services/tpu.googleapis.com/quotaInfos/{QUOTA}": {"dimensionsInfos": [
          {"details": {}, "applicableLocations": ["us-east1-c"]},
          {"details": {"value": "8"}, "applicableLocations": ["us-west4-b", "us-west4-a"]}]}}

  class Api(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
      code, answer = 200, answers.get(self.path.partition("?")[0])
      if not answer:
        code, answer = 404, {"error": {"code": 404, "status": "NOT_FOUND", "message": "It was not found"}}
      self.send_response(code)
      self.send_header("Content-Type", "application/json")
      self.end_headers()
      self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
      pass

  fake = pod.folder / "bin" / "gcloud"
  fake.rename(fake.with_name("fake"))
  fake.write_text(f'#!/usr/bin/env bash\ncase $1 in auth | storage) exec fake "$@" ;; esac\n'
                  f'exec {shlex.quote(shutil.which("gcloud"))} "$@"\n')
  fake.chmod(0o755)
  (pod.folder / "token").write_text("token")
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    pod.environment |= {
        "CLOUDSDK_CONFIG": str(pod.folder / "config"), "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(pod.folder / "token"),
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": url, "CLOUDSDK_API_ENDPOINT_OVERRIDES_CLOUDQUOTAS": url,
        "CLOUDSDK_CORE_DISABLE_USAGEREPORTING": "1"}
    flags = ("--project=p", "--zone=us-west4-a")
    short = pod.run(*START, *flags, "--type=v5litepod-16", code=1).stderr
    assert short.startswith(f"launch_tpu.sh: quota {QUOTA} in us-west4-a is 8, 16 needed")
    tail = shlex.split(pod.run("tail", *flags, "--name=two", "--dry_run").stdout)
    assert tail[3:5] == ["queued-resources", "ssh"]
    server.shutdown()
