"""What came out of a run: a table for the terminal, curves and a page."""

from imm_jax.report.page import write
from imm_jax.report.results import Results, table

__all__ = ["Results", "table", "write"]
