"""Rewards: they score responses by rule, with a reward model, or with a judge.

All implement `humanline.rollout.Reward`: called with prompts and the texts of each prompt's responses, they return one
score per text, higher is better. A call without responses only checks the prompts.
"""

from humanline.rewards._format import FormatReward, TagCountReward
from humanline.rewards._gsm8k import GSM8KReward
from humanline.rewards._judge import JudgeReward
from humanline.rewards._maths import MathReward
from humanline.rewards._open_r1 import OpenR1Reward
from humanline.rewards._samples import read_samples
from humanline.rewards._sequence_classifier import SequenceClassifierReward

__all__ = [
    "FormatReward",
    "GSM8KReward",
    "JudgeReward",
    "MathReward",
    "OpenR1Reward",
    "SequenceClassifierReward",
    "TagCountReward",
    "read_samples",
]
