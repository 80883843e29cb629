"""Assigns prompts to rounds and rounds to optimizer steps, before sampling."""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from humanline._seeds import stream_seed
from humanline.data import Group, GroupDataset, TokenBudget
from humanline.errors import ConfigError

if TYPE_CHECKING:
    from humanline.rollout._online_source import OnlineSource


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How groups are divided into optimizer steps.

    Attributes:
        batch_size (int): groups in a microbatch of one rank.
        accumulation (int): microbatches in an optimizer step.
        world_size (int): number of ranks.
        seed (int): seed of the order and of all draws.
        shuffle (bool): whether the order is random; False keeps the file's order.
        max_steps_per_epoch (int | None): optimizer steps after which an epoch ends; None uses all data.
    """

    batch_size: int
    accumulation: int
    world_size: int
    seed: int
    shuffle: bool
    max_steps_per_epoch: int | None = None


class RoundPlan:
    """The encoded prompts of a source, and their order over rounds and epochs.

    Args:
        source (OnlineSource): the source's settings.
        tokenizer (Any): a ``ChatTokenizer``.
        steps (Steps): how groups are divided into optimizer steps.

    Attributes:
        groups_per_step (int): groups in an optimizer step, over all ranks.
        steps_per_epoch (int): optimizer steps in an epoch.
        round_size (int): prompts in a round.
        budget (TokenBudget): the maximum length of a sampled sequence.

    Raises:
        ConfigError: if there are too few prompts for one round.
    """

    def __init__(self, source: "OnlineSource", tokenizer: Any, steps: Steps) -> None:
        self.source, self.tokenizer, self.steps = source, tokenizer, steps
        self.every, self.params = source.every, source.params
        self.groups_per_step = steps.batch_size * steps.accumulation * steps.world_size
        self.round_size = source.groups_per_round or self.every * self.groups_per_step
        self.prompts, self.prompt_ids = [], []
        for prompt in source.all_prompts:
            ids = prompt.encoded(tokenizer)
            if source.max_prompt_tokens is None or len(ids) <= source.max_prompt_tokens:
                self.prompts.append(prompt)
                self.prompt_ids.append(ids)
        if len(self.prompts) < self.round_size:
            raise ConfigError(
                f"source.groups_per_round: a round needs {self.round_size} prompts, and {len(self.prompts)} of "
                f"{len(source.all_prompts)} are within max_prompt_tokens; lower it, or add prompts"
            )
        self.rounds_per_epoch = len(self.prompts) // self.round_size
        all_steps = self.rounds_per_epoch * self.every
        self.steps_per_epoch = min(all_steps, steps.max_steps_per_epoch or all_steps)
        self.budget = TokenBudget(
            max_tokens=max(map(len, self.prompt_ids)) + self.params.max_new_tokens, max_prompt_tokens=None
        )

    def prompts_of(self, round: int) -> list[int]:
        """Returns the prompts of a round, as indices into ``prompts``."""
        epoch, index = divmod(round, self.rounds_per_epoch)
        order = self.order(len(self.prompts), stream_seed("prompts of an epoch", self.steps.seed, epoch))
        return order[index * self.round_size :][: self.round_size]

    def order(self, count: int, seed: int) -> list[int]:
        """Returns a random order of ``count`` items; with ``shuffle: False`` the given order."""
        if not self.steps.shuffle:
            return list(range(count))
        order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        return order

    def longest(self) -> GroupDataset:
        """Returns a dataset of one group with the maximum length that can be sampled."""
        prompt = max(self.prompt_ids, key=len)
        count = self.params.samples_per_prompt
        responses = tuple([i] * self.params.max_new_tokens for i in range(count))
        scores = tuple((self.source.desirable_above or 0.0) + i for i in range(count))
        group = Group(prompt, responses, scores, id="source: the longest prompt and responses")
        return GroupDataset([self.source.labelled(group)])

    def left_out(self) -> list[str]:
        """Returns a log line for each reason why prompts, groups or the system prompt are not used."""
        count, most, used = (
            len(self.prompts),
            self.source.max_prompt_tokens,
            self.rounds_per_epoch * self.round_size,
        )
        taken = self.every * self.groups_per_step
        everything = len(self.source.all_prompts)
        lines = []
        if own := self.source.own_system_messages:
            lines.append(f"{own:,} of {everything:,} prompts keep their own system message instead of system_prompt")
        if count < everything:
            lines.append(
                f"{everything - count:,} of {everything:,} prompts are left out: they exceed max_prompt_tokens: {most}"
            )
        if used < count:
            which = "a different choice in each" if self.steps.shuffle else "the last ones"
            lines.append(
                f"{count - used:,} of {count:,} prompts are left out of every epoch ({which}): its "
                f"{self.rounds_per_epoch:,} rounds need {self.round_size} each"
            )
        if self.round_size > taken:
            lines.append(
                f"a round samples {self.round_size} prompts and its steps need {taken} groups: the others are not "
                "trained on (rounds/unused counts them)"
            )
        return [f"source: {line}" for line in lines]

    def digest(self) -> str:
        """Returns everything that the groups depend on, except the policy."""
        return f"{self.rounds()}, {self.changeable()}"

    def rounds(self) -> str:
        """Returns the settings that assign groups to step numbers; a resumed run may not change them."""
        return (
            f"{self.round_size} prompts a round, every {self.every} steps, max_new_tokens {self.params.max_new_tokens}"
        )

    def changeable(self) -> dict[str, Any]:
        """Returns the settings that a resumed run may change; they apply to rounds that are not sampled yet."""
        ids = hashlib.blake2b(json.dumps([list(ids) for ids in self.prompt_ids]).encode(), digest_size=8).hexdigest()
        return {
            "source.prompts": f"{len(self.prompts)} ({ids})",
            "source.generations": self.params.samples_per_prompt,
            "source.temperature": self.params.temperature,
            "source.top_p": self.params.top_p,
            "source.equal_scores": self.source.equal_scores,
            "source.desirable_above": self.source.desirable_above,
            "shuffle": self.steps.shuffle,
        }
