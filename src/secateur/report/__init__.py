"""Reports: one self-contained HTML page, a table for the terminal, and the model card."""

from secateur.report.html import render, write_report
from secateur.report.terminal import print_report, table

__all__ = ["print_report", "render", "table", "write_report"]
