"""What a step number means in a run, which a resumed run must share."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from humanline.data import Source
from humanline.models import LogProbDecoder
from humanline.reference import Reference
from humanline.training._data import Data
from humanline.training._environment import Environment


def position_of(
    cfg: DictConfig,
    environment: Environment,
    data: Data,
    source: Source,
    policy: LogProbDecoder,
    reference: Reference,
) -> dict[str, Any]:
    """Returns the settings that define which groups and updates a step number stands for."""
    settings = environment.settings
    return {
        "groups a step": source.groups_per_step,
        "groups a microbatch": settings.batch_size * environment.world_size,
        **data.date(),
        **source.position(),
        "max_steps_per_epoch": data.steps_per_epoch,
        "seed": settings.seed,
        "reference": str(cfg.reference._component_).rpartition(".")[2],
        "sync_every": reference.sync_every,
        "model": OmegaConf.to_container(cfg.model, resolve=True),
        "temperature": None if environment.temperature == 1 or data.is_sampled else environment.temperature,
        "sliding windows": policy.windows if any(policy.windows) else None,
        "loss": data.objective.settings(),
    }
