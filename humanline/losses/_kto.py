from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from humanline.distributed import summed
from humanline.losses._checks import check_number
from humanline.losses._log_ratio import PerceptualLoss, token_log_ratio


class HumanlineKTOLoss(PerceptualLoss):
    """Kahneman-Tversky Optimization on perceived token log-ratios.

    ``l~_t`` is the perceived token log-ratio of policy to reference. A response's reward is ``r = sum_t l~_t`` (no
    beta). It is a gain or a loss relative to the baseline ``z0``, an estimate of the policy's KL to the reference:

        desirable:    desirable_weight   * (1 - sigmoid(beta * (r - z0)))
        undesirable:  undesirable_weight * (1 - sigmoid(beta * (z0 - r)))

    Without bounds this is KTO (https://arxiv.org/abs/2402.01306). With bounds and a synced reference it is humanline
    KTO (https://arxiv.org/abs/2509.24207).

    Args:
        beta (float): how fast the loss saturates with the distance of the reward from ``z0``, > 0.
        log_eps_P (float | None): lower bound of the log-ratio, nats, <= 0; null sets no lower bound.
        log_eps_R (float | None): upper bound of the log-ratio, nats, >= 0; null sets no upper bound.
        desirable_weight (float): weight of the losses of desirable responses, > 0.
        undesirable_weight (float): weight of the losses of undesirable responses, > 0.
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
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        perception: str = "clip",
        gamma_P: float | None = None,
        gamma_R: float | None = None,
    ) -> None:
        super().__init__(log_eps_P, log_eps_R, perception, gamma_P, gamma_R)
        check_number("beta", beta, lambda beta: beta > 0, "above 0; 0.1 is a common value")
        for key, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
            check_number(key, weight, lambda weight: weight > 0, "above 0; 1 is a common value")
        self.beta = beta
        self.desirable_weight = desirable_weight
        self.undesirable_weight = undesirable_weight

    def forward(
        self,
        policy_logps: Tensor,
        reference_logps: Tensor,
        mask: Tensor,
        desirable: Tensor,
        kl: Tensor,
        draws: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            policy_logps (Tensor): token log-probs of the responses under the policy, nats, ``[B, S]``.
            reference_logps (Tensor): the same under the reference, ``[B, S]``.
            mask (Tensor): True at response tokens, bool ``[B, S]``.
            desirable (Tensor): True for desirable responses, bool ``[B]``; all or none may be desirable.
            kl (Tensor): the baseline ``z0`` from :meth:`kl_baseline`, scalar, nats.
            draws (Tensor | None): with ``sample``, uniforms in [0, 1), ``[2, B, S]``; None draws them here.

        Returns:
            tuple[Tensor, Tensor]: losses and rewards, each float32 ``[B]``; rewards carry no gradient.
        """
        log_ratio = token_log_ratio(policy_logps, reference_logps, mask)
        reward = self.perceive(log_ratio, draws).sum(-1)
        gain = reward - kl.detach()
        # 1 - sigmoid(x) from its logarithm: far from the baseline, it and its gradient would round to 0.
        desirable_loss = self.desirable_weight * F.logsigmoid(-self.beta * gain).exp()
        undesirable_loss = self.undesirable_weight * F.logsigmoid(self.beta * gain).exp()
        return desirable_loss.where(desirable, undesirable_loss), reward.detach()

    def kl_baseline(self, policy_kl_logps: Tensor, reference_kl_logps: Tensor, kl_mask: Tensor) -> Tensor:
        """``z0 = max(0, mean of sum_t l~_t)`` over the non-empty KL sequences of a microbatch; carries no gradient.

        A KL sequence is the prompt of an example with the response of the next example in the microbatch.

        Args:
            policy_kl_logps (Tensor): token log-probs of the KL sequences' responses under the policy, nats, ``[B, S]``.
            reference_kl_logps (Tensor): the same under the reference, ``[B, S]``.
            kl_mask (Tensor): True at response tokens, bool ``[B, S]``; a row of False is an empty sequence.

        Returns:
            Tensor: scalar, nats; 0 if all sequences are empty.
        """
        return _z0(*self.kl_sum(policy_kl_logps, reference_kl_logps, kl_mask))

    def kl_sum(self, policy_kl_logps: Tensor, reference_kl_logps: Tensor, kl_mask: Tensor) -> Tensor:
        """Returns one part's contribution to :meth:`kl_baseline_of`; carries no gradient.

        Args:
            policy_kl_logps (Tensor): as in :meth:`kl_baseline`, ``[B, S]``.
            reference_kl_logps (Tensor): as in :meth:`kl_baseline`, ``[B, S]``.
            kl_mask (Tensor): as in :meth:`kl_baseline`, ``[B, S]``.

        Returns:
            Tensor: float32 ``[2]``: the sum of ``sum_t l~_t`` over the KL sequences, nats, and the number of non-empty
                sequences.
        """
        log_ratio = token_log_ratio(policy_kl_logps.detach(), reference_kl_logps.detach(), kl_mask)
        return torch.stack([self.perceive(log_ratio).sum(), kl_mask.any(-1).sum()])

    @staticmethod
    def kl_baseline_of(sums: Sequence[Tensor]) -> Tensor:
        """:meth:`kl_baseline` of a microbatch in parts, from :meth:`kl_sum` of each part of each rank; a collective.

        Args:
            sums (Sequence[Tensor]): the sums of this rank's parts, ``[2]`` each.

        Returns:
            Tensor: ``z0``, scalar, nats.
        """
        return _z0(*summed(torch.stack(list(sums)).sum(0)))


def _z0(total: Tensor, count: Tensor) -> Tensor:
    return (total / count.clamp(min=1)).clamp(min=0)
