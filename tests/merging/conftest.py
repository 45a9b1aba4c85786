"""Fixtures of the tests of recipes."""

from pathlib import Path

import pytest

from tests.merging.recipe_models import save


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
  """Two models of four layers."""
  return save(tmp_path / "a", 0), save(tmp_path / "b", 1)
