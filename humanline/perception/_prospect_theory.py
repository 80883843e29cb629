import math

import torch
from torch import Tensor

from humanline.errors import ConfigError


def value(outcomes: Tensor, z0: float = 0.0, alpha: float = 0.88, loss_aversion: float = 2.25) -> Tensor:
    """The value function ``v`` of prospect theory: what an outcome is worth beside the reference point ``z0``.

    ``(z - z0)^alpha`` for gains, ``z >= z0``, and ``-loss_aversion * (z0 - z)^alpha`` for losses. The defaults are the
    medians of Tversky and Kahneman (1992, https://doi.org/10.1007/BF00122574).

    Args:
        outcomes (Tensor): ``z``, any shape; for a language model the surprisals ``log pi_theta - log pi_ref``, nats.
        z0 (float): the reference point, in the unit of ``outcomes``.
        alpha (float): sensitivity, > 0; below 1 it diminishes with the distance from ``z0``.
        loss_aversion (float): the paper's lambda, > 0; above 1 losses loom larger than gains.

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
    """The capacity ``Omega+(a; gamma) = a^gamma / (a^gamma + (1 - a)^gamma)^(1 / gamma)``: how likely ``a`` feels.

    For ``gamma`` in (0, 1) an inverted S: small probabilities are overweighted, large ones underweighted; 1 is the
    identity. It falls on a stretch of ``[0, 1]`` when ``gamma`` is below 0.2793, where weights derived from it can be
    negative.

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
        raise ConfigError(f"a: {outside[0]} is outside [0, 1]; a capacity is of a probability")
    felt, felt_not = a**gamma, (1 - a) ** gamma
    return felt / (felt + felt_not) ** (1 / gamma)


def weighting(
    outcomes: Tensor, probabilities: Tensor, z0: float = 0.0, gamma_gains: float = 0.61, gamma_losses: float = 0.69
) -> Tensor:
    """The weighting ``omega`` of discrete outcomes: their probabilities as they are perceived.

    Weights are increments of the capacity along the ranked outcomes. A gain (``z >= z0``, as for :func:`value`) weighs
    ``Omega+(P(at least as good)) - Omega+(P(better))``, a loss ``Omega-(P(at least as bad)) - Omega-(P(worse))``, the
    same function with a gamma of its own. So unlikely outcomes at either end weigh more than their probability.
    Outcomes of the same value share the weight of their union in proportion to their probabilities.

    The weights of gains alone, or of losses alone, sum to 1. Those of gains and losses together do not in general,
    even with equal gammas, because each side is ranked from its own end; divide by the sum where a distribution is
    needed. An outcome of exactly ``z0`` has no value, so that it is counted among the gains matters to no utility.

    Args:
        outcomes (Tensor): ``z``, ``[N]``, in any order.
        probabilities (Tensor): of each outcome, ``[N]``; at least 0, and 1 in sum to within 1e-4 (the rest is taken for
            rounding).
        z0 (float): the reference point, in the unit of ``outcomes``.
        gamma_gains (float): of the capacity of gains, > 0.
        gamma_losses (float): of the capacity of losses, > 0.

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
    """Increments of the capacity over outcomes ranked from the most extreme inwards, ``[N]``."""
    nothing = chances.new_zeros(1)
    cumulated = chances.cumsum(0)
    rest = torch.cat([chances.flip(0).cumsum(0).flip(0)[1:], nothing]) / cumulated[-1]
    # The capacity is infinitely steep at 1, where a rounding error would show: the last quotient is 1 exactly.
    reached = cumulated / cumulated[-1]
    increments = capacity(reached, gamma).diff(prepend=nothing)
    # Beyond the middle by what is missing to 1, since 1 - 1e-17 is 1.
    missing = _missing(rest.clamp(max=0.5), gamma)
    beyond = torch.cat([nothing, reached[:-1]]) >= 0.5
    return torch.where(beyond, -missing.diff(prepend=missing[:1]), increments)


def _missing(rest: Tensor, gamma: float) -> Tensor:
    """``1 - Omega+(1 - rest; gamma)`` with all its digits, for a ``rest`` of at most 1/2."""
    log_a = torch.log1p(-rest)
    return -torch.expm1(gamma * log_a - torch.log1p(torch.expm1(gamma * log_a) + rest**gamma) / gamma)


def _check_positive(name: str, number: float, found: str) -> None:
    if not 0 < number < math.inf:
        raise ConfigError(f"{name}: {number!r} is not a positive number; Tversky and Kahneman (1992) found {found}")


def _check_distribution(probabilities: Tensor) -> None:
    total = probabilities.double().sum().item()
    if refused := probabilities[~(probabilities >= 0)].tolist():
        raise ConfigError(f"probabilities: {refused[0]} is not a probability; give numbers of at least 0")
    if not abs(total - 1) <= 1e-4:
        raise ConfigError(f"probabilities: their sum is {total}, not 1; divide by it to normalise them")
