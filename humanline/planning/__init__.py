"""What a config needs, known before a GPU is touched."""

from humanline.planning._plan import LABELS, report
from humanline.planning._rehearsal import Estimate, rehearse
from humanline.training import with_overrides

__all__ = ["LABELS", "Estimate", "rehearse", "report", "with_overrides"]
