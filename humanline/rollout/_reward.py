"""What scores responses."""

import math
from collections.abc import Sequence
from typing import Protocol

from humanline.errors import ConfigError
from humanline.rollout._prompts import Prompt


class Reward(Protocol):
    """What scores the responses to prompts, higher is better. With no responses it only checks the prompts."""

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[list[float]]: ...


def checked_scores(reward: Reward, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[list[float]]:
    """A reward's scores of the responses to each prompt.

    Raises:
        ConfigError: if it does not give each response one finite score.
    """
    found = [list(map(float, each)) for each in reward(prompts, responses)]
    if list(map(len, found)) != list(map(len, responses)) or not all(math.isfinite(s) for row in found for s in row):
        raise ConfigError(
            f"reward: {type(reward).__name__} did not give each response a finite score at {prompts[0].where} and the "
            f"{len(prompts) - 1} prompts behind it; correct the reward"
        )
    return found
