import math
from collections.abc import Callable

import torch
from torch import Tensor

from humanline.errors import ConfigError


def humanline_clip(log_ratio: Tensor, log_eps_P: float | None, log_eps_R: float | None) -> Tensor:
    """Clips the token log-ratio to the asymmetric interval ``[log_eps_P, log_eps_R]``, upstream of any loss.

    ``l~_t = clamp(l_t, log_eps_P, log_eps_R)`` with ``l_t = log pi_theta(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)``.
    A token outside the interval keeps the bound as its value and gets no gradient. It is the limit of humanline
    sampling in which acceptance is certain inside the interval and impossible outside (Theorem 4.3 of
    https://arxiv.org/abs/2509.24207).

    Args:
        log_ratio (Tensor): ``l_t`` in nats, any shape.
        log_eps_P (float | None): lower bound in nats; None leaves that side open.
        log_eps_R (float | None): upper bound in nats; None leaves that side open.

    Returns:
        Tensor: ``l~_t``, shape of ``log_ratio``.
    """
    if log_eps_P is None and log_eps_R is None:
        return log_ratio
    return log_ratio.clamp(log_eps_P, log_eps_R)


def unclamped(
    log_ratio: Tensor, mask: Tensor, log_eps_P: float | None, log_eps_R: float | None
) -> tuple[Tensor, Tensor]:
    """Counts the tokens whose log-ratio is non-zero, and those of them that the clip leaves alone.

    Args:
        log_ratio (Tensor): ``l_t`` in nats, ``[B, S]``.
        mask (Tensor): True at response tokens, ``[B, S]``.
        log_eps_P (float | None): lower bound of the clip.
        log_eps_R (float | None): upper bound of the clip.

    Returns:
        tuple[Tensor, Tensor]: scalars ``(inside, moved)``; the logged ``unclamped`` is their quotient, which
            does not exist where nothing moved.
    """
    moved = mask & (log_ratio != 0)
    inside = moved & (humanline_clip(log_ratio, log_eps_P, log_eps_R) == log_ratio)
    return inside.sum(), moved.sum()


def check_number(key: str, value: object, holds: Callable[[float], bool], rule: str) -> None:
    """Raises ConfigError, naming ``loss.key``, unless ``value`` is a finite number for which ``holds`` is true."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not holds(value):
        raise ConfigError(f"loss.{key}: {value!r} is not a number {rule}")


def check_bounds(log_eps_P: float | None, log_eps_R: float | None) -> None:
    """Raises ConfigError unless ``log_eps_P <= 0 <= log_eps_R`` (either may be None: that side never clips)."""
    logarithm = "they are logarithms, a ratio of 0.8 is -0.22; null gives no bound"
    if log_eps_P is not None:
        check_number("log_eps_P", log_eps_P, lambda bound: bound <= 0, f"of at most 0 nats ({logarithm})")
    if log_eps_R is not None:
        check_number("log_eps_R", log_eps_R, lambda bound: bound >= 0, f"of at least 0 nats ({logarithm})")
    if log_eps_P == log_eps_R == 0:
        raise ConfigError("loss.log_eps_P: 0 with log_eps_R: 0 clips everything; the paper's values are -1.5 and 1.5")


def token_log_ratio(policy_logps: Tensor, reference_logps: Tensor, mask: Tensor) -> Tensor:
    """``l_t`` in float32 nats, zero where ``mask`` is False (whatever stands there, NaN included).

    All shapes ``[B, S]``.
    """
    log_ratio = policy_logps.float() - reference_logps.float()
    return torch.where(mask, log_ratio, torch.zeros_like(log_ratio))
