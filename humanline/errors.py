"""Errors that end a run with one line instead of a traceback.

``ConfigError`` and ``DataError`` are raised before training starts. Their messages name the place of the fault (config
key, or file and line), what was found, and what to do.
"""

__all__ = ["ConfigError", "DataError", "Stopped", "TrainingError"]


class ConfigError(ValueError):
    """A config key is missing, contradicts another, or has an invalid value. The message starts with the key."""


class DataError(ValueError):
    """An example cannot be used. The message starts with the file (or dataset) and the line."""


class TrainingError(RuntimeError):
    """Training has to stop. The message names the step, the reason, and the checkpoint to resume from."""


class Stopped(TrainingError):
    """The run was asked to stop while it was sampling, scoring or waiting."""
