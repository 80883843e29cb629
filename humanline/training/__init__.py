"""The parts of a training recipe: run, data, models and metrics, with the names that it imports from other packages."""

from humanline.config import Settings, component
from humanline.launch import parse
from humanline.optim import StochasticAdamW, clip_gradients, get_constant_schedule_with_warmup, lr_schedule
from humanline.training._data import Data
from humanline.training._environment import Environment
from humanline.training._held_out import HeldOut
from humanline.training._initial_model import InitialModel
from humanline.training._metrics import Metrics, likelier_best, perception_metrics
from humanline.training._objectives import DPO, GRPO, KTO, Objective
from humanline.training._passes import Passes
from humanline.training._run import Run
from humanline.training._start import Recipe, start

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
    "Passes",
    "Recipe",
    "Run",
    "Settings",
    "StochasticAdamW",
    "clip_gradients",
    "component",
    "get_constant_schedule_with_warmup",
    "likelier_best",
    "lr_schedule",
    "parse",
    "perception_metrics",
    "start",
]
