"""The objectives: token log-probs in, losses and their divisors out. No I/O, no devices.

Every loss is computed from the perceived log-ratio of :meth:`PerceptualLoss.perceive`, in the paper's order.
"""

from humanline.losses._dpo import HumanlineDPOLoss
from humanline.losses._grpo import HumanlineGRPOLoss, group_advantages
from humanline.losses._kto import HumanlineKTOLoss
from humanline.losses._log_ratio import PerceptualLoss, humanline_clip, token_kl, token_log_ratio, unclamped

__all__ = [
    "HumanlineDPOLoss",
    "HumanlineGRPOLoss",
    "HumanlineKTOLoss",
    "PerceptualLoss",
    "group_advantages",
    "humanline_clip",
    "token_kl",
    "token_log_ratio",
    "unclamped",
]
