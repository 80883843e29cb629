"""What each objective makes of a batch: which groups it needs, which loss it has, what it logs."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from humanline.data import Group, GroupDataset, Rows, TokenBudget, as_labelled, as_pairs, as_scored, best_and_worst
from humanline.errors import ConfigError
from humanline.losses import (
    HumanlineDPOLoss,
    HumanlineGRPOLoss,
    HumanlineKTOLoss,
    PerceptualLoss,
    group_advantages,
    token_kl,
    token_log_ratio,
    unclamped,
)
from humanline.models import LogProbDecoder, fixed_log_probs
from humanline.training._metrics import Metrics


class Objective(ABC):
    """The part of a recipe that differs between DPO, KTO and GRPO.

    Args:
        loss (Any): the config's ``loss``.

    Raises:
        ConfigError: if it is the loss of another objective.
    """

    loss_type: ClassVar[type[PerceptualLoss]]
    signal: ClassVar[str]
    """The metric that training raises."""
    whole_groups: ClassVar[bool] = False
    """Whether the loss needs a group's responses in one pass."""

    def __init__(self, loss: Any) -> None:
        if not isinstance(loss, self.loss_type):
            raise ConfigError(
                f"loss._component_: {type(loss).__name__} is not the loss of this recipe; give "
                f"humanline.losses.{self.loss_type.__name__} or a subclass of it"
            )
        self.loss: Any = loss

    def settings(self) -> dict[str, Any]:
        """What the loss was given, by name, defaults included."""
        given = {name: value for name, value in vars(self.loss).items() if name not in vars(nn.Module())}
        return {"loss": type(self.loss).__name__} | {
            name: value for name, value in given.items() if isinstance(value, str | int | float | None)
        }

    @abstractmethod
    def examples(self, dataset: GroupDataset) -> GroupDataset:
        """Derives from any dataset the groups that the objective learns from."""

    @abstractmethod
    def num_terms(self, groups: Sequence[Group]) -> int:
        """How many things the groups' loss is a mean over."""

    def normalizers(self, batch: list[list[Group]]) -> list[int]:
        """What the loss of each microbatch of a batch is divided by: the batch's loss is the mean of theirs."""
        return [self.num_terms(microbatch) * len(batch) for microbatch in batch]

    def __call__(
        self,
        policy_logps: Tensor,
        reference_logps: Tensor,
        rows: Rows,
        *,
        draws: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """The sum of the losses of a pass (scalar), and what to log of it.

        Every objective logs ``kl``, the mean over tokens of ``exp(-l_t) + l_t - 1``, and ``unclamped``, the share of
        the tokens with non-zero ``l_t`` that lie inside the bounds (absent when no token moved).

        Args:
            policy_logps (Tensor): token log-probs under the policy, nats, ``[N]``.
            reference_logps (Tensor): the same under the reference, ``[N]``.
            rows (Rows): the pass.
            draws (Tensor | None): uniforms for humanline sampling, ``[2, N]``.
            kl (Tensor | None): what :meth:`kl_baseline` gave, scalar, nats.
        """
        policy, reference = rows.per_response(policy_logps), rows.per_response(reference_logps)
        draws = None if draws is None else rows.per_response(draws)
        loss, metrics = self.loss_and_metrics(policy, reference, rows, draws, kl)
        log_ratio = token_log_ratio(policy.detach(), reference, rows.mask)
        return loss, metrics | {
            "kl": (token_kl(log_ratio).sum(), rows.mask.sum()),
            "unclamped": unclamped(log_ratio, rows.mask, *self.loss.bounds),
        }

    @abstractmethod
    def loss_and_metrics(
        self, policy: Tensor, reference: Tensor, rows: Rows, draws: Tensor | None, kl: Tensor | None
    ) -> tuple[Tensor, Metrics]:
        """The sum of the losses of a pass (scalar), and what this objective alone logs of it, without gradient.

        Args:
            policy (Tensor): token log-probs of the pass's responses under the policy, nats, ``[B, S]``; zero where
                ``rows.mask`` is False.
            reference (Tensor): the same under the reference, ``[B, S]``.
            rows (Rows): the pass.
            draws (Tensor | None): uniforms for humanline sampling, ``[2, B, S]``.
            kl (Tensor | None): what :meth:`kl_baseline` gave, scalar, nats.
        """

    # What an objective may say besides; so far only KTO does.

    def kl_groups(self, microbatch: Sequence[Group], budget: TokenBudget) -> list[Group]:
        """The KL sequences of a microbatch, cut to the budget, in a group for each of its groups."""
        return []

    def longest_kl_group(self, dataset: GroupDataset) -> Group | None:
        """A group as long as any that :meth:`kl_groups` can make."""
        return None

    def kl_baseline(self, policy: LogProbDecoder, passes: Iterable[tuple[Rows, int, Tensor]]) -> Tensor | None:
        """What the rewards of a microbatch are compared with, of all ranks alike: a scalar, nats, without gradient.

        Args:
            policy (LogProbDecoder): the policy.
            passes (Iterable[tuple[Rows, int, Tensor]]): this rank's part of :meth:`kl_groups` as passes, each with its
                weight (0 where it only keeps the other ranks company) and its reference log-probs, ``[N]``.
        """
        return None

    def check_microbatch(self, groups: int, key: str) -> None:
        """Raises ConfigError, naming ``key``, if a microbatch of so many groups, of all ranks, is too small."""
        return None

    def imbalance_warning(self, dataset: GroupDataset) -> str | None:
        """What to say of a dataset that leans to one side."""
        return None


class DPO(Objective):
    """Pairs: the chosen response of a group stands before the rejected one."""

    loss_type = HumanlineDPOLoss
    signal = "rewards/margins"
    whole_groups = True

    def examples(self, dataset: GroupDataset) -> GroupDataset:
        return as_pairs(dataset)

    def num_terms(self, groups: Sequence[Group]) -> int:
        return len(groups)

    def loss_and_metrics(
        self, policy: Tensor, reference: Tensor, rows: Rows, draws: Tensor | None, kl: Tensor | None
    ) -> tuple[Tensor, Metrics]:
        chosen, rejected = slice(0, None, 2), slice(1, None, 2)
        losses, chosen_rewards, rejected_rewards = self.loss(
            *(logps[side] for logps in (policy, reference, rows.mask) for side in (chosen, rejected)),
            *(None if draws is None else draws[:, side] for side in (chosen, rejected)),
        )
        margins = chosen_rewards - rejected_rewards
        log_probs = policy.detach().sum(1)
        return losses.sum(), {
            "rewards/chosen": (chosen_rewards.sum(), len(losses)),
            "rewards/rejected": (rejected_rewards.sum(), len(losses)),
            "rewards/margins": (margins.sum(), len(losses)),
            "rewards/accuracies": ((margins > 0).sum(), len(losses)),
            "log_probs/chosen": (log_probs[chosen].sum(), len(losses)),
            "log_probs/rejected": (log_probs[rejected].sum(), len(losses)),
            "log_probs/accuracies": ((log_probs[chosen] > log_probs[rejected]).sum(), len(losses)),
        }


class KTO(Objective):
    """Labelled responses: each is an example, those of one group share its prompt."""

    loss_type = HumanlineKTOLoss
    signal = "rewards/gain"

    def examples(self, dataset: GroupDataset) -> GroupDataset:
        return as_labelled(dataset)

    def num_terms(self, groups: Sequence[Group]) -> int:
        return sum(len(group.responses) for group in groups)

    def loss_and_metrics(
        self, policy: Tensor, reference: Tensor, rows: Rows, draws: Tensor | None, kl: Tensor | None
    ) -> tuple[Tensor, Metrics]:
        assert kl is not None
        labels = [group.labels or () for group in rows.groups]
        desirable = torch.tensor([label for group in labels for label in group], device=policy.device)
        losses, rewards = self.loss(policy, reference, rows.mask, desirable, kl, draws)
        gains = torch.where(desirable, rewards - kl, kl - rewards)
        log_probs = policy.detach().sum(1)
        return losses.sum(), {
            "rewards/desirable": (rewards.where(desirable, 0).sum(), desirable.sum()),
            "rewards/undesirable": (rewards.where(~desirable, 0).sum(), (~desirable).sum()),
            "rewards/gain": (gains.sum(), len(losses)),
            "rewards/accuracies": ((gains > 0).sum(), len(losses)),
            "kl_baseline": (kl * len(losses), len(losses)),
            "log_probs/desirable": (log_probs.where(desirable, 0).sum(), desirable.sum()),
            "log_probs/undesirable": (log_probs.where(~desirable, 0).sum(), (~desirable).sum()),
            "log_probs/accuracies": _accuracy(log_probs, labels),
        }

    def kl_groups(self, microbatch: Sequence[Group], budget: TokenBudget) -> list[Group]:
        """The prompt of each example with the response of the next one, the last with the first's.

        Examples are taken column by column: the first response of every group, then the second of every group that has
        one, and so on. In groups of equal size the next example then always has another prompt.
        """
        width = max(len(group.responses) for group in microbatch)
        examples = [(g, i) for i in range(width) for g, group in enumerate(microbatch) if i < len(group.responses)]
        responses: list[list[Sequence[int]]] = [[] for _ in microbatch]
        for (g, _), (next_g, i) in zip(examples, [*examples[1:], examples[0]], strict=True):
            responses[g].append(microbatch[next_g].responses[i])
        return [
            budget.fit(Group(group.prompt, tuple(ys), id=group.id))
            for group, ys in zip(microbatch, responses, strict=True)
        ]

    def longest_kl_group(self, dataset: GroupDataset) -> Group | None:
        # No sequence is longer than max_tokens, and a prompt that is a little shorter than the longest may stay whole.
        group = max(dataset.groups, key=lambda group: len(group.prompt))
        longest = max((response for group in dataset.groups for response in group.responses), key=len)
        response = longest[: dataset.budget.max_tokens - len(group.prompt)]
        return Group(group.prompt, (response,), id=f"{group.id} with the longest response (a KL sequence of KTO)")

    def kl_baseline(self, policy: LogProbDecoder, passes: Iterable[tuple[Rows, int, Tensor]]) -> Tensor:
        """``z0`` over the KL sequences of all ranks, in passes without gradient; a collective."""
        sums = [
            weight
            * self.loss.kl_sum(
                rows.per_response(fixed_log_probs(policy, rows)), rows.per_response(reference_logps), rows.mask
            )
            for rows, weight, reference_logps in passes
        ]
        total = torch.stack(sums).sum(0)
        dist.all_reduce(total)
        baseline: Tensor = self.loss.baseline(total)
        return baseline

    def check_microbatch(self, groups: int, key: str) -> None:
        if groups < 2:
            raise ConfigError(
                f"{key}: {groups} group in a microbatch is too few; KTO pairs each prompt with the response to another "
                "one, so give 2 or more (gradient accumulation does not help)"
            )

    def imbalance_warning(self, dataset: GroupDataset) -> str | None:
        desirable = sum(sum(group.labels or ()) for group in dataset)
        undesirable = self.num_terms(dataset.groups) - desirable
        counts = f"{desirable:,} desirable and {undesirable:,} undesirable examples"
        if not (desirable and undesirable):
            return f"dataset: {counts}; KTO has nothing to set one kind against"
        ratio = self.loss.desirable_weight * desirable / (self.loss.undesirable_weight * undesirable)
        if 1 - 1e-9 <= ratio <= 4 / 3 + 1e-9:  # 1.16 * 25 is below 29 in floating point
            return None
        low = self.loss.undesirable_weight * undesirable / desirable
        return (
            f"loss.desirable_weight: {counts} weigh {ratio:.3g} to 1, which is outside [1, 4/3]; set it "
            f"between {math.ceil(low * 1e4) / 1e4} and {math.floor(low * 4e4 / 3) / 1e4}"
        )


class GRPO(Objective):
    """Scored groups: a response's advantage is its score beside those of its group."""

    loss_type = HumanlineGRPOLoss
    signal = "advantages/gain"

    def examples(self, dataset: GroupDataset) -> GroupDataset:
        scored = as_scored(dataset)
        return scored.derived([_with_advantages(group) for group in scored], None)

    def num_terms(self, groups: Sequence[Group]) -> int:
        if self.loss.aggregation == "sequence":
            return sum(len(group.responses) for group in groups)
        return sum(len(response) for group in groups for response in group.responses)

    def normalizers(self, batch: list[list[Group]]) -> list[int]:
        if self.loss.aggregation == "dapo":
            return [sum(map(self.num_terms, batch))] * len(batch)
        return super().normalizers(batch)

    def loss_and_metrics(
        self, policy: Tensor, reference: Tensor, rows: Rows, draws: Tensor | None, kl: Tensor | None
    ) -> tuple[Tensor, Metrics]:
        scores = [group.scores or () for group in rows.groups]
        advantages = torch.tensor([a for group in rows.groups for a in group.advantages or ()], device=policy.device)
        loss = self.loss(policy, reference, rows.mask, advantages, draws, normalizer=1)
        log_probs = policy.detach().sum(1)
        return loss, {
            "rewards/mean": (sum(map(sum, scores)), len(advantages)),
            "advantages/abs": (advantages.abs().sum(), len(advantages)),
            "advantages/gain": ((advantages * (policy.detach() - reference).sum(1)).sum(), len(advantages)),
            "log_probs/accuracies": _accuracy(log_probs, scores),
        }


def _with_advantages(group: Group) -> Group:
    scores = torch.tensor(group.scores, dtype=torch.float64)
    return replace(group, advantages=tuple(group_advantages(scores, torch.zeros(len(scores))).tolist()))


def _accuracy(log_probs: Tensor, values: Sequence[Sequence[float]]) -> tuple[Tensor, int]:
    """In how many groups the best response is likelier than the worst, and in how many there is a best and a worst.

    ``log_probs`` has those of all the groups' responses, ``[B]``, ``values`` says what each is worth. The parts of a
    group that was cut count as groups.
    """
    best, worst, start = [], [], 0
    for group in values:
        if (found := best_and_worst(group)) is not None:
            best.append(start + found[0])
            worst.append(start + found[1])
        start += len(group)
    return (log_probs[best] > log_probs[worst]).sum(), len(best)
