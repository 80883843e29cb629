"""The token log-ratio ``l_t`` and the perceived one, ``l~_t``, from which every loss is computed."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from humanline.losses._checks import check_bounds, check_perception
from humanline.perception import humanline_sample


def token_log_ratio(policy_logps: Tensor, reference_logps: Tensor, mask: Tensor) -> Tensor:
    """Computes ``l_t = log pi_theta(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)``.

    Args:
        policy_logps (Tensor): token log-probs under the policy, nats, ``[B, S]``.
        reference_logps (Tensor): the same under the reference, ``[B, S]``.
        mask (Tensor): True at response tokens, bool ``[B, S]``.

    Returns:
        Tensor: float32 nats, ``[B, S]``; zero where ``mask`` is False, even if the inputs are NaN there.
    """
    return (policy_logps.float() - reference_logps.float()).where(mask, 0.0)


def token_kl(log_ratio: Tensor) -> Tensor:
    """Computes ``exp(-l_t) + l_t - 1``, each token's term of the KL from policy to reference; it is never below 0.

    For small log-ratios this form cancels: in float32 it has no correct digit below 1e-4, and ``expm1(-l_t) + l_t`` has
    none below 1e-7. So a Taylor series is used where ``|l_t| < 1/2``. Values and gradients, ``1 - exp(-l_t)``, are
    within a relative error of 1e-6.

    Args:
        log_ratio (Tensor): ``l_t`` in nats, any shape.

    Returns:
        Tensor: nats, shape of ``log_ratio``.
    """
    small = log_ratio.clamp(-0.5, 0.5)
    series = torch.ones_like(small)  # l^2/2 (1 - l/3 (1 - l/4 (1 - ...))); the next term is below 4e-8 of the sum
    for k in range(8, 2, -1):
        series = 1 - small / k * series
    return torch.where(log_ratio.abs() < 0.5, small.square() / 2 * series, torch.expm1(-log_ratio) + log_ratio)


def humanline_clip(log_ratio: Tensor, log_eps_P: float | None, log_eps_R: float | None) -> Tensor:
    """Clips the token log-ratio to the asymmetric interval ``[log_eps_P, log_eps_R]``, upstream of any loss.

    ``l~_t = clamp(l_t, log_eps_P, log_eps_R)``. A token outside the interval gets the bound as its value and no
    gradient. Clipping is the limit of humanline sampling in which acceptance is certain inside the interval and
    impossible outside (Theorem 4.3 of https://arxiv.org/abs/2509.24207).

    Args:
        log_ratio (Tensor): ``l_t`` in nats, any shape.
        log_eps_P (float | None): lower bound in nats; None sets no lower bound.
        log_eps_R (float | None): upper bound in nats; None sets no upper bound.

    Returns:
        Tensor: ``l~_t``, shape of ``log_ratio``.
    """
    if log_eps_P is None and log_eps_R is None:
        return log_ratio
    return log_ratio.clamp(log_eps_P, log_eps_R)


def unclamped(
    log_ratio: Tensor, mask: Tensor, log_eps_P: float | None, log_eps_R: float | None
) -> tuple[Tensor, Tensor]:
    """Counts the tokens whose log-ratio is non-zero, and how many of them the clip leaves unchanged.

    Args:
        log_ratio (Tensor): ``l_t`` in nats, ``[B, S]``.
        mask (Tensor): True at response tokens, ``[B, S]``.
        log_eps_P (float | None): lower bound of the clip, nats; None sets no lower bound.
        log_eps_R (float | None): upper bound of the clip, nats; None sets no upper bound.

    Returns:
        tuple[Tensor, Tensor]: scalars ``(inside, moved)``; the logged ``unclamped`` is their quotient, undefined if
            ``moved`` is 0.
    """
    moved = mask & (log_ratio != 0)
    inside = moved & (humanline_clip(log_ratio, log_eps_P, log_eps_R) == log_ratio)
    return inside.sum(), moved.sum()


class PerceptualLoss(nn.Module):
    """Base class of the humanline losses: it computes the perceived token log-ratio.

    Args:
        log_eps_P (float | None): lower bound of the log-ratio, nats, <= 0; None sets no lower bound.
        log_eps_R (float | None): upper bound of the log-ratio, nats, >= 0; None sets no upper bound.
        perception (str): how bounds apply. ``clip`` clamps each token's log-ratio to them; ``sample`` detaches tokens
            by humanline sampling around them; ``none`` ignores them.
        gamma_P (float | None): with ``sample``, the shape of ``B_P ~ Beta(gamma_P, 1)``, > 0; as it grows, sampling
            accepts exactly the tokens that clipping leaves unchanged.
        gamma_R (float | None): with ``sample``, the shape of ``B_R ~ Beta(gamma_R, 1)``, > 0.

    Raises:
        ConfigError: if a setting is out of its range or contradicts another.
    """

    def __init__(
        self,
        log_eps_P: float | None,
        log_eps_R: float | None,
        perception: str,
        gamma_P: float | None,
        gamma_R: float | None,
    ) -> None:
        super().__init__()
        check_bounds(log_eps_P, log_eps_R)
        check_perception(perception, log_eps_P, log_eps_R, gamma_P, gamma_R)
        self.log_eps_P = log_eps_P
        self.log_eps_R = log_eps_R
        self.perception = perception
        self.gamma_P = gamma_P
        self.gamma_R = gamma_R

    scope: str = "microbatch"
    """Scope of the loss's mean: each ``microbatch`` (the batch's loss is then the mean over microbatches), or the whole
    ``batch`` of an optimizer step."""

    def num_terms(self, lengths: Sequence[int]) -> int:
        """Number of terms in the loss's mean for responses of these lengths, tokens: one per response."""
        return len(lengths)

    def divisors(self, batch: Sequence[Sequence[int]]) -> list[int]:
        """Returns a divisor for each microbatch's sum of losses, such that the quotients add up to the batch's loss.

        Args:
            batch (Sequence[Sequence[int]]): for each microbatch, the lengths of its responses on all ranks, tokens.
        """
        terms = [self.num_terms(lengths) for lengths in batch]
        return [sum(terms)] * len(terms) if self.scope == "batch" else [count * len(terms) for count in terms]

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """The bounds in effect, ``(log_eps_P, log_eps_R)``; ``(None, None)`` with ``perception: none``."""
        return (None, None) if self.perception == "none" else (self.log_eps_P, self.log_eps_R)

    def perceive(self, log_ratio: Tensor, draws: Tensor | None = None) -> Tensor:
        """Computes ``l~_t`` from ``l_t``; zero stays zero, so positions outside the mask stay zero.

        Args:
            log_ratio (Tensor): ``l_t`` in nats, ``[B, S]``.
            draws (Tensor | None): for ``sample``, uniforms in [0, 1), ``[2, B, S]``; None draws them here.

        Returns:
            Tensor: ``l~_t`` in nats, ``[B, S]``.
        """
        if self.perception == "clip":
            return humanline_clip(log_ratio, *self.bounds)
        if self.perception == "sample" and log_ratio.requires_grad:  # sampling changes gradients only
            return humanline_sample(log_ratio, *self.bounds, self.gamma_P, self.gamma_R, draws)
        return log_ratio
