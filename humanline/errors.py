"""The two errors a user can cause: a setting that cannot work, and data that cannot be read.

Both are raised before training starts, and both say in one line where the fault is (config key, or file and line), what
was found, and what to do about it.
"""

__all__ = ["ConfigError", "DataError"]


class ConfigError(ValueError):
    """A config key is missing, contradictory, or has a value that cannot work. The message starts with the key."""


class DataError(ValueError):
    """An example cannot be used. The message starts with the file (or dataset) and the line."""
