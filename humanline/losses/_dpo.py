import torch.nn.functional as F
from torch import Tensor, nn

from humanline.errors import ConfigError
from humanline.losses._clip import check_bounds, humanline_clip, token_log_ratio


class HumanlineDPOLoss(nn.Module):
    """Direct Preference Optimization on humanline-clipped token log-ratios.

    With ``l_t`` the token log-ratio of policy to reference and ``l~_t`` its clip to ``[log_eps_P, log_eps_R]``, a
    response's reward is ``r = beta * sum_t l~_t`` and a pair's loss ``-log sigmoid(r_chosen - r_rejected)``. Without
    bounds this is the DPO of https://arxiv.org/abs/2305.18290; with them, and a synced reference, the humanline DPO of
    https://arxiv.org/abs/2509.24207.

    Args:
        beta (float): how strongly a log-ratio counts as reward, > 0.
        log_eps_P (float | None): lower bound of the clip, nats; None never clips below.
        log_eps_R (float | None): upper bound of the clip, nats; None never clips above.
        label_smoothing (float): the probability that a pair's label is wrong, in ``[0, 0.5)``.

    Raises:
        ConfigError: if a setting is out of its range.
    """

    def __init__(
        self,
        beta: float = 0.1,
        log_eps_P: float | None = -1.5,
        log_eps_R: float | None = 1.5,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not beta > 0:
            raise ConfigError(f"loss.beta: {beta} is not above 0; 0.1 is a common value")
        if not 0 <= label_smoothing < 0.5:
            raise ConfigError(
                f"loss.label_smoothing: {label_smoothing} is outside [0, 0.5); 0 takes every label at its word"
            )
        check_bounds(log_eps_P, log_eps_R)
        self.beta = beta
        self.log_eps_P = log_eps_P
        self.log_eps_R = log_eps_R
        self.label_smoothing = label_smoothing

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        chosen_mask: Tensor,
        rejected_mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            policy_chosen_logps (Tensor): token log-probs of the chosen responses under the policy, nats, ``[B, S]``.
            policy_rejected_logps (Tensor): of the rejected responses, ``[B, S]`` (``S`` may differ from the chosen's).
            reference_chosen_logps (Tensor): of the chosen responses under the reference, ``[B, S]``.
            reference_rejected_logps (Tensor): of the rejected responses under the reference, ``[B, S]``.
            chosen_mask (Tensor): True at the chosen responses' tokens, bool ``[B, S]``.
            rejected_mask (Tensor): True at the rejected responses' tokens, bool ``[B, S]``.

        Returns:
            tuple[Tensor, Tensor, Tensor]: losses, chosen rewards, rejected rewards, each float32 ``[B]``; rewards carry
                no gradient.
        """
        chosen_reward = self._reward(policy_chosen_logps, reference_chosen_logps, chosen_mask)
        rejected_reward = self._reward(policy_rejected_logps, reference_rejected_logps, rejected_mask)
        margin = chosen_reward - rejected_reward
        losses = -F.logsigmoid(margin) * (1 - self.label_smoothing) - F.logsigmoid(-margin) * self.label_smoothing
        return losses, chosen_reward.detach(), rejected_reward.detach()

    def _reward(self, policy_logps: Tensor, reference_logps: Tensor, mask: Tensor) -> Tensor:
        log_ratio = token_log_ratio(policy_logps, reference_logps, mask)
        return self.beta * humanline_clip(log_ratio, self.log_eps_P, self.log_eps_R).where(mask, 0.0).sum(-1)
