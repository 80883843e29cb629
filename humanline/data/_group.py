"""The one unit of data: a prompt and the responses to it, as token ids.

A preference pair is a group of two responses, a KTO example a group with labels, a GRPO group one with scores. Files
and models that sample are both sources of groups, so nothing downstream asks where a group came from.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from humanline.errors import ConfigError, DataError

__all__ = ["Group", "TokenBudget"]


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and the G responses to it.

    Attributes:
        prompt (Sequence[int]): token ids, ending where generation starts.
        responses (tuple[Sequence[int], ...]): G sequences of token ids, each ending with the end of the turn unless it
            was cut. In a pair the chosen one stands first.
        scores (tuple[float, ...] | None): one a response, higher is better; None when nothing was scored.
        labels (tuple[bool, ...] | None): one a response, True when it is desirable; None when nothing was labelled.
        advantages (tuple[float, ...] | None): one a response, its score beside those of the group; None until an
            objective needs them.
        id (str): where the group comes from, for people, such as "pairs.jsonl line 7".
        logps (tuple[Sequence[float] | None, ...] | None): the log-probs of each response's tokens under the policy that
            sampled it, nats, as its engine gave them; None for a response, or for all, where it gave none.
    """

    prompt: Sequence[int]
    responses: tuple[Sequence[int], ...]
    scores: tuple[float, ...] | None = None
    labels: tuple[bool, ...] | None = None
    id: str = ""
    advantages: tuple[float, ...] | None = None
    logps: tuple[Sequence[float] | None, ...] | None = field(default=None, compare=False)

    def part(self, indices: Sequence[int]) -> "Group":
        """The group with only some of its responses, and what belongs to them."""

        def of(values: Any) -> Any:
            return None if values is None else tuple(values[i] for i in indices)

        return replace(
            self,
            responses=of(self.responses),
            scores=of(self.scores),
            labels=of(self.labels),
            advantages=of(self.advantages),
            logps=of(self.logps),
        )

    @property
    def is_pair(self) -> bool:
        """Whether this is (chosen, rejected): two responses, and only their order tells which is better."""
        return len(self.responses) == 2 and self.scores is None and self.labels is None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBudget:
    """How long a group may be, in tokens, and how it is cut when it is longer.

    Attributes:
        max_tokens (int): the most tokens of the prompt and one response together.
        max_prompt_tokens (int | None): what a prompt is cut to when its longest response does not fit beside it; None
            never cuts a prompt.

    Raises:
        ConfigError: if the two leave no room for a prompt or for a response.
    """

    max_tokens: int
    max_prompt_tokens: int | None

    def __post_init__(self) -> None:
        total, prompt = self.max_tokens, self.max_prompt_tokens
        if not isinstance(total, int) or total < 2:
            raise ConfigError(
                f"max_tokens: {total!r} leaves no room for a prompt and a response; give an integer of at least 2"
            )
        if prompt is None:
            return
        if not isinstance(prompt, int) or prompt < 1:
            raise ConfigError(
                f"max_prompt_tokens: {prompt!r} leaves nothing of a prompt; give an integer of at least 1, or null"
            )
        if prompt >= total:
            raise ConfigError(
                f"max_prompt_tokens: {prompt} leaves no room for a response within max_tokens ({total}); "
                "lower it or raise max_tokens"
            )

    def fit(self, group: Group) -> Group:
        """Cuts a group to the budget; one that fits comes back as it is.

        The responses share their prompt, so it is cut once, when the longest of them does not fit beside it. A prompt
        loses its middle: its first token (BOS, or what opens the turn) and its end (where the answer starts) stay.
        A response loses its end.

        Raises:
            DataError: if a prompt that may not be cut leaves no room for a response.
        """
        prompt, limit = group.prompt, self.max_prompt_tokens
        if len(prompt) + max(map(len, group.responses)) <= self.max_tokens:
            return group
        if limit is not None and len(prompt) > limit:
            prompt = array("i", (prompt[0], *prompt[len(prompt) - limit + 1 :]))
        room = self.max_tokens - len(prompt)
        if room < 1:
            raise DataError(
                f"{group.id}: the prompt's {len(prompt)} tokens leave no room for a response within max_tokens "
                f"({self.max_tokens}); raise max_tokens or set max_prompt_tokens"
            )
        return replace(group, prompt=prompt, responses=tuple(response[:room] for response in group.responses))
