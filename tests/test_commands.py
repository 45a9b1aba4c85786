"""The command `imm`: what it lists, where it works, how flags and configs are found, and what exit codes say."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from imm_jax import __main__ as commands, cli, config_files, integrity
from imm_jax.errors import Exit, LostError, PreemptedError, ResourceError, UserError, exit_code
from tests import REPO
from tests.helpers import chain

_IMM = "import sys; sys.argv[0] = 'imm'; from imm_jax.__main__ import main; main()"


def _imm(*arguments: str, cwd: Path = REPO, **environment: str) -> subprocess.CompletedProcess:
  """The console script: unlike `python -m` it does not look into the current directory."""
  return subprocess.run([sys.executable, "-P", "-c", _IMM, *arguments], cwd=cwd, capture_output=True, text=True,
                        check=False, env=os.environ | {"PYTHONPATH": str(REPO)} | environment)


def test_the_commands_are_listed_and_a_slip_is_named():
  done = _imm("--help")
  assert done.returncode == 0
  assert all(f"\n  {name} " in done.stdout for name in commands.COMMANDS)
  done = _imm("rnu")
  assert (done.returncode, done.stderr) == (1, "error: imm has no command 'rnu'; did you mean run?\n")
  assert _imm().returncode == 1


@pytest.mark.parametrize("name", ["run", pytest.param("analyze", marks=pytest.mark.full),
                                  *(pytest.param(name, marks=pytest.mark.full) for name in commands.COMMANDS
                                    if name not in ("run", "analyze"))])
def test_help_of_a_command_shows_its_own_flags(name: str):
  done = _imm(name, "--help")
  assert done.returncode == 0, done.stderr
  assert f"\n    imm {name} " in done.stdout
  assert "--compilation_cache" in done.stdout
  assert "--logtostderr" not in done.stdout
  if name == "run":
    assert done.stdout.index("--config=") < done.stdout.index("--workdir=") < done.stdout.index("--topology=")
    assert "With several processes: their number." in done.stdout


@pytest.mark.full
@pytest.mark.parametrize("config", ["tiny", "configs/mine.py"])
def test_a_config_is_found_from_any_directory(config: str, tmp_path: Path):
  """Also where a clone called imm_jax lies in it."""
  (tmp_path / "imm_jax").mkdir()
  (tmp_path / config).parent.mkdir(exist_ok=True)
  if "mine" in config:
    (tmp_path / config).write_text("from configs import tiny\n\ndef get_config():\n  return tiny.get_config()\n")
  done = _imm("run", f"--config={config}", f"--workdir={tmp_path / 'run'}", "--dry_run", "--config.rounds=1",
              cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert "stages to do" in done.stdout


def test_own_config_file_comes_first(tmp_path: Path, monkeypatch):
  """A file of the user's counts before a name, and imports its neighbors."""
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs/arguments.py").write_text("VALUE = 7\n")
  (tmp_path / "configs/tiny.py").write_text(
      "from configs import arguments, common\n\ndef get_config():\n  config = common.get_config()\n"
      "  config.seed = arguments.VALUE\n  return config\n")
  monkeypatch.chdir(tmp_path)
  before, path = {name: module for name, module in sys.modules.items() if name.startswith("configs")}, list(sys.path)
  assert config_files.load("configs/tiny.py").seed == 7
  assert config_files.load("tiny").sft.global_batch == 20
  assert {name: module for name, module in sys.modules.items() if name.startswith("configs")} == before
  assert sys.path == path


@pytest.mark.parametrize(("name", "message"), [
    ("no/configs/tiny.py", "no such file"), ("/no/configs/qwen.py", "no such file"), ("qven", "did you mean qwen"),
    ("tiny:0.5b", "tiny takes no argument after a colon")])
def test_a_config_that_is_not_there_is_named(name: str, message: str):
  """The package's own stands in for no other folder's."""
  with pytest.raises(UserError, match=message):
    config_files.load(name)


@pytest.mark.parametrize(("text", "message"), [
    ("def get_config(:", "cannot be loaded: SyntaxError"),
    ("x = 1", "bad.py: cannot be loaded: it defines no get_config"),
    ("def get_config():\n  return 1 / 0", "bad.py:2: cannot be loaded: ZeroDivisionError"),
    ("def get_config():\n  return 3", "returns int; expected a ConfigDict")])
def test_broken_config_file_is_named(text: str, message: str, tmp_path: Path):
  """It cannot be loaded."""
  (tmp_path / "bad.py").write_text(text)
  with pytest.raises(UserError, match=message):
    config_files.load(str(tmp_path / "bad.py"))


@pytest.mark.parametrize(("text", "message"), [
    ("  common.get_config()", "its get_config() returns None; its last line should be `return config`"),
    ("  return common.getconfig()", "bad.py:3: cannot be loaded: AttributeError: module 'configs.common' has no"),
    ("  c = common.get_config()\n  c.sft.learning_rte = 1.0\n  return c", "bad.py:4: cannot be loaded: the config")],
    ids=["none", "attribute", "key"])
def test_mistakes_in_a_config_file_name_its_line(text: str, message: str, tmp_path: Path):
  (tmp_path / "bad.py").write_text(f"from configs import common\ndef get_config():\n{text}\n")
  done = subprocess.run([sys.executable, "-m", "imm_jax", "run", f"--config={tmp_path / 'bad.py'}", "--dry_run",
                         f"--workdir={tmp_path / 'run'}"], cwd=REPO, capture_output=True, text=True, check=False)
  assert done.returncode == 1
  assert message in done.stderr.splitlines()[-1]


def test_a_config_imports_files_beside_it(tmp_path: Path):
  """They hide no module that there is."""
  (tmp_path / "shared_settings.py").write_text("ROUNDS = 7\n")
  (tmp_path / "mailbox.py").write_text("raise ImportError\n")
  (tmp_path / "mine.py").write_text("import mailbox\nimport shared_settings\nfrom configs import tiny\n"
                                    "def get_config():\n  c = tiny.get_config()\n  c.rounds = shared_settings.ROUNDS\n"
                                    "  return c\n")
  before = [*sys.path]
  assert config_files.load(str(tmp_path / "mine.py")).rounds == 7
  assert sys.path == before


def test_installation_has_the_configs(tmp_path: Path):
  """It has them without the clone, too."""
  pytest.importorskip("setuptools")
  for name in ("setup.py", "configs", "imm_jax"):
    (shutil.copytree if (REPO / name).is_dir() else shutil.copy)(REPO / name, tmp_path / name)
  subprocess.run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "built")], cwd=tmp_path,
                 check=True, capture_output=True)
  built = tmp_path / "built/imm_jax"
  assert (built / "py.typed").exists()
  assert (built / "merging/__init__.pyi").exists()
  assert (built / "configs/common.py").exists()
  code = f"from imm_jax import config_files as c; assert str(c.FOLDER) == {str(built / 'configs')!r}; c.load('qwen:7b')"
  subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(built.parent)},
                 check=True)


@pytest.mark.parametrize(("error", "code"), [
    (UserError("wrong"), Exit.MISTAKE), (FileNotFoundError(errno.ENOENT, "no such file", "x"), Exit.MISTAKE),
    (ResourceError("the disk is full"), Exit.RESOURCES), (OSError(errno.ENOSPC, "full", "x"), Exit.RESOURCES),
    (chain(UserError("cannot be written"), OSError(errno.EDQUOT, "quota")), Exit.RESOURCES),
    (MemoryError(), Exit.RESOURCES), (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"), Exit.RESOURCES),
    (chain(UserError("the hub does not answer"), ConnectionResetError()), Exit.RESOURCES),
    (LostError("a process is gone"), Exit.LOST), (KeyError("x"), Exit.BUG), (RuntimeError("wrong state"), Exit.BUG)])
def test_exit_codes(error: Exception, code: Exit, capsys: pytest.CaptureFixture):
  """They tell what to retry from what to mend."""
  with pytest.raises(SystemExit) as ended:
    cli._exit_with(error)
  assert ended.value.code == code == exit_code(error)
  said = capsys.readouterr().err
  assert said.startswith("error: ") or code == Exit.BUG
  assert (len(said.splitlines()) == 1) == (code != Exit.BUG)


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (["one", "two"], 0, "one: unchanged\ntwo: unchanged"),
    (["--workdirs=one,two"], 0, "one: unchanged\ntwo: unchanged"),
    ([], 1, "error: --workdirs: names no run directory; expected: DIR DIR ..."),
    (["scores"], 1, "error: --workdirs: scores is no run directory but a result of imm evaluate; imm compare compares"),
    (["one", "--workdirs=two"], 1, "error: 'one' is given without a name, which means --workdirs, and --workdirs is")])
def test_commands_take_many_run_directories(arguments: list[str], code: int, said: str, tmp_path: Path):
  """A command takes any number of them."""
  for name in ("one", "two"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "run.json").write_text('{"stages": {}}')
    integrity.seal(tmp_path / name, "run.json", create=True)
  (tmp_path / "scores").mkdir()
  (tmp_path / "scores/scores.json").write_text("{}")
  done = _imm("verify", *arguments, cwd=tmp_path)
  assert done.returncode == code, done.stderr
  assert said in (done.stderr if code else done.stdout)


def test_status_of_each_run(tmp_path: Path):
  host = socket.gethostname()
  for name, state in (("a", "finished"), ("b", "running")):
    (tmp_path / name).mkdir()
    (tmp_path / name / "run.json").write_text('{"stages": {}}')
    (tmp_path / name / "status.json").write_text(json.dumps(
        {"plan": ["x", "y"], "state": state, "stage": "y", "pid": 1, "host": host, "updated": "today"}))
  assert _imm("status", str(tmp_path), cwd=tmp_path).stdout.splitlines() == [
      f"{tmp_path}/a: finished; 0 of 2 stages done",  # the second holds no lock
      f"{tmp_path}/b: stopped in y: process 1 on {host} was killed; last seen today; 0 of 2 stages done"]


def test_what_was_told_to_stop_is_no_error():
  assert (exit_code(KeyboardInterrupt()), exit_code(PreemptedError("told"))) == (130, 143)


@pytest.mark.parametrize(("environment", "flags", "code", "message"), [
    ({"JAX_PLATFORMS": "cuda"}, (), Exit.RESOURCES, "error: JAX_PLATFORMS=cuda: not on this machine"),
    ({}, ("--config.merge.options.densty=1",), Exit.MISTAKE, "densty'; did you mean merge.options.densities"),
    ({}, ("--rerum",), Exit.MISTAKE, "error: Unknown command line flag 'rerum'; did you mean --rerun?"),
    ({}, ("--rounds=2",), Exit.MISTAKE, "error: Unknown command line flag 'rounds'; did you mean --config.rounds?"),
    ({}, ("--config.rounds=1.5",), Exit.MISTAKE, "error: --config.rounds='1.5': expected a whole number")])
def test_failed_start_is_one_line(environment, flags, code: Exit, message: str, tmp_path: Path):
  """A command that cannot start says why."""
  done = _imm("run", "--config=tiny", f"--workdir={tmp_path / 'run'}", *flags, **environment)
  assert done.returncode == code, done.stderr
  assert message in done.stderr
  assert "Traceback" not in done.stderr


def test_every_exit_code_stands_in_the_docs():
  text = (REPO / "docs/operations.md").read_text()
  assert all(f"\n| {code:d} |" in text for code in Exit)
