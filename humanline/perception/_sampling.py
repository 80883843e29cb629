import math

import torch
from torch import Tensor

from humanline.errors import ConfigError


def humanline_sample(
    log_ratio: Tensor,
    log_eps_P: float | None,
    log_eps_R: float | None,
    gamma_P: float | None,
    gamma_R: float | None,
    draws: Tensor | None = None,
) -> Tensor:
    """Detaches the token log-ratios that humanline sampling rejects, Eq. 5 of https://arxiv.org/abs/2509.24207.

    With ``B_P ~ Beta(gamma_P, 1)`` and ``B_R ~ Beta(gamma_R, 1)`` drawn for every token, a token is rejected when
    ``exp(l_t) < M_P * B_P`` or ``exp(-l_t) < M_R * B_R``, where ``M_P = exp(log_eps_P) / E[B_P]``,
    ``M_R = exp(-log_eps_R) / E[B_R]`` and ``E[Beta(g, 1)] = g / (g + 1)``. As ``Beta(g, 1) = U^(1/g)`` for a uniform
    ``U``, the accepted tokens are those inside an interval with random ends,

    ``log_eps_P + log((g_P + 1) / g_P) + log(U_P) / g_P <= l_t <= log_eps_R - log((g_R + 1) / g_R) - log(U_R) / g_R``,

    which become the clip's fixed ends as the gammas grow (Theorem 4.3). One bound alone is the one-sided form of
    Proposition 4.1.

    Args:
        log_ratio (Tensor): ``l_t`` in nats, any shape.
        log_eps_P (float | None): the bound, nats, that the lower end scatters around; None leaves that side open.
        log_eps_R (float | None): the bound, nats, that the upper end scatters around; None leaves that side open.
        gamma_P (float | None): how tightly the lower end keeps to its bound, > 0; unused without ``log_eps_P``.
        gamma_R (float | None): the same for the upper end.
        draws (Tensor | None): uniforms in ``[0, 1)``, ``[2, *log_ratio.shape]``, first ``U_P``, then ``U_R``; None
            takes them from torch's default generator of ``log_ratio``'s device.

    Returns:
        Tensor: the values of ``log_ratio``, unchanged; those of rejected tokens carry no gradient.

    Raises:
        ConfigError: if a bound's gamma is missing, or not a positive finite number.
    """
    if log_eps_P is None and log_eps_R is None:
        return log_ratio
    if draws is None:
        draws = torch.rand((2, *log_ratio.shape), device=log_ratio.device)
    # A draw of zero has the logarithm -inf and puts its end at infinity: the token is accepted, as it is for B = 0.
    log_U_P, log_U_R = draws.log()
    accepted = torch.ones_like(log_ratio, dtype=torch.bool)
    if log_eps_P is not None:
        gamma = _check_gamma(gamma_P, "loss.gamma_P")
        accepted &= log_ratio >= log_eps_P + math.log1p(1 / gamma) + log_U_P / gamma
    if log_eps_R is not None:
        gamma = _check_gamma(gamma_R, "loss.gamma_R")
        accepted &= log_ratio <= log_eps_R - math.log1p(1 / gamma) - log_U_R / gamma
    return torch.where(accepted, log_ratio, log_ratio.detach())


def acceptance_probability(
    log_ratio: Tensor,
    log_eps_P: float | None,
    log_eps_R: float | None,
    gamma_P: float | None,
    gamma_R: float | None,
) -> Tensor:
    """The probability with which :func:`humanline_sample` leaves a token its gradient, in closed form.

    ``min(1, exp(l_t) / M_P)^gamma_P * min(1, exp(-l_t) / M_R)^gamma_R``; a side without a bound counts 1.

    Args:
        log_ratio (Tensor): ``l_t`` in nats, any shape.
        log_eps_P (float | None): lower bound, nats.
        log_eps_R (float | None): upper bound, nats.
        gamma_P (float | None): > 0; unused without ``log_eps_P``.
        gamma_R (float | None): > 0; unused without ``log_eps_R``.

    Returns:
        Tensor: probabilities, shape of ``log_ratio``.

    Raises:
        ConfigError: if a bound's gamma is missing, or not a positive finite number.
    """
    exact = log_ratio.double()  # a large gamma multiplies what rounding leaves of the distance to the bound
    log_probability = torch.zeros_like(exact)
    if log_eps_P is not None:
        gamma = _check_gamma(gamma_P, "loss.gamma_P")
        log_probability += gamma * (exact - log_eps_P - math.log1p(1 / gamma)).clamp(max=0)
    if log_eps_R is not None:
        gamma = _check_gamma(gamma_R, "loss.gamma_R")
        log_probability += gamma * (log_eps_R - exact - math.log1p(1 / gamma)).clamp(max=0)
    return log_probability.exp().to(log_ratio.dtype)


def _check_gamma(gamma: float | None, key: str) -> float:
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 < gamma < math.inf:
        raise ConfigError(
            f"{key}: {gamma!r} is not a positive number; sampling needs one wherever there is a bound "
            "(its limit of infinity is perception: clip)"
        )
    return gamma
