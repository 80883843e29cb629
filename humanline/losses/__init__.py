"""The objectives: token log-probs in, losses out. No I/O, no devices, no process groups.

Every loss is computed from the clipped log-ratio of :func:`humanline_clip`, in the order in which the paper states it.
"""

from humanline.losses._clip import humanline_clip, token_log_ratio, unclamped
from humanline.losses._dpo import HumanlineDPOLoss

__all__ = ["HumanlineDPOLoss", "humanline_clip", "token_log_ratio", "unclamped"]
