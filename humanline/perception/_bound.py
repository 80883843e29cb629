import math

from humanline.errors import ConfigError

# Proposition 3.4 of https://arxiv.org/abs/2509.24207. Human utility weights outcomes by omega; training on data from Q
# weights them by Q. Hoelder's inequality: the two utilities differ by at most ||v||_inf * ||omega - Q||_1. Pinsker's
# inequality: ||omega - Q||_1 <= sqrt(2 * KL(omega || Q)), which requires that omega sums to 1.


def utility_gap_bound(kl: float, max_value: float) -> float:
    """Bounds the difference between the utility under ``Q`` and the perceived utility: ``||v||_inf * sqrt(2 * KL)``.

    Args:
        kl (float): ``KL(omega || Q)`` in nats, for an ``omega`` that sums to 1.
        max_value (float): ``||v||_inf``, the largest absolute value of any outcome.

    Returns:
        float: the bound, in the unit of the values.

    Raises:
        ConfigError: if an argument is negative.
    """
    _check_not_negative("kl", kl)
    _check_not_negative("max_value", max_value)
    return max_value * math.sqrt(2 * kl)


def largest_kl(gap: float, max_value: float) -> float:
    """Returns the largest ``KL(omega || Q)`` that bounds the gap: ``(gap / (sqrt(2) * ||v||_inf))^2``.

    Args:
        gap (float): largest allowed difference of the utilities, the paper's delta, in the unit of the values.
        max_value (float): ``||v||_inf``, the largest absolute value of any outcome.

    Returns:
        float: nats; infinite if all values are 0.

    Raises:
        ConfigError: if an argument is negative.
    """
    _check_not_negative("gap", gap)
    _check_not_negative("max_value", max_value)
    return (gap / max_value) ** 2 / 2 if max_value else math.inf


def _check_not_negative(name: str, number: float) -> None:
    if not number >= 0:
        remedy = "a KL below 0 means that omega does not sum to 1" if name == "kl" else "use the absolute value"
        raise ConfigError(f"{name}: expected a number of at least 0, got {number!r}; {remedy}")
