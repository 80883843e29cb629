"""The interface of rewards, and the check of their scores."""

import logging
import math
from collections.abc import Sequence
from typing import Protocol

from humanline.errors import ConfigError, DataError, TrainingError
from humanline.rollout._prompts import Prompt

log = logging.getLogger(__name__)


class Reward(Protocol):
    """Scores the responses to prompts; higher is better.

    A slow reward can have a method ``stop()``. It is called from another thread when the run must end, and the call in
    progress then raises :class:`Stopped` soon. A reward with a highest possible score can set it as ``highest_score``.
    A run in which all responses have this score has solved its prompts, and ends successfully.
    """

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[list[float]]:
        """Scores responses. Before sampling it is called without any response, to check the prompts.

        Args:
            prompts (Sequence[Prompt]): N prompts. ``messages`` is the chat that was sampled from, with the system
                prompt; ``fields`` holds all fields of a prompt's line.
            responses (Sequence[Sequence[str]]): N lists of texts, the responses to each prompt; a list may be empty.

        Returns:
            list[list[float]]: N lists of finite scores, one score for each text.

        Raises:
            DataError: if the responses to a prompt cannot be scored, naming its line (``prompt.where``).
        """


def checked_scores(reward: Reward, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[list[float]]:
    """Returns the reward's scores, checked: one finite score for each response.

    Raises:
        ConfigError: if the reward does not return one finite score for each response.
        TrainingError: if the reward raises any other exception; its traceback is logged.
    """
    where = f"for {prompts[0].where} and the next {len(prompts) - 1} prompts"
    try:
        found = [list(map(float, each)) for each in reward(prompts, responses)]
    except (ConfigError, DataError, TrainingError):
        raise
    except Exception as error:  # a user's reward may raise anything
        log.exception(f"reward: {type(reward).__name__} failed")
        raise TrainingError(
            f"reward: {type(reward).__name__} failed {where} ({error!r}); correct the reward"
        ) from error
    if list(map(len, found)) != list(map(len, responses)) or not all(math.isfinite(s) for row in found for s in row):
        raise ConfigError(
            f"reward: {type(reward).__name__} did not return one finite score per response {where}; correct the reward"
        )
    return found
