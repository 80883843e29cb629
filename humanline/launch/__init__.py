"""Starts processes on every device, joins them in a group, ends them together, and locks the run's folder."""

from humanline.launch._common_end import common_end
from humanline.launch._output_folder import sole_use
from humanline.launch._parse import parse
from humanline.launch._processes import (
    check_one_process,
    hide_known_warnings,
    meeting_place,
    process_group,
    start_on_every_device,
)

__all__ = [
    "check_one_process",
    "common_end",
    "hide_known_warnings",
    "meeting_place",
    "parse",
    "process_group",
    "sole_use",
    "start_on_every_device",
]
