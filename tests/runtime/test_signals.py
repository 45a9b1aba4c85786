"""SIGTERM and Ctrl-C in whatever a process is doing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imm_jax.training import preemption
from tests import REPO

_BEGIN = """
import hashlib, sys, time
from imm_jax import errors; from imm_jax.runtime import signals
signals.GRACE_S = 0.5
signals.install_handlers()
def said(work):
  try:
    work()
  except errors.PreemptedError as e:
    print(e)
    sys.exit(143)
with signals.call_before_exit(lambda why: print("last", why, flush=True)):
  print("ready", flush=True)
"""
_SLEEPS = "  said(lambda: time.sleep(60))"
# Python's handlers do not run as long as the main thread is in C.
_COMPUTES = "  said(lambda: hashlib.pbkdf2_hmac('sha256', b'a', b'b', 1 << 30))"
# What is raised in a destructor is printed and forgotten.
_LOSES = """
  signals.GRACE_S = 60
  class A:
    def __del__(self):
      time.sleep(0.4)
  said(lambda: [A() for _ in range(2)] and time.sleep(60))"""
_HANGS = """
  signals.GRACE_S = 60
  try:
    time.sleep(60)
  except errors.PreemptedError:
    time.sleep(60)"""


@pytest.mark.parametrize(("work", "numbers", "expected"), [
    (_SLEEPS, [signal.SIGTERM], "terminated by SIGTERM; repeat the command to resume"),
    (_SLEEPS, [signal.SIGTERM] * 2, "terminated by SIGTERM; repeat the command to resume"),  # as `timeout` sends them
    (_COMPUTES, [signal.SIGTERM], "last terminated by SIGTERM while it was busy"),
    (_LOSES, [signal.SIGTERM], "terminated by SIGTERM; repeat the command to resume"),
    (_HANGS, [signal.SIGTERM, None, signal.SIGTERM], "last terminated by a second SIGTERM"),
], ids=["sleeps", "twice", "computes", "loses", "hangs"])
def test_a_process_that_is_terminated_ends_soon(work: str, numbers: list[int | None], expected: str):
  with subprocess.Popen([sys.executable, "-c", _BEGIN + work], cwd=REPO, text=True, stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE) as process:
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    began = time.monotonic()
    for number in numbers:
      time.sleep(1.1) if number is None else process.send_signal(number)
    out, err = process.communicate(timeout=30)
  assert process.returncode == 143, err
  assert time.monotonic() - began < 8
  assert expected in out
  assert err.count("SIGTERM: stopping") <= 1
  assert "Traceback" not in err


_BLOCKED = '''
  read, write = os.pipe()
  os.dup2(write, 2)  # a pipe that nobody reads, and that is full
  os.set_blocking(2, False)
  try:
    while os.write(2, bytes(1 << 16)):
      pass
  except BlockingIOError:
    os.set_blocking(2, True)
  said(lambda: print("full", flush=True) or hashlib.pbkdf2_hmac('sha256', b'a', b'b', 1 << 30))'''
_STUCK = '''
  signals._last_calls.insert(0, lambda why: time.sleep(60))
  said(lambda: print("full", flush=True) or hashlib.pbkdf2_hmac('sha256', b'a', b'b', 1 << 30))'''


@pytest.mark.full
@pytest.mark.parametrize("work", [_BLOCKED, _STUCK], ids=["stderr", "status"])
def test_what_blocks_does_not_keep_a_process_alive(work: str):
  with subprocess.Popen([sys.executable, "-c", "import os" + _BEGIN + work], cwd=REPO, text=True,
                        stdout=subprocess.PIPE) as process:
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "full\n"]
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    try:
      assert process.wait(timeout=30) == 143
    finally:
      process.kill()


def test_interrupt_without_signal_keeps_watch():
  """An interrupt without a signal leaves the watch alive."""
  work = '''
  class A:
    def __del__(self):
      raise KeyboardInterrupt
  A()
  signal_ = __import__("signal")
  signal_.signal(signal_.SIGCHLD, lambda *_: None)
  signal_.raise_signal(signal_.SIGCHLD)  # wakes the watch
  time.sleep(0.2)
  said(lambda: print("watches", signals._interrupt_lost.is_set(), flush=True) or hashlib.pbkdf2_hmac(
      'sha256', b'a', b'b', 1 << 30))'''
  with subprocess.Popen([sys.executable, "-c", _BEGIN + work], cwd=REPO, text=True, stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE) as process:
    try:
      assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "watches False\n"]
      time.sleep(0.1)
      process.send_signal(signal.SIGTERM)
      _, err = process.communicate(timeout=30)
    finally:
      process.kill()
  assert process.returncode == 143, err
  assert "Traceback" not in err


def test_late_signal_is_answered_afterwards():
  """A signal that comes too late for a block is answered after it."""
  heard = []
  before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
  try:
    with preemption.watch() as told:
      os.kill(os.getpid(), signal.SIGTERM)
      assert told.wait(5)
      assert not heard
    assert heard == [1]
  finally:
    signal.signal(signal.SIGTERM, before)


_IMPORTS = """
import sys
from imm_jax import __main__ as commands
commands.COMMANDS["merge"] = ("slow_command", "")
sys.argv = ["imm", "merge"]
commands.main()
"""
# As libraries do: an interrupt comes out as another error.
_SLOW = """
import signal, time
print(int(signal.getsignal(signal.SIGINT) == signal.SIG_IGN), flush=True)
try:
  time.sleep({seconds})
except BaseException as e:
  raise ImportError("cannot import") from e
"""
_RUNS = """
import time
from imm_jax import cli
cli.run(lambda: print("runs", flush=True) or time.sleep(60), resumes={resumes})
"""


def _interrupt(module: str, folder: Path, *, before: str = "") -> tuple[int, str, str]:
  """Interrupts a command once it has printed a line; returns exit code, that line and stderr."""
  (folder / "slow_command.py").write_text(module)
  command = ["sh", "-c", f'{before} exec "$@"', "sh", sys.executable, "-c", _IMPORTS]
  with subprocess.Popen(command, cwd=REPO, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                        env=os.environ | {"PYTHONPATH": f"{REPO}:{folder}"}) as process:
    said = process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
  return process.returncode, said, err


def test_interrupted_import_is_one_line(tmp_path: Path):
  """An interrupt while a command is imported is one line."""
  code, _, err = _interrupt(_SLOW.format(seconds=60), tmp_path)
  assert (code, err) == (130, "\ninterrupted\n")


def test_an_interrupt_that_is_ignored_stays_so(tmp_path: Path):
  code, said, err = _interrupt(_SLOW.format(seconds=0.6), tmp_path, before="trap '' INT;")
  assert (code, said, err) == (0, "1\n", "")


@pytest.mark.parametrize(("resumes", "hint"), [(True, "to resume"), (False, "to start over")])
def test_interrupted_command_tells_resumption(resumes: bool, hint: str, tmp_path: Path):
  """It says whether it goes on where it was."""
  code, _, err = _interrupt(_RUNS.format(resumes=resumes), tmp_path)
  assert (code, err) == (130, f"\ninterrupted; repeat the command {hint}\n")
