"""From a recipe's class to its run: on every device, in a folder of its own, with one line where it fails."""

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
    """FSDP2 over all ranks; otherwise one process with plain tensors."""

    def __init__(self, environment: Environment) -> None: ...

    def setup(self, cfg: DictConfig) -> None:
        """Builds all that the loop uses."""

    def train(self) -> None:
        """The loop."""

    def cleanup(self) -> None:
        """Ends what is held open, however the run ended, in its set-up too."""


def start(recipe_type: type[Recipe], cfg: DictConfig, script: str) -> None:
    """Runs a recipe on every visible device; a mistake in config or data ends it with one line instead of a traceback.

    Args:
        recipe_type (type[Recipe]): the recipe.
        cfg (DictConfig): its config.
        script (str): the recipe's file, which further processes run.
    """
    with common_end(os.path.basename(script)):
        hide_known_warnings()
        settings = Settings.from_config(cfg)
        if recipe_type.sharded:
            start_on_every_device(settings.device, script)
        elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ConfigError("nproc_per_node: this recipe is for one device; run the _distributed one on several")
        elif settings.data_parallel_replicate_dim > 1:
            raise ConfigError(
                "data_parallel_replicate_dim: this recipe has one device to put the model on; set it to 1"
            )
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
