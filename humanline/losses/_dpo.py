from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from humanline.losses._checks import check_number
from humanline.losses._log_ratio import PerceptualLoss, token_log_ratio


class HumanlineDPOLoss(PerceptualLoss):
    """Direct Preference Optimization on perceived token log-ratios.

    ``l~_t`` is the perceived token log-ratio of policy to reference, clipped to ``[log_eps_P, log_eps_R]``. The reward
    of a response is ``r = beta * sum_t l~_t``, the loss of a pair ``-log sigmoid(r_chosen - r_rejected)``. Without
    bounds this is DPO (https://arxiv.org/abs/2305.18290). With bounds and a synced reference it is humanline DPO
    (https://arxiv.org/abs/2509.24207).

    Args:
        beta (float): factor from log-ratio to reward, > 0.
        log_eps_P (float | None): lower bound of the log-ratio, nats, <= 0; null sets no lower bound.
        log_eps_R (float | None): upper bound of the log-ratio, nats, >= 0; null sets no upper bound.
        label_smoothing (float): assumed probability that a pair's label is wrong, in ``[0, 0.5)``.
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
        beta: float = 0.1,
        log_eps_P: float | None = -1.5,
        log_eps_R: float | None = 1.5,
        label_smoothing: float = 0.0,
        perception: str = "clip",
        gamma_P: float | None = None,
        gamma_R: float | None = None,
    ) -> None:
        super().__init__(log_eps_P, log_eps_R, perception, gamma_P, gamma_R)
        check_number("beta", beta, lambda beta: beta > 0, "above 0; 0.1 is a common value")
        check_number(
            *("label_smoothing", label_smoothing, lambda smoothing: 0 <= smoothing < 0.5),
            rule="in [0, 0.5); 0 trusts every label",
        )
        self.beta = beta
        self.label_smoothing = label_smoothing

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        chosen_mask: Tensor,
        rejected_mask: Tensor,
        chosen_draws: Tensor | None = None,
        rejected_draws: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            policy_chosen_logps (Tensor): token log-probs of the chosen responses under the policy, nats, ``[B, S]``.
            policy_rejected_logps (Tensor): the same for the rejected responses, ``[B, S]``; ``S`` may differ.
            reference_chosen_logps (Tensor): token log-probs of the chosen responses under the reference, ``[B, S]``.
            reference_rejected_logps (Tensor): the same for the rejected responses, ``[B, S]``.
            chosen_mask (Tensor): True at the chosen responses' tokens, bool ``[B, S]``.
            rejected_mask (Tensor): True at the rejected responses' tokens, bool ``[B, S]``.
            chosen_draws (Tensor | None): with ``sample``, uniforms in [0, 1), ``[2, B, S]``; None draws them here.
            rejected_draws (Tensor | None): the same for the rejected responses.

        Returns:
            tuple[Tensor, Tensor, Tensor]: losses, chosen rewards, rejected rewards, each float32 ``[B]``; rewards carry
                no gradient.
        """
        chosen_reward = self._reward(policy_chosen_logps, reference_chosen_logps, chosen_mask, chosen_draws)
        rejected_reward = self._reward(policy_rejected_logps, reference_rejected_logps, rejected_mask, rejected_draws)
        margin = chosen_reward - rejected_reward
        losses = -F.logsigmoid(margin) * (1 - self.label_smoothing) - F.logsigmoid(-margin) * self.label_smoothing
        return losses, chosen_reward.detach(), rejected_reward.detach()

    def num_terms(self, lengths: Sequence[int]) -> int:
        """Number of pairs."""
        return len(lengths) // 2

    def _reward(self, policy_logps: Tensor, reference_logps: Tensor, mask: Tensor, draws: Tensor | None) -> Tensor:
        log_ratio = token_log_ratio(policy_logps, reference_logps, mask)
        return self.beta * self.perceive(log_ratio, draws).sum(-1)
