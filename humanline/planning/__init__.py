"""What a config needs, known before a GPU is touched."""

from humanline.planning._plan import LABELS, report, with_overrides
from humanline.planning._rehearsal import Estimate, rehearse

__all__ = ["LABELS", "Estimate", "rehearse", "report", "with_overrides"]
