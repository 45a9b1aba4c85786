"""status.json and log.txt after every end of a run."""

import fcntl
import json
import logging
import sys
from pathlib import Path

import pytest

from imm_jax.errors import PreemptedError, UserError
from imm_jax.runs import runlog, status
from imm_jax.runtime import progress


@pytest.mark.parametrize(("error", "state", "why", "logged"), [
    (None, "finished", "", None),
    (UserError("no room"), "failed", "no room", "ERROR error: no room"),
    (PreemptedError("terminated by SIGTERM"), "stopped", "terminated by SIGTERM", "WARNING terminated by SIGTERM"),
    (KeyboardInterrupt(), "stopped", "interrupted (Ctrl-C)", "WARNING interrupted (Ctrl-C)"),
    (ZeroDivisionError("a bug"), "failed", "ZeroDivisionError: a bug", "ERROR error: ZeroDivisionError('a bug')")],
    ids=["finished", "error", "preempted", "interrupted", "bug"])
def test_after_every_end_the_files_say_which(error: BaseException | None, state: str, why: str, logged: str | None,
                                             tmp_path: Path):

  def run() -> None:
    with runlog.RunLog() as log, status.StatusWriter(tmp_path, ["a", "b"]) as writer:
      log.open(tmp_path / runlog.FILE)
      writer.set_stage("b")
      assert json.loads((tmp_path / status.FILE).read_text())["state"] == "running"
      if error:
        raise error

  if error:
    with pytest.raises(type(error)):
      run()
  else:
    run()
  found = status.read(tmp_path)
  assert (found.plan, found.state, found.why, found.stage) == (("a", "b"), state, why, "b")
  lines = (tmp_path / runlog.FILE).read_text().splitlines()
  assert (lines[0].split(" ", 1)[1] == logged) if logged else not lines
  assert ("Traceback (most recent call last):" in lines) == isinstance(error, ZeroDivisionError)


def test_dead_and_locked_runs(tmp_path: Path):
  """A process that is gone was killed, and one that has the lock runs."""
  with status.StatusWriter(tmp_path, ["a"]) as writer:
    writer.set_stage("a")
    written = (tmp_path / status.FILE).read_text()
  (tmp_path / status.FILE).write_text(written)  # as a killed process leaves it
  found = status.read(tmp_path)
  assert found.state == "stopped"
  assert "was killed; last seen 20" in found.why
  assert status.format_line(found).startswith("stopped in a: process ")
  (tmp_path / status.FILE).write_text(json.dumps(json.loads(written) | {"host": "elsewhere"}))
  assert status.read(tmp_path).state == "running"  # whose lock is not seen here, and that has written just now
  old = {"host": "elsewhere", "updated": "2020-01-01T00:00:00+00:00"}
  (tmp_path / status.FILE).write_text(json.dumps(json.loads(written) | old))
  assert status.read(tmp_path).state == "stopped"
  with (tmp_path / ".lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert status.read(tmp_path).state == "running"
  for updated in ("", "2020-01-01T00:00:00", "0001-01-01T00:00:00", "long ago"):  # of nobody who writes still
    (tmp_path / status.FILE).write_text(json.dumps(json.loads(written) | {"host": "elsewhere", "updated": updated}))
    assert status.read(tmp_path).state == "stopped"
  for damage in ("{", "[]", '{"plan": 3}', '{"plan": [3]}', '{"plan": ["a"], "state": 1}'):
    (tmp_path / status.FILE).write_text(damage)
    assert status.read(tmp_path) == status.Status()


@pytest.mark.parametrize("last", ["finished", "running"])
def test_change_between_looks_is_no_kill(last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  """A run that ends or begins between two looks was not killed."""
  with status.StatusWriter(tmp_path, ["a"]):
    running = json.loads((tmp_path / status.FILE).read_text())
  looks = []

  def look(_: Path) -> bool:
    looks.append(1)
    (tmp_path / status.FILE).write_text(json.dumps(running | {"state": last}))
    return last == "running" and len(looks) > 1

  (tmp_path / status.FILE).write_text(json.dumps(running))
  monkeypatch.setattr(status, "is_running", look)
  assert status.read(tmp_path).state == last


def test_log_has_no_progress_bars(tmp_path: Path, capfd: pytest.CaptureFixture):
  """It has lines and records."""
  for _ in range(2):  # a start that goes on appends
    with runlog.RunLog() as log:
      print("early")
      log.open(tmp_path / runlog.FILE)
      with progress.make_bar(3, "work", "step") as bar:
        for _ in range(3):
          bar.update()
          bar.refresh()
          print("note: between", end="", file=sys.stderr)
          print(" bars", file=sys.stderr)
      logging.getLogger("orbax").warning("of a\nlibrary")
      runlog.log_line("for the log alone")
  print("afterwards")
  lines = (tmp_path / runlog.FILE).read_text().splitlines()
  said = ["INFO early", *["INFO note: between bars"] * 3, "WARNING orbax: of a", "library",
          "INFO for the log alone"]
  assert [line if line == "library" else line.split(" ", 1)[1] for line in lines] == said * 2
  assert lines[0][:2] == "20"
  assert lines[0][10] == "T"
  console = capfd.readouterr()
  assert "early" in console.out
  assert "note: between bars" in console.err
  assert "for the log alone" not in console.out + console.err


def test_a_log_that_cannot_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture):
  with runlog.RunLog() as log:
    log.open(tmp_path / "none" / runlog.FILE)
  assert f"warning: {tmp_path / 'none' / runlog.FILE} cannot be written (No such file" in capsys.readouterr().err
