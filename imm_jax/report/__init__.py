"""What came out of a run: a table for the terminal, curves, tables and a page; and several runs side by side."""

from imm_jax.report.live import Live, write
from imm_jax.report.results import Results, table

__all__ = ["Live", "Results", "table", "write"]
