"""Engines that sample completions, and the prompts they complete."""

from humanline.rollout._engine import Completion, TorchtuneEngine
from humanline.rollout._prompts import Prompt, read_prompts
from humanline.rollout._sampling import SamplingParams

__all__ = ["Completion", "Prompt", "SamplingParams", "TorchtuneEngine", "read_prompts"]
