import math
from collections.abc import Callable

from humanline.errors import ConfigError


def check_number(key: str, value: object, holds: Callable[[float], bool], rule: str) -> None:
    """Raises ConfigError, naming ``loss.key``, unless ``value`` is a finite number for which ``holds`` is true."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not holds(value):
        raise ConfigError(f"loss.{key}: got {value!r}, expected a number {rule}")


def check_bounds(log_eps_P: float | None, log_eps_R: float | None) -> None:
    """Raises ConfigError unless ``log_eps_P <= 0 <= log_eps_R``; either may be None, which sets no bound."""
    logarithm = "bounds are logarithms: a ratio of 0.8 is -0.22; null sets no bound"
    if log_eps_P is not None:
        check_number("log_eps_P", log_eps_P, lambda bound: bound <= 0, f"of at most 0 nats ({logarithm})")
    if log_eps_R is not None:
        check_number("log_eps_R", log_eps_R, lambda bound: bound >= 0, f"of at least 0 nats ({logarithm})")
    if log_eps_P == log_eps_R == 0:
        raise ConfigError("loss.log_eps_P: 0 with log_eps_R: 0 clips everything; the paper's values are -1.5 and 1.5")


def check_perception(
    perception: str, log_eps_P: float | None, log_eps_R: float | None, gamma_P: float | None, gamma_R: float | None
) -> None:
    """Raises ConfigError if ``perception`` is unknown, or a gamma is missing, out of range or without effect."""
    if perception not in ("clip", "sample", "none"):
        raise ConfigError(f"loss.perception: expected clip, sample or none, got {perception!r}")
    if perception == "sample" and log_eps_P is None and log_eps_R is None:
        raise ConfigError(
            "loss.perception: sample rejects nothing without bounds; set log_eps_P or log_eps_R, or set "
            "perception: none"
        )
    for side, bound, gamma in (("P", log_eps_P, gamma_P), ("R", log_eps_R, gamma_R)):
        if perception == "sample" and bound is not None:
            rule = f"above 0, which sampling needs with log_eps_{side}; larger values are closer to clipping"
            check_number(f"gamma_{side}", gamma, lambda gamma: gamma > 0, rule)
        elif gamma is not None:
            idle = f"perception: {perception}" if perception != "sample" else f"log_eps_{side}: null"
            raise ConfigError(f"loss.gamma_{side}: {gamma!r} has no effect with {idle}; remove one of the two")
