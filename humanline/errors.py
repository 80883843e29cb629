"""The errors that end a run with one line instead of a traceback.

The two that a user can cause are raised before training starts, and say where the fault is (config key, or file and
line), what was found, and what to do about it.
"""

__all__ = ["ConfigError", "DataError", "Stopped", "TrainingError"]


class ConfigError(ValueError):
    """A config key is missing, contradictory, or has a value that cannot work. The message starts with the key."""


class DataError(ValueError):
    """An example cannot be used. The message starts with the file (or dataset) and the line."""


class TrainingError(RuntimeError):
    """Training has to stop. The message says at which step, why, and what it left to go on from."""


class Stopped(TrainingError):
    """Sampling, scoring or waiting was ended from outside, because the run has been asked to stop."""
