"""The decorator of a recipe's main function."""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig

from humanline.config import read_config
from humanline.launch._common_end import common_end
from humanline.launch._processes import hide_known_warnings


def parse(recipe_main: Callable[[DictConfig], Any]) -> Callable[[], Any]:
    """Decorates a recipe's main function, which then gets its config from the command line.

    torchtune's ``config.parse`` reads the same command lines, but prints a traceback for a wrong one. A mistake on one
    rank alone, such as a file that is missing on one node, ends all ranks.
    """

    @functools.wraps(recipe_main)
    def main() -> Any:
        hide_known_warnings()
        with common_end(os.path.basename(sys.argv[0])):
            cfg = read_config(sys.argv[1:])
        sys.exit(recipe_main(cfg))

    return main
