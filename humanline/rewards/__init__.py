"""Rewards: what scores the responses to prompts, by rule, by a reward model or by a judge.

All have the interface of `humanline.rollout.Reward`: called with prompts and with the texts of the responses to each,
they give a score for every text, higher is better. With no responses to score, a call only checks the prompts.
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
