"""Reports: one self-contained HTML page, tables for the terminal, and the model card."""

from secateur.report.dial import print_dial, write_dial
from secateur.report.html import render, write_report
from secateur.report.terminal import print_report, table

__all__ = ["print_dial", "print_report", "render", "table", "write_dial", "write_report"]
