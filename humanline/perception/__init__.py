"""Prospect theory for language models: the value of outcomes, the perception of probabilities, and humanline sampling.

Only sampling takes part in training, as the losses' alternative to the clip. The rest is the theory behind both.
"""

from humanline.perception._bound import largest_kl, utility_gap_bound
from humanline.perception._prospect_theory import capacity, value, weighting
from humanline.perception._sampling import acceptance_probability, humanline_sample

__all__ = [
    "acceptance_probability",
    "capacity",
    "humanline_sample",
    "largest_kl",
    "utility_gap_bound",
    "value",
    "weighting",
]
