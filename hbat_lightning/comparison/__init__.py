"""Runs side by side: what their folders hold, as a table and as a page."""

from hbat_lightning.comparison.page import comparison_page
from hbat_lightning.comparison.runs import Run, read_runs
from hbat_lightning.comparison.table import Figure, as_csv, as_markdown, compare

__all__ = ["Figure", "Run", "as_csv", "as_markdown", "compare", "comparison_page", "read_runs"]
