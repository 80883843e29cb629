"""A report of runs: one HTML file, made from what the runs have written."""

from humanline.report._page import page, write_images
from humanline.report._run_log import RunLog, read_runs
from humanline.report._write import write_report

__all__ = ["RunLog", "page", "read_runs", "write_images", "write_report"]
