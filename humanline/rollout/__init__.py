"""Engines that sample completions, and the prompts they complete."""

from humanline.rollout._connection import Stopped
from humanline.rollout._engine import Completion, TorchtuneEngine
from humanline.rollout._http_engine import HTTPEngine
from humanline.rollout._in_process import InProcessEngine
from humanline.rollout._online_source import Engine, OnlineSource
from humanline.rollout._prompts import Prompt, read_prompts
from humanline.rollout._reward import Reward, checked_scores
from humanline.rollout._sampling import SamplingParams
from humanline.rollout._token_ids import token_ids

__all__ = [
    "Completion",
    "Engine",
    "HTTPEngine",
    "InProcessEngine",
    "OnlineSource",
    "Prompt",
    "Reward",
    "SamplingParams",
    "Stopped",
    "TorchtuneEngine",
    "checked_scores",
    "read_prompts",
    "token_ids",
]
