"""The day that chat templates read: it is fixed where a run begins, and a run that resumes on another day keeps it."""

from typing import Any

from omegaconf import DictConfig
from torchtune.utils import get_logger, log_rank_zero

from humanline.config._component import accepts, check_component, component, is_given
from humanline.config._config_file import with_overrides
from humanline.data import read_day
from humanline.errors import ConfigError

log = get_logger("INFO")


def today() -> str:
    """Returns the current day, such as "2026-01-31"."""
    return read_day("today", None).date().isoformat()


def date_is_open(cfg: DictConfig, key: str) -> bool:
    """Returns whether the component of a config key has an argument ``date`` that the config leaves open."""
    return is_given(cfg, key) and cfg[key].get("date") is None and accepts(cfg, key, "date")


def dated_component(cfg: DictConfig, key: str, begun: str) -> Any:
    """Builds the component of a config key, with the day on which the run began if the config leaves its date open.

    Args:
        cfg (DictConfig): the whole config.
        key (str): the component's key.
        begun (str): the day. If it is past, and the component reads it (its attribute ``date``), a log line names it.

    Returns:
        Any: the component; None if the key is absent or null.

    Raises:
        ConfigError: as :func:`component`, or if the config sets a date that the component does not read.
    """
    check_component(cfg, key)
    if not date_is_open(cfg, key):
        built = component(cfg, key)
        if built is not None and cfg[key].get("date") is not None and getattr(built, "date", "") is None:
            reads = (
                "; if it reads date_string, set tokenizer.chat_template_kwargs instead" if key == "tokenizer" else ""
            )
            raise ConfigError(
                f"{key}.date: the chat template does not read the date of the run (strftime_now); remove it{reads}"
            )
        return built
    built = component(with_overrides(cfg, [f"{key}.date='{begun}'"]), key)
    if getattr(built, "date", None) == begun != today():
        log_rank_zero(log, f"{key}.date: {begun}, the day on which the run began")
    return built
