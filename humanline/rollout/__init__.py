"""Sampling from the policy: engines, prompts, rewards, and rounds of sampled groups."""

from humanline.errors import Stopped
from humanline.rollout._connection import Connection, Gone, Refused
from humanline.rollout._engine import Completion, Engine, EngineSettings
from humanline.rollout._http_engine import HTTPEngine
from humanline.rollout._in_process import InProcessEngine
from humanline.rollout._online_source import OnlineSource
from humanline.rollout._prompts import Prompt, read_prompts
from humanline.rollout._reward import Reward, checked_scores
from humanline.rollout._round_file import dates_of_rounds
from humanline.rollout._round_plan import RoundPlan, Steps
from humanline.rollout._round_sampler import most_repeated
from humanline.rollout._sampled_source import SampledSource
from humanline.rollout._sampling import SamplingParams
from humanline.rollout._token_ids import token_ids
from humanline.rollout._torchtune_engine import TorchtuneEngine

__all__ = [
    "Completion",
    "Connection",
    "Engine",
    "EngineSettings",
    "Gone",
    "HTTPEngine",
    "InProcessEngine",
    "OnlineSource",
    "Prompt",
    "Refused",
    "Reward",
    "RoundPlan",
    "SampledSource",
    "SamplingParams",
    "Steps",
    "Stopped",
    "TorchtuneEngine",
    "checked_scores",
    "dates_of_rounds",
    "most_repeated",
    "read_prompts",
    "token_ids",
]
