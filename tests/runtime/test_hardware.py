"""What a compute dtype of `auto` means."""

import subprocess
import sys
from pathlib import Path

import pytest

from imm_jax.runtime import hardware
from tests import REPO


@pytest.mark.parametrize("flags", ["flags : fpu avx2", "flags : fpu avx512_bf16 avx2", "Features : fp asimd bf16", ""])
def test_auto_dtype_on_cpus(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
  """It is float32 where the CPU has no products of bfloat16."""
  (tmp_path / "cpuinfo").write_text(f"model name : some\n{flags}\n\nprocessor : 1\n")
  monkeypatch.setattr(hardware, "_CPUINFO", tmp_path / "cpuinfo")
  hardware.cpu_has_bfloat16.cache_clear()
  hardware.print_once.cache_clear()
  has = "bf16" in flags
  assert hardware.compute_dtype("auto") == ("bfloat16" if has else "float32")
  assert ("compute_dtype=auto is float32 here" in capsys.readouterr().err) != has
  assert hardware.compute_dtype("auto", gpu=True) == hardware.compute_dtype("bfloat16") == "bfloat16"
  hardware.cpu_has_bfloat16.cache_clear()


def test_named_dtype_starts_no_backend() -> None:
  """Looking up a dtype by name is free."""
  program = ("from imm_jax.runtime import hardware; import jax; hardware.compute_dtype('float32'); "
             "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()")
  subprocess.run([sys.executable, "-c", program], check=True, cwd=REPO)
