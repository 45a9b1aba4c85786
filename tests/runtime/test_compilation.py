"""Compiled programs that are kept: a second process compiles nothing, and no entry is ever read in part."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from jax._src.lru_cache import LRUCache

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


@pytest.mark.full
def test_second_run_compiles_nothing(tmp_path: Path) -> None:
  """Several runs at once agree."""
  first = [_start(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
  values = [_said(process)[0] for process in first]
  folder, = (tmp_path / "imm_jax").iterdir()
  entries = sorted(folder.glob("*-cache"))
  assert entries
  assert not list(folder.glob(".part-*"))
  value, hits, misses = _said(_start(XDG_CACHE_HOME=str(tmp_path)))
  assert [value, value] == values
  assert (hits > 0, misses) == (True, 0)
  # What cannot be read is compiled again, once.
  for path in entries:
    path.write_bytes(path.read_bytes()[:50])
  assert _said(_start(XDG_CACHE_HOME=str(tmp_path)))[:2] == (value, 0)
  assert _said(_start(XDG_CACHE_HOME=str(tmp_path))) == (value, hits, 0)


def test_a_setting_turns_it_off_and_another_moves_it(tmp_path: Path) -> None:
  off = _start("--compilation_cache=off", XDG_CACHE_HOME=str(tmp_path / "user"))
  moved = _start(f"--compilation_cache={tmp_path / 'mine'}", XDG_CACHE_HOME=str(tmp_path / "user"))
  beside_adapters = _start(IMM_JAX_CACHE=str(tmp_path / "all"), XDG_CACHE_HOME=str(tmp_path / "user"))
  assert _said(off)[1] == 0
  _said(moved)
  _said(beside_adapters)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "mine"]


def test_least_recently_used_entries_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """They go when there is too much."""
  for age, name in enumerate(("new", "old", "older")):
    (tmp_path / f"{name}-cache").write_bytes(b"x" * 10)
    os.utime(tmp_path / f"{name}-cache", (1000 - age, 1000 - age))
  for name in ("get", "put"):  # put back afterwards
    monkeypatch.setattr(LRUCache, name, getattr(LRUCache, name))
  compilation._change_jax()
  assert LRUCache(str(tmp_path), max_size=-1).get("older") == b"x" * 10
  monkeypatch.setattr(compilation, "_MAX_BYTES", 15)
  compilation._prune(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["older-cache"]


def test_what_a_killed_process_was_writing_goes(tmp_path: Path) -> None:
  for name, age in (("killed", 7200), ("writing", 5)):
    (tmp_path / f".part-{name}").write_bytes(b"x")
    os.utime(tmp_path / f".part-{name}", (time.time() - age,) * 2)
  compilation._prune(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == [".part-writing"]


@pytest.mark.parametrize(("mode", "group", "kept"), [
    (0o777, 0, False), (0o1777, 0, False), (0o775, 1, False), (0o775, 0, True), (0o755, 1, True), (0o700, 0, True)])
def test_writable_cache_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], mode: int, group: int,
    kept: bool) -> None:
  """A folder that others can write to is not used."""
  tmp_path.chmod(mode)
  monkeypatch.setattr(os, "getegid", lambda: tmp_path.stat().st_gid + group)
  assert compilation._is_writable_by_others(tmp_path) is not kept
  if mode == 0o777:
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")  # put back afterwards
    before = jax.config.jax_enable_compilation_cache
    try:
      assert compilation.enable_cache(str(tmp_path)) is None
      assert not jax.config.jax_enable_compilation_cache
    finally:
      jax.config.update("jax_enable_compilation_cache", before)
    assert f"other users can write to {tmp_path}" in "".join(capfd.readouterr())
