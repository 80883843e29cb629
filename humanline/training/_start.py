"""Starts a recipe on every device, with exclusive use of its folder and one-line errors."""

import os
from typing import Protocol

from omegaconf import DictConfig

from humanline.config import Settings
from humanline.errors import ConfigError
from humanline.launch import common_end, hide_known_warnings, process_group, sole_use, start_on_every_device
from humanline.training._environment import Environment


class Recipe(Protocol):
    """A training recipe."""

    sharded: bool
    """Whether the model is sharded over all ranks with FSDP2; else one process with plain tensors."""

    def __init__(self, environment: Environment) -> None: ...

    def setup(self, cfg: DictConfig) -> None:
        """Builds the objects that the loop uses."""

    def train(self) -> None:
        """Runs the loop."""

    def cleanup(self) -> None:
        """Closes open resources, however the run ended; ``setup`` may have failed."""


def start(recipe_type: type[Recipe], cfg: DictConfig, script: str) -> None:
    """Runs a recipe on every visible device. An error in config or data ends it with one line instead of a traceback.

    Args:
        recipe_type (type[Recipe]): the recipe.
        cfg (DictConfig): its config.
        script (str): the recipe's file, which the additional processes run.
    """
    with common_end(os.path.basename(script)):
        hide_known_warnings()
        settings = Settings.from_config(cfg)
        if recipe_type.sharded:
            start_on_every_device(settings.device, script)
        elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ConfigError(
                "nproc_per_node: this recipe needs exactly one process; use the _distributed recipe for more"
            )
        elif settings.data_parallel_replicate_dim > 1:
            raise ConfigError("data_parallel_replicate_dim: expected 1, since this recipe uses one device; set it to 1")
        with (
            process_group(settings.torch_device),
            sole_use(settings.output_dir, settings.resume_from_checkpoint) as folder,
        ):
            recipe = recipe_type(Environment.of(cfg, sharded=recipe_type.sharded, restarted=folder.restarted))
            try:
                recipe.setup(cfg)
                folder.accept()
                recipe.train()
            finally:
                recipe.cleanup()
