"""What the recipes use: settings, launch, data, models, the run around the loop, checkpoints, metrics."""

from torchtune.utils import get_logger

from humanline.training._command_line import load_config, parse, with_overrides
from humanline.training._common_end import common_end
from humanline.training._component import component
from humanline.training._data import Data
from humanline.training._environment import Environment
from humanline.training._gradients import clip_gradients
from humanline.training._held_out import HeldOut
from humanline.training._initial_model import InitialModel
from humanline.training._keys import check_keys, one_of
from humanline.training._launch import check_one_process, hide_known_warnings
from humanline.training._lr_schedule import get_constant_schedule_with_warmup, lr_schedule
from humanline.training._metrics import Metrics, likelier_best, perception_metrics
from humanline.training._objectives import DPO, GRPO, KTO, Objective
from humanline.training._output_file import write_json, write_jsonl
from humanline.training._partial_file import PartialFile
from humanline.training._run import Run
from humanline.training._sampler import Sampler
from humanline.training._scored_rows import score_sources, scored_rows
from humanline.training._settings import Settings
from humanline.training._start import Recipe, start
from humanline.training._stochastic_adamw import StochasticAdamW, stochastic_round
from humanline.training._weights import read_weights

__all__ = [
    "DPO",
    "Data",
    "Environment",
    "GRPO",
    "HeldOut",
    "InitialModel",
    "KTO",
    "Metrics",
    "Objective",
    "PartialFile",
    "Recipe",
    "Run",
    "Sampler",
    "Settings",
    "StochasticAdamW",
    "check_keys",
    "check_one_process",
    "clip_gradients",
    "common_end",
    "component",
    "get_constant_schedule_with_warmup",
    "get_logger",
    "hide_known_warnings",
    "likelier_best",
    "load_config",
    "lr_schedule",
    "one_of",
    "parse",
    "perception_metrics",
    "read_weights",
    "score_sources",
    "scored_rows",
    "start",
    "stochastic_round",
    "with_overrides",
    "write_json",
    "write_jsonl",
]
