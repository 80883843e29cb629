import math
from collections.abc import Sequence

import torch
from torch import Tensor

from humanline.errors import ConfigError
from humanline.losses._checks import check_number
from humanline.losses._log_ratio import PerceptualLoss, token_kl, token_log_ratio


class HumanlineGRPOLoss(PerceptualLoss):
    """Group Relative Policy Optimization on perceived token log-ratios, against the synced reference.

    With ``l_t`` the token log-ratio of policy to reference, ``l~_t`` as it is perceived, clipped to
    ``[log_eps_P, log_eps_R]``, ``ratio_t = exp(l~_t)`` and ``A`` the advantage of the response within its group, a
    token's loss is

        -min(A * ratio_t, A * clamp(ratio_t, 1 - epsilon_low, 1 + epsilon_high)) + beta * (exp(-l_t) + l_t - 1)

    where the KL term is of the unclipped ``l_t``. GRPO is from https://arxiv.org/abs/2402.03300, its humanline form
    from https://arxiv.org/abs/2509.24207.

    Args:
        beta (float): weight of the KL to the reference, >= 0.
        log_eps_P (float | None): lower bound of the log-ratio, nats; None leaves that side open.
        log_eps_R (float | None): upper bound of the log-ratio, nats; None leaves that side open.
        epsilon_low (float): how far below 1 a ratio still earns more, in ``(0, 1)``.
        epsilon_high (float): how far above 1 a ratio still earns more, > 0.
        aggregation (str): what the loss is a mean over. ``token``: the microbatch's tokens; ``sequence``: its
            responses, each the mean of its tokens; ``dapo``: the tokens of the whole batch that makes one optimizer
            step (https://arxiv.org/abs/2503.14476).
        perception (str): ``clip``, ``sample`` or ``none``.
        gamma_P (float | None): shape of the sampled lower bound, with ``sample`` only.
        gamma_R (float | None): shape of the sampled upper bound, with ``sample`` only.

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
        check_number("beta", beta, lambda beta: beta >= 0, "of at least 0; 0.01 is a common value, 0 leaves the KL out")
        check_number("epsilon_low", epsilon_low, lambda eps: 0 < eps < 1, "in (0, 1); 0.2 is a common value")
        check_number("epsilon_high", epsilon_high, lambda eps: eps > 0, "above 0; 0.2 is a common value")
        if aggregation not in ("token", "sequence", "dapo"):
            raise ConfigError(f"loss.aggregation: {aggregation!r} is unknown; choose token, sequence or dapo")
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
        """The mean over what ``aggregation`` says, of a whole microbatch (a whole batch with ``dapo``).

        Args:
            policy_logps (Tensor): token log-probs of the responses under the policy, nats, ``[B, S]``.
            reference_logps (Tensor): the same under the reference, ``[B, S]``.
            mask (Tensor): True at response tokens, bool ``[B, S]``.
            advantages (Tensor): one a response, ``[B]``, such as from :func:`group_advantages`.
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
        """The sum of which :meth:`forward` is the mean, for a part of a microbatch.

        It is a sum over tokens; with ``sequence`` over responses, each the mean of its tokens. The arguments are those
        of :meth:`forward`.

        Returns:
            Tensor: the sum, float32 scalar.
        """
        log_ratio = token_log_ratio(policy_logps, reference_logps, mask)
        perceived = self.perceive(log_ratio, draws)
        advantage = advantages[:, None]
        # The minimum of the two products, taken before the exponential, which could overflow where it does not count.
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
        """One a response that has tokens with ``sequence``, else one a token."""
        return sum(length > 0 for length in lengths) if self.aggregation == "sequence" else sum(lengths)


def group_advantages(scores: Tensor, group_ids: Tensor, eps: float = 0.01) -> Tensor:
    """``A = (s - mean) / (std + eps)`` within each group, with the population's standard deviation.

    Args:
        scores (Tensor): one a response, higher is better, ``[B]``.
        group_ids (Tensor): which group each response belongs to, any integers, ``[B]``.
        eps (float): keeps groups of nearly equal scores from being blown up; in units of the scores.

    Returns:
        Tensor: float32 ``[B]``.
    """
    _, group, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    scores = scores.double()  # scores may be large beside their differences

    def group_mean(values: Tensor) -> Tensor:
        return (values.new_zeros(len(sizes)).index_add(0, group, values) / sizes)[group]

    centred = scores - group_mean(scores)
    return (centred / (group_mean(centred.square()).sqrt() + eps)).float()
