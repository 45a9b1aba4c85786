"""How processes find each other, and what is said when one is gone; real processes are in test_processes."""

import subprocess
import sys

import jax
import pytest

from imm_jax.errors import UserError
from imm_jax.runtime import distributed


@pytest.mark.parametrize(("flags", "expected"), [
    ({"coordinator": "localhost"}, "--coordinator=localhost: expected HOST:PORT"),
    ({"coordinator": "localhost:"}, "--coordinator=localhost:: expected HOST:PORT")])
def test_a_coordinator_that_is_none_is_one_line(flags, expected):
  with pytest.raises(UserError, match=expected):
    distributed.start(**flags)


@pytest.mark.parametrize("flags", ["num_processes=2", "process_id=1"])
def test_a_part_of_what_joins_processes_is_an_error(flags):
  """Or each host would do the whole run alone."""
  code = f"from imm_jax.runtime import distributed; distributed.start({flags})"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert "UserError: the processes of this run do not find each other" in done.stderr


def test_one_process_alone_joins_nobody():
  distributed.start(num_processes=1, process_id=0)
  assert jax.process_count() == 1


@pytest.mark.parametrize(("error", "expected"), [
    (UserError("the disk is full"), "the disk is full"),
    (jax.errors.JaxRuntimeError("INTERNAL: Gloo all-reduce failed: Connection closed by peer\nat line 1"),
     "another process of this run ended unexpectedly; repeat the command in all processes (INTERNAL: Gloo all-reduce")])
def test_what_all_processes_are_shown_is_one_line(error, expected):
  said = distributed._describe_error(error)
  assert expected in said
  assert "\n" not in said


def test_a_defect_is_shown_with_its_traceback():
  with pytest.raises(ZeroDivisionError) as raised:
    print(1 / 0)
  assert "Traceback" in distributed._describe_error(raised.value)


def test_an_error_right_after_the_start_is_kept(monkeypatch, tmp_path):
  """Another process may fail before process 0 goes on from the broadcast; only errors of earlier starts are removed."""
  old = tmp_path / ".run.failed-1"
  old.touch()

  def broadcast(_: int) -> int:
    assert not old.exists()
    (tmp_path / ".run.failed-2").write_text("69 process 1: the disk is full")
    return 2

  monkeypatch.setattr(distributed, "broadcast", broadcast)
  assert distributed.FailTogether(tmp_path / "run")._read_first() == (69, "process 1: the disk is full")
