"""The groups that each objective learns from. The call of its loss and its metrics are in its recipe."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import nn

from humanline.data import Group, GroupDataset, TokenBudget, as_labelled, as_pairs, as_scored
from humanline.errors import ConfigError
from humanline.losses import (
    HumanlineDPOLoss,
    HumanlineGRPOLoss,
    HumanlineKTOLoss,
    PerceptualLoss,
)


class Objective(ABC):
    """Derives the groups that DPO, KTO or GRPO learns from.

    Args:
        loss (Any): the config's ``loss``.

    Raises:
        ConfigError: if the loss belongs to another objective.
    """

    loss_type: ClassVar[type[PerceptualLoss]]
    signal: ClassVar[str]
    """The metric that training should raise."""
    whole_groups: ClassVar[bool] = False
    """Whether the loss needs a group's responses in one pass."""

    def __init__(self, loss: Any) -> None:
        if not isinstance(loss, self.loss_type):
            raise ConfigError(
                f"loss._component_: expected humanline.losses.{self.loss_type.__name__} or a subclass, got "
                f"{type(loss).__name__}; correct it, or use another recipe"
            )
        self.loss: Any = loss

    def settings(self) -> dict[str, Any]:
        """Returns the loss's settings by name, with its defaults."""
        given = {name: value for name, value in vars(self.loss).items() if name not in vars(nn.Module())}
        return {"loss": type(self.loss).__name__} | {
            name: value for name, value in given.items() if isinstance(value, str | int | float | None)
        }

    @abstractmethod
    def examples(self, dataset: GroupDataset) -> GroupDataset:
        """Returns the objective's groups, derived from any dataset."""

    def divisors(self, batch: Sequence[Sequence[Group]]) -> list[int]:
        """Returns a divisor for each microbatch's sum of losses; the quotients sum to the loss of the batch."""
        return self.loss.divisors([lengths_of(microbatch) for microbatch in batch])

    # Optional methods, which so far only KTO overrides.

    def kl_groups(self, microbatch: Sequence[Group], budget: TokenBudget) -> list[Group]:
        """Returns the KL sequences of a microbatch, cut to the budget: one group for each of its groups."""
        return []

    def longest_kl_group(self, dataset: GroupDataset) -> Group | None:
        """Returns a group with the maximum length that :meth:`kl_groups` can return."""
        return None

    def check_microbatch(self, groups: int, key: str) -> None:
        """Raises ConfigError, naming ``key``, if a microbatch with ``groups`` groups over all ranks is too small."""
        return None

    def imbalance_warning(self, dataset: GroupDataset) -> str | None:
        """Returns a warning if the dataset is imbalanced, else None."""
        return None


class DPO(Objective):
    """Pairs: a group's chosen response comes before the rejected one."""

    loss_type = HumanlineDPOLoss
    signal = "rewards/margins"
    whole_groups = True

    def examples(self, dataset: GroupDataset) -> GroupDataset:
        return as_pairs(dataset)


class KTO(Objective):
    """Labelled responses: each response is an example; the responses of a group share its prompt."""

    loss_type = HumanlineKTOLoss
    signal = "rewards/gain"

    def examples(self, dataset: GroupDataset) -> GroupDataset:
        return as_labelled(dataset)

    def kl_groups(self, microbatch: Sequence[Group], budget: TokenBudget) -> list[Group]:
        """Pairs the prompt of each example with the response of the next one, and the last with the first.

        Examples are ordered column by column: the first response of every group, then the second of every group that
        has one, and so on. In groups of equal size the next example then always has another prompt.
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
        # No sequence is longer than max_tokens, and a prompt slightly shorter than the longest may stay whole.
        group = max(dataset.groups, key=lambda group: len(group.prompt))
        longest = max((response for group in dataset.groups for response in group.responses), key=len)
        response = longest[: dataset.budget.max_tokens - len(group.prompt)]
        return Group(group.prompt, (response,), id=f"{group.id} with the longest response (a KL sequence of KTO)")

    def check_microbatch(self, groups: int, key: str) -> None:
        if groups < 2:
            raise ConfigError(
                f"{key}: expected 2 or more groups in a microbatch, got {groups}; KTO pairs each prompt with the "
                "response to another one (gradient accumulation does not help)"
            )

    def imbalance_warning(self, dataset: GroupDataset) -> str | None:
        desirable = sum(sum(group.labels or ()) for group in dataset)
        undesirable = sum(len(group.responses) for group in dataset) - desirable
        counts = f"{desirable:,} desirable and {undesirable:,} undesirable examples"
        if not (desirable and undesirable):
            return f"dataset: {counts}; KTO needs both kinds"
        ratio = self.loss.desirable_weight * desirable / (self.loss.undesirable_weight * undesirable)
        if 1 - 1e-9 <= ratio <= 4 / 3 + 1e-9:  # 1.16 * 25 is below 29 in floating point
            return None
        low = self.loss.undesirable_weight * undesirable / desirable
        return (
            f"loss.desirable_weight: {counts} weigh {ratio:.3g} to 1, expected a ratio in [1, 4/3]; set it "
            f"between {math.ceil(low * 1e4) / 1e4} and {math.floor(low * 4e4 / 3) / 1e4}"
        )


class GRPO(Objective):
    """Scored groups: a response's advantage is its score relative to the scores of its group."""

    loss_type = HumanlineGRPOLoss
    signal = "advantages/gain"

    def examples(self, dataset: GroupDataset) -> GroupDataset:
        @lru_cache(maxsize=1 << 16)  # groups with two different scores have few combinations
        def advantages(scores: tuple[float, ...]) -> tuple[float, ...]:
            each = torch.tensor(scores, dtype=torch.float64)
            return tuple(self.loss.advantages(each, torch.zeros(len(each))).tolist())

        def with_advantages(group: Group) -> Group:
            return replace(group, advantages=advantages(group.scores or ()))

        return as_scored(dataset).derived(with_advantages)


def lengths_of(groups: Sequence[Group]) -> list[int]:
    """Returns the number of tokens in each response of the groups."""
    return [len(response) for group in groups for response in group.responses]
