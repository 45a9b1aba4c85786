"""Fixtures of the tests of reports."""

from pathlib import Path

import pytest

from tests import report_runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run directory that nobody writes to."""
  return report_runs.make(tmp_path_factory.mktemp("runs") / "imm")
