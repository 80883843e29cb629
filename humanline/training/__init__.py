"""What the recipes share: settings, launch, models, the loop, checkpoints, metrics."""

from humanline.training._keys import check_keys, one_of
from humanline.training._launch import hide_known_warnings
from humanline.training._lr_schedule import get_constant_schedule_with_warmup
from humanline.training._objectives import DPO, GRPO, KTO, Objective
from humanline.training._output_file import write_json, write_jsonl
from humanline.training._partial_file import PartialFile
from humanline.training._recipe import HumanlineRecipe, run
from humanline.training._sampler import Sampler
from humanline.training._scored_rows import score_sources, scored_rows
from humanline.training._settings import Settings, component
from humanline.training._stochastic_adamw import StochasticAdamW, stochastic_round
from humanline.training._weights import read_weights

__all__ = [
    "DPO",
    "GRPO",
    "HumanlineRecipe",
    "KTO",
    "Objective",
    "PartialFile",
    "Sampler",
    "Settings",
    "StochasticAdamW",
    "check_keys",
    "component",
    "get_constant_schedule_with_warmup",
    "hide_known_warnings",
    "one_of",
    "read_weights",
    "run",
    "score_sources",
    "scored_rows",
    "stochastic_round",
    "write_json",
    "write_jsonl",
]
