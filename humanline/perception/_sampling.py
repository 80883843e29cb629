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
    """Detaches the token log-ratios that humanline sampling rejects (Eq. 5 of https://arxiv.org/abs/2509.24207).

    ``B_P ~ Beta(gamma_P, 1)`` and ``B_R ~ Beta(gamma_R, 1)`` are drawn for every token. A token is rejected when
    ``exp(l_t) < M_P * B_P`` or ``exp(-l_t) < M_R * B_R``. Here ``M_P = exp(log_eps_P) / E[B_P]``,
    ``M_R = exp(-log_eps_R) / E[B_R]`` and ``E[Beta(g, 1)] = g / (g + 1)``. Since ``Beta(g, 1) = U^(1/g)`` for a uniform
    ``U``, the accepted tokens are those inside an interval with random ends:

    ``log_eps_P + log((g_P + 1) / g_P) + log(U_P) / g_P <= l_t <= log_eps_R - log((g_R + 1) / g_R) - log(U_R) / g_R``

    As the gammas grow, the ends converge to the clip's bounds (Theorem 4.3). With one bound only, this is the one-sided
    form of Proposition 4.1.

    Args:
        log_ratio (Tensor): ``l_t`` in nats, any shape.
        log_eps_P (float | None): bound around which the lower end is drawn, nats; None sets no lower end.
        log_eps_R (float | None): bound around which the upper end is drawn, nats; None sets no upper end.
        gamma_P (float | None): concentration of the lower end at its bound, > 0; unused without ``log_eps_P``.
        gamma_R (float | None): concentration of the upper end at its bound, > 0; unused without ``log_eps_R``.
        draws (Tensor | None): uniforms in ``[0, 1)``, ``[2, *log_ratio.shape]``, first ``U_P``, then ``U_R``; None
            draws them from torch's default generator of ``log_ratio``'s device.

    Returns:
        Tensor: the unchanged values of ``log_ratio``; rejected tokens carry no gradient.

    Raises:
        ConfigError: if the gamma of a bound is missing, or is not a positive finite number.
    """
    if log_eps_P is None and log_eps_R is None:
        return log_ratio
    if draws is None:
        draws = torch.rand((2, *log_ratio.shape), device=log_ratio.device)
    # A draw of 0 has the logarithm -inf and moves its end to infinity, so the token is accepted, as for B = 0.
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
    """Computes the probability that :func:`humanline_sample` keeps a token's gradient, in closed form.

    ``min(1, exp(l_t) / M_P)^gamma_P * min(1, exp(-l_t) / M_R)^gamma_R``; the factor of a side without a bound is 1.

    Args:
        log_ratio (Tensor): ``l_t`` in nats, any shape.
        log_eps_P (float | None): lower bound, nats; None sets no lower bound.
        log_eps_R (float | None): upper bound, nats; None sets no upper bound.
        gamma_P (float | None): shape of ``B_P``, > 0; unused without ``log_eps_P``.
        gamma_R (float | None): shape of ``B_R``, > 0; unused without ``log_eps_R``.

    Returns:
        Tensor: probabilities, shape of ``log_ratio``.

    Raises:
        ConfigError: if the gamma of a bound is missing, or is not a positive finite number.
    """
    exact = log_ratio.double()  # a large gamma multiplies the rounding error of the distance to the bound
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
            f"{key}: expected a positive finite number, got {gamma!r}; sampling needs a gamma for each bound "
            "(for the limit of infinity set perception: clip)"
        )
    return gamma
