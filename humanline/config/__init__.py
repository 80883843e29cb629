"""Reads a run's config from a file and a command line, checks it, and builds its components."""

from humanline.config._component import accepts, check_component, component, is_given, listed
from humanline.config._config_file import load_config, read_config, with_overrides
from humanline.config._dated import date_is_open, dated_component, today
from humanline.config._keys import check_keys, one_of
from humanline.config._missing_package import missing_package
from humanline.config._settings import COMPONENTS, DTYPES, Settings, values_of

__all__ = [
    "COMPONENTS",
    "DTYPES",
    "Settings",
    "accepts",
    "check_component",
    "check_keys",
    "component",
    "date_is_open",
    "dated_component",
    "is_given",
    "listed",
    "load_config",
    "missing_package",
    "one_of",
    "read_config",
    "today",
    "values_of",
    "with_overrides",
]
