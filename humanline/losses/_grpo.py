import math
from collections.abc import Sequence

import torch
from torch import Tensor

from humanline.errors import ConfigError
from humanline.losses._checks import check_number
from humanline.losses._log_ratio import PerceptualLoss, token_kl, token_log_ratio


class HumanlineGRPOLoss(PerceptualLoss):
    """Group Relative Policy Optimization on perceived token log-ratios, relative to the synced reference.

    ``l_t`` is the token log-ratio of policy to reference, ``l~_t`` the perceived one, clipped to
    ``[log_eps_P, log_eps_R]``. With ``ratio_t = exp(l~_t)`` and ``A`` the response's advantage within its group, a
    token's loss is

        -min(A * ratio_t, A * clamp(ratio_t, 1 - epsilon_low, 1 + epsilon_high)) + beta * (exp(-l_t) + l_t - 1)

    The KL term uses the unclipped ``l_t``. GRPO is from https://arxiv.org/abs/2402.03300, its humanline form from
    https://arxiv.org/abs/2509.24207.

    Args:
        beta (float): weight of the KL to the reference, >= 0.
        log_eps_P (float | None): lower bound of the log-ratio, nats, <= 0; null sets no lower bound.
        log_eps_R (float | None): upper bound of the log-ratio, nats, >= 0; null sets no upper bound.
        epsilon_low (float): with a negative advantage, ratios below ``1 - epsilon_low`` are clipped; in ``(0, 1)``.
        epsilon_high (float): with a positive advantage, ratios above ``1 + epsilon_high`` are clipped; > 0.
        aggregation (str): terms of the loss's mean. ``token``: the microbatch's tokens; ``sequence``: its responses,
            each the mean of its tokens; ``dapo``: the tokens of the optimizer step's whole batch
            (https://arxiv.org/abs/2503.14476).
        perception (str): how bounds apply. ``clip`` clamps each token's log-ratio to them; ``sample`` detaches tokens
            by humanline sampling around them; ``none`` ignores them.
        gamma_P (float | None): shape of ``B_P ~ Beta(gamma_P, 1)``, > 0; required with ``sample`` and ``log_eps_P``,
            otherwise null.
        gamma_R (float | None): shape of ``B_R ~ Beta(gamma_R, 1)``, > 0; required with ``sample`` and ``log_eps_R``,
            otherwise null.

    Raises:
        ConfigError: if a setting is out of its range or contradicts another.
    """

    def __init__(
        self,
        beta: float = 0.01,
        log_eps_P: float | None = -1.5,
        log_eps_R: float | None = 1.5,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        aggregation: str = "token",
        perception: str = "clip",
        gamma_P: float | None = None,
        gamma_R: float | None = None,
    ) -> None:
        super().__init__(log_eps_P, log_eps_R, perception, gamma_P, gamma_R)
        check_number("beta", beta, lambda beta: beta >= 0, "of at least 0; 0.01 is a common value, 0 turns the KL off")
        check_number("epsilon_low", epsilon_low, lambda eps: 0 < eps < 1, "in (0, 1); 0.2 is a common value")
        check_number("epsilon_high", epsilon_high, lambda eps: eps > 0, "above 0; 0.2 is a common value")
        if aggregation not in ("token", "sequence", "dapo"):
            raise ConfigError(f"loss.aggregation: expected token, sequence or dapo, got {aggregation!r}")
        self.beta = beta
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.aggregation = aggregation

    def forward(
        self,
        policy_logps: Tensor,
        reference_logps: Tensor,
        mask: Tensor,
        advantages: Tensor,
        draws: Tensor | None = None,
    ) -> Tensor:
        """Computes the loss of a whole microbatch (with ``dapo`` of a whole batch), a mean as set by ``aggregation``.

        Args:
            policy_logps (Tensor): token log-probs of the responses under the policy, nats, ``[B, S]``.
            reference_logps (Tensor): the same under the reference, ``[B, S]``.
            mask (Tensor): True at response tokens, bool ``[B, S]``.
            advantages (Tensor): one per response, ``[B]``, such as from :func:`group_advantages`.
            draws (Tensor | None): with ``sample``, uniforms in [0, 1), ``[2, B, S]``; None draws them here.

        Returns:
            Tensor: the loss, float32 scalar.
        """
        total = self.total(policy_logps, reference_logps, mask, advantages, draws)
        return total / max(1, self.num_terms(mask.sum(-1).tolist()))

    def total(
        self,
        policy_logps: Tensor,
        reference_logps: Tensor,
        mask: Tensor,
        advantages: Tensor,
        draws: Tensor | None = None,
    ) -> Tensor:
        """Computes the sum that :meth:`forward` divides to a mean, for a part of a microbatch.

        The sum is over tokens; with ``sequence`` over responses, each the mean of its tokens. The arguments are those
        of :meth:`forward`.

        Returns:
            Tensor: the sum, float32 scalar.
        """
        log_ratio = token_log_ratio(policy_logps, reference_logps, mask)
        perceived = self.perceive(log_ratio, draws)
        advantage = advantages[:, None]
        # The minimum of the two products, taken before the exponential, because the larger one could overflow.
        log_nearby = torch.where(
            advantage >= 0,
            perceived.clamp(max=math.log1p(self.epsilon_high)),
            perceived.clamp(min=math.log1p(-self.epsilon_low)),
        )
        losses = -advantage * log_nearby.exp()
        if self.beta:  # 0 times an overflowing KL would be NaN
            losses = losses + self.beta * token_kl(log_ratio)
        losses = losses.where(mask, 0.0)
        if self.aggregation == "sequence":
            losses = losses.sum(-1) / mask.sum(-1).clamp(min=1)
        return losses.sum()

    @property
    def scope(self) -> str:  # type: ignore[override]
        return "batch" if self.aggregation == "dapo" else "microbatch"

    def num_terms(self, lengths: Sequence[int]) -> int:
        """Number of responses that have tokens with ``sequence``, otherwise number of tokens."""
        return sum(length > 0 for length in lengths) if self.aggregation == "sequence" else sum(lengths)


def group_advantages(scores: Tensor, group_ids: Tensor, eps: float = 0.01) -> Tensor:
    """``A = (s - mean) / (std + eps)`` within each group, with the population standard deviation.

    Args:
        scores (Tensor): one per response, higher is better, ``[B]``.
        group_ids (Tensor): the group of each response, any integers, ``[B]``.
        eps (float): limits the advantages of groups with nearly equal scores; in the unit of the scores.

    Returns:
        Tensor: float32 ``[B]``.
    """
    _, group, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    scores = scores.double()  # scores may be large compared with their differences

    def group_mean(values: Tensor) -> Tensor:
        return (values.new_zeros(len(sizes)).index_add(0, group, values) / sizes)[group]

    centred = scores - group_mean(scores)
    return (centred / (group_mean(centred.square()).sqrt() + eps)).float()
