"""What a config needs, known before a GPU is touched."""

from humanline.planning._rehearsal import Estimate, rehearse

__all__ = ["Estimate", "rehearse"]
