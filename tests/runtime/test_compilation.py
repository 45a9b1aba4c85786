"""Compiled programs that are kept: a second process compiles nothing, and no entry is ever read in part."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from imm_jax.runtime import compilation
from tests import REPO

_PROGRAM = """
import jax
from absl import app
from imm_jax import cli; from imm_jax.runtime import compilation
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name.rpartition("/")[2]))
compilation._MIN_SECONDS = 0.0
def main():
  value = jax.jit(lambda x: (x @ x.T).sum())(jax.numpy.arange(12.0).reshape(3, 4))
  print(float(value), found.count("cache_hits"), found.count("cache_misses"))
cli.run(main)
"""


def _start(*flags: str, **variables: str) -> subprocess.Popen[str]:
  clean = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
  return subprocess.Popen([sys.executable, "-c", _PROGRAM, *flags], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env={**clean, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu",
                                                       **variables})


def _said(process: subprocess.Popen[str]) -> tuple[float, int, int]:
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  value, hits, misses = out.split()
  return float(value), int(hits), int(misses)


def test_a_second_run_compiles_nothing_and_several_at_once_agree(tmp_path: Path) -> None:
  first = [_start(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
  values = [_said(process)[0] for process in first]
  folder, = (tmp_path / "imm_jax").iterdir()
  entries = sorted(folder.glob("*-cache"))
  assert entries
  assert not list(folder.glob(".part-*"))
  value, hits, misses = _said(_start(XDG_CACHE_HOME=str(tmp_path)))
  assert [value, value] == values
  assert (hits > 0, misses) == (True, 0)
  # What cannot be read is compiled again.
  for path in entries:
    path.write_bytes(path.read_bytes()[:50])
  assert _said(_start(XDG_CACHE_HOME=str(tmp_path)))[:2] == (value, 0)


def test_a_setting_turns_it_off_and_another_moves_it(tmp_path: Path) -> None:
  off = _start("--compilation_cache=off", XDG_CACHE_HOME=str(tmp_path / "user"))
  moved = _start(f"--compilation_cache={tmp_path / 'mine'}", XDG_CACHE_HOME=str(tmp_path / "user"))
  assert _said(off)[1] == 0
  _said(moved)
  assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_oldest_entries_go_when_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  for age, name in enumerate(("new", "old", "older")):
    (tmp_path / f"{name}-cache").write_bytes(b"x" * 10)
    os.utime(tmp_path / f"{name}-cache", (1000 - age, 1000 - age))
  monkeypatch.setattr(compilation, "_MAX_BYTES", 15)
  compilation._prune(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["new-cache"]
