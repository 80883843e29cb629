"""What a step number means in a run, which a resumed run must share."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from humanline.config import values_of
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
        "reference's settings": _own_settings(cfg.reference),
        "model": OmegaConf.to_container(cfg.model, resolve=True),
        "temperature": None if environment.temperature == 1 or data.is_sampled else environment.temperature,
        "sliding windows": policy.windows if any(policy.windows) else None,
        "loss": data.objective.settings(),
    }


def _own_settings(strategy: DictConfig) -> dict[str, Any] | None:
    """Returns a user's settings of a strategy; None without any. Where a cache lies changes nothing."""
    known = {"_component_", "sync_every", "cache_dir"}
    return {str(name): value for name, value in values_of(strategy).items() if name not in known} or None
