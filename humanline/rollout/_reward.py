"""What scores responses."""

import logging
import math
from collections.abc import Sequence
from typing import Protocol

from humanline.errors import ConfigError, DataError, TrainingError
from humanline.rollout._prompts import Prompt

log = logging.getLogger(__name__)


class Reward(Protocol):
    """What scores the responses to prompts, higher is better.

    One that may wait for long can have a method ``stop()``, which is called in another thread when the run has been
    asked to end: what is under way then raises :class:`Stopped` soon. One with a highest possible score can name it in
    ``highest_score``: a run whose responses all have it has nothing left to learn, and ends well.
    """

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[list[float]]:
        """Scores responses; with no response to any of the prompts it only checks them, before anything is sampled.

        Args:
            prompts (Sequence[Prompt]): N prompts, whose ``fields`` hold all that their lines say.
            responses (Sequence[Sequence[str]]): N lists of texts, the responses to each prompt. A list may be empty.

        Returns:
            list[list[float]]: N lists of finite scores, one for each text.

        Raises:
            DataError: if a prompt cannot be judged, naming its line (``prompt.where``).
        """


def checked_scores(reward: Reward, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[list[float]]:
    """A reward's scores of the responses to each prompt.

    Raises:
        ConfigError: if it does not give each response one finite score.
        TrainingError: if it fails by an error of its own, whose traceback goes into the log.
    """
    where = f"at {prompts[0].where} and the {len(prompts) - 1} prompts behind it"
    try:
        found = [list(map(float, each)) for each in reward(prompts, responses)]
    except (ConfigError, DataError, TrainingError):
        raise
    except Exception as error:  # whatever somebody's own reward may raise
        log.exception(f"reward: {type(reward).__name__} failed")
        raise TrainingError(
            f"reward: {type(reward).__name__} failed {where} ({error!r}); correct the reward"
        ) from error
    if list(map(len, found)) != list(map(len, responses)) or not all(math.isfinite(s) for row in found for s in row):
        raise ConfigError(
            f"reward: {type(reward).__name__} did not give each response a finite score {where}; correct the reward"
        )
    return found
