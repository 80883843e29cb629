"""What each objective makes of a pass: which groups it needs, which loss it has, what it logs."""

from typing import Any, Protocol

import torch
from torch import Tensor

from humanline.data import GroupDataset, Rows, as_pairs
from humanline.losses import HumanlineDPOLoss, token_log_ratio, unclamped
from humanline.training._metrics import Metrics


class Objective(Protocol):
    """The part of a recipe that differs between DPO, KTO and GRPO. It is made from the config's ``loss``."""

    def __init__(self, loss: Any) -> None: ...

    def examples(self, dataset: GroupDataset) -> GroupDataset:
        """Derives from any dataset the groups that the objective learns from."""

    def __call__(self, policy_logps: Tensor, reference_logps: Tensor, rows: Rows) -> tuple[Tensor, Metrics]:
        """The sum of the losses of the pass's groups (scalar), and what to log; log-probs are ``[N]``."""


class DPO:
    """Pairs: the chosen response of a group stands before the rejected one."""

    def __init__(self, loss: HumanlineDPOLoss) -> None:
        self.loss = loss

    def examples(self, dataset: GroupDataset) -> GroupDataset:
        return as_pairs(dataset)

    def __call__(self, policy_logps: Tensor, reference_logps: Tensor, rows: Rows) -> tuple[Tensor, Metrics]:
        policy, reference, mask = rows.per_response(policy_logps), rows.per_response(reference_logps), rows.mask
        chosen, rejected = slice(0, None, 2), slice(1, None, 2)
        losses, chosen_rewards, rejected_rewards = self.loss(
            policy[chosen], policy[rejected], reference[chosen], reference[rejected], mask[chosen], mask[rejected]
        )
        with torch.no_grad():
            margins = chosen_rewards - rejected_rewards
            metrics: Metrics = {
                "loss": (losses.sum(), len(losses)),
                "rewards/chosen": (chosen_rewards.sum(), len(losses)),
                "rewards/rejected": (rejected_rewards.sum(), len(losses)),
                "rewards/margins": (margins.sum(), len(losses)),
                "rewards/accuracies": ((margins > 0).sum(), len(losses)),
                "log_probs/chosen": (policy[chosen].sum(), len(losses)),
                "log_probs/rejected": (policy[rejected].sum(), len(losses)),
                "log_probs/accuracies": ((policy[chosen].sum(1) > policy[rejected].sum(1)).sum(), len(losses)),
                **reference_metrics(policy, reference, mask, self.loss.log_eps_P, self.loss.log_eps_R),
            }
        return losses.sum(), metrics


def reference_metrics(
    policy: Tensor, reference: Tensor, mask: Tensor, log_eps_P: float | None, log_eps_R: float | None
) -> Metrics:
    """What every objective logs of policy against reference, from token log-probs ``[B, S]``.

    ``kl`` is the mean over tokens of ``exp(-l_t) + l_t - 1``; ``unclamped`` the share of the tokens with non-zero
    ``l_t`` that the clip leaves alone (absent when no token moved).
    """
    log_ratio = token_log_ratio(policy, reference, mask)
    inside, moved = unclamped(log_ratio, mask, log_eps_P, log_eps_R)
    return {"kl": (((-log_ratio).exp() + log_ratio - 1).sum(), mask.sum()), "unclamped": (inside, moved)}
