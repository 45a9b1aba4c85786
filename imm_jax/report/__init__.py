"""Reports the results of a run as a table for the terminal, plots and a page, and compares several runs."""

from imm_jax.report.live import Live, write
from imm_jax.report.results import Results, format_table

__all__ = ["Live", "Results", "format_table", "write"]
