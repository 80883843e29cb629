"""Estimates the memory and time that a config needs, without a GPU."""

from humanline.config import with_overrides
from humanline.planning._plan import LABELS, report
from humanline.planning._rehearsal import Estimate, rehearse

__all__ = ["LABELS", "Estimate", "rehearse", "report", "with_overrides"]
