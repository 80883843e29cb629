import math

import torch
from torch import Tensor

from humanline.errors import ConfigError


def value(outcomes: Tensor, z0: float = 0.0, alpha: float = 0.88, loss_aversion: float = 2.25) -> Tensor:
    """Computes the value function ``v`` of prospect theory: the worth of outcomes relative to a reference point ``z0``.

    ``(z - z0)^alpha`` for gains, ``z >= z0``, and ``-loss_aversion * (z0 - z)^alpha`` for losses. The defaults are the
    medians of Tversky and Kahneman (1992, https://doi.org/10.1007/BF00122574).

    Args:
        outcomes (Tensor): ``z``, any shape; for a language model the surprisals ``log pi_theta - log pi_ref``, nats.
        z0 (float): the reference point, in the unit of ``outcomes``.
        alpha (float): sensitivity, > 0; below 1 it decreases with the distance from ``z0``.
        loss_aversion (float): the paper's lambda, > 0; above 1 losses weigh more than gains.

    Returns:
        Tensor: values, shape of ``outcomes``.

    Raises:
        ConfigError: if ``alpha`` or ``loss_aversion`` is not positive.
    """
    _check_positive("alpha", alpha, "0.88")
    _check_positive("loss_aversion", loss_aversion, "2.25")
    distance = (outcomes - z0).abs() ** alpha
    return torch.where(outcomes >= z0, distance, -loss_aversion * distance)


def capacity(a: Tensor, gamma: float) -> Tensor:
    """Computes the capacity ``Omega+(a; gamma) = a^gamma / (a^gamma + (1 - a)^gamma)^(1 / gamma)``.

    It maps a probability to its perceived size. For ``gamma`` in (0, 1) it is an inverted S: small probabilities are
    overweighted and large ones underweighted; with ``gamma`` 1 it is the identity. Below 0.2793 it decreases on a part
    of ``[0, 1]``, so weights derived from it can be negative.

    Args:
        a (Tensor): probabilities, any shape.
        gamma (float): > 0; Tversky and Kahneman (1992) found 0.61 for gains and 0.69 for losses.

    Returns:
        Tensor: capacities in ``[0, 1]``, shape of ``a``.

    Raises:
        ConfigError: if ``gamma`` is not positive, or a probability is outside ``[0, 1]``.
    """
    _check_positive("gamma", gamma, "0.61 for gains and 0.69 for losses")
    if outside := a[~((a >= 0) & (a <= 1))].tolist():
        raise ConfigError(f"a: expected probabilities in [0, 1], got {outside[0]}; correct them")
    felt, felt_not = a**gamma, (1 - a) ** gamma
    return felt / (felt + felt_not) ** (1 / gamma)


def weighting(
    outcomes: Tensor, probabilities: Tensor, z0: float = 0.0, gamma_gains: float = 0.61, gamma_losses: float = 0.69
) -> Tensor:
    """Computes the weighting ``omega`` of discrete outcomes: their perceived probabilities.

    Weights are increments of the capacity along the ranked outcomes. The weight of a gain (``z >= z0``, as for
    :func:`value`) is ``Omega+(P(at least as good)) - Omega+(P(better))``. The weight of a loss is
    ``Omega-(P(at least as bad)) - Omega-(P(worse))``, where ``Omega-`` is the same function with its own gamma. So
    unlikely outcomes at either end get more weight than their probability. Outcomes of equal value share the weight of
    their union in proportion to their probabilities.

    If all outcomes are gains, or all are losses, the weights sum to 1. With both they generally do not, even with equal
    gammas, because each side is ranked from its own end; divide by the sum to get a distribution. An outcome of exactly
    ``z0`` counts as a gain; since its value is 0, this changes no utility.

    Args:
        outcomes (Tensor): ``z``, ``[N]``, in any order.
        probabilities (Tensor): one per outcome, ``[N]``, at least 0; their sum may differ from 1 by 1e-4, which is
            treated as rounding.
        z0 (float): the reference point, in the unit of ``outcomes``.
        gamma_gains (float): gamma of the capacity for gains, > 0.
        gamma_losses (float): gamma of the capacity for losses, > 0.

    Returns:
        Tensor: weights, ``[N]``, dtype of ``probabilities``; ``(weights * value(outcomes)).sum()`` is the utility.

    Raises:
        ConfigError: if a gamma is not positive, or the probabilities are not a distribution.
    """
    _check_distribution(probabilities)
    # Levels are the distinct outcomes, from the worst to the best.
    levels, level_of = outcomes.unique(return_inverse=True)
    chances = probabilities.double()
    level_chances = chances.new_zeros(len(levels)).index_add(0, level_of, chances)
    gains = _increments(level_chances.flip(0), gamma_gains).flip(0)
    losses = _increments(level_chances, gamma_losses)
    level_weights = torch.where(levels >= z0, gains, losses)
    share = torch.where(chances > 0, chances / level_chances[level_of], 0.0)
    return (level_weights[level_of] * share).to(probabilities.dtype)


def _increments(chances: Tensor, gamma: float) -> Tensor:
    """Returns increments of the capacity over outcomes ranked from the most extreme inwards, ``[N]``."""
    nothing = chances.new_zeros(1)
    cumulated = chances.cumsum(0)
    rest = torch.cat([chances.flip(0).cumsum(0).flip(0)[1:], nothing]) / cumulated[-1]
    # The capacity is infinitely steep at 1, so a rounding error there would matter: the last quotient is exactly 1.
    reached = cumulated / cumulated[-1]
    increments = capacity(reached, gamma).diff(prepend=nothing)
    # Beyond 1/2, use the distance to 1, since 1 - 1e-17 rounds to 1.
    missing = _missing(rest.clamp(max=0.5), gamma)
    beyond = torch.cat([nothing, reached[:-1]]) >= 0.5
    return torch.where(beyond, -missing.diff(prepend=missing[:1]), increments)


def _missing(rest: Tensor, gamma: float) -> Tensor:
    """Computes ``1 - Omega+(1 - rest; gamma)`` in full precision, for a ``rest`` of at most 1/2."""
    log_a = torch.log1p(-rest)
    return -torch.expm1(gamma * log_a - torch.log1p(torch.expm1(gamma * log_a) + rest**gamma) / gamma)


def _check_positive(name: str, number: float, found: str) -> None:
    if not 0 < number < math.inf:
        raise ConfigError(f"{name}: expected a positive number, got {number!r}; Tversky and Kahneman found {found}")


def _check_distribution(probabilities: Tensor) -> None:
    total = probabilities.double().sum().item()
    if refused := probabilities[~(probabilities >= 0)].tolist():
        raise ConfigError(f"probabilities: expected numbers of at least 0, got {refused[0]}; correct them")
    if not abs(total - 1) <= 1e-4:
        raise ConfigError(f"probabilities: expected a sum of 1, got {total}; divide them by their sum")
