"""Tests, laid out as the package is; `runs` holds those of whole runs."""

from pathlib import Path

REPO = Path(__file__).parent.parent
TINY = REPO / "imm_jax/assets/tiny"
