"""The unit of data: a prompt and its responses, as token ids.

A preference pair is a group of two responses. A KTO example is a group with labels. A GRPO group has scores. Files and
sampling both produce groups, so later stages do not depend on where a group comes from.
"""

from abc import abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

from humanline.errors import ConfigError, DataError

__all__ = ["Group", "LazyGroups", "TokenBudget"]


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and its G responses.

    Attributes:
        prompt (Sequence[int]): token ids, up to where generation starts.
        responses (tuple[Sequence[int], ...]): G sequences of token ids. Each ends with the end of the turn unless it
            was cut. In a pair the chosen response comes first.
        scores (tuple[float, ...] | None): one per response, higher is better; None if there are no scores.
        labels (tuple[bool, ...] | None): one per response, True if desirable; None if there are no labels.
        id (str): where the group comes from, for messages, such as "pairs.jsonl line 7".
        advantages (tuple[float, ...] | None): one per response, its score relative to the group; None until an
            objective computes them.
        logps (tuple[Sequence[float] | None, ...] | None): log-probs of each response's tokens under the policy that
            sampled it, nats, as reported by the engine; None for a response, or for all, if the engine reported none.
    """

    prompt: Sequence[int]
    responses: tuple[Sequence[int], ...]
    scores: tuple[float, ...] | None = None
    labels: tuple[bool, ...] | None = None
    id: str = ""
    advantages: tuple[float, ...] | None = None
    logps: tuple[Sequence[float] | None, ...] | None = field(default=None, compare=False)

    def part(self, indices: Sequence[int]) -> "Group":
        """Returns the group with only the responses at ``indices``, and their scores, labels, advantages and logps."""

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
        """Whether this is (chosen, rejected): two responses without scores or labels."""
        return len(self.responses) == 2 and self.scores is None and self.labels is None


class LazyGroups(Sequence[Group]):
    """Groups that are made when they are asked for. A subclass has ``__len__`` and :meth:`group`."""

    @abstractmethod
    def group(self, index: int) -> Group:
        """Returns the group at an index from 0."""

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> list[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | list[Group]:
        places = range(len(self))
        return [self.group(i) for i in places[index]] if isinstance(index, slice) else self.group(places[index])


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBudget:
    """The most tokens that a group may have; longer groups are cut.

    Attributes:
        max_tokens (int): most tokens of the prompt and one response together.
        max_prompt_tokens (int | None): the prompt is cut to this many tokens if its longest response does not fit
            with it; None never cuts a prompt.

    Raises:
        ConfigError: if the limits leave no room for a prompt or for a response.
    """

    max_tokens: int
    max_prompt_tokens: int | None

    def __post_init__(self) -> None:
        total, prompt = self.max_tokens, self.max_prompt_tokens
        if not isinstance(total, int) or total < 2:
            raise ConfigError(
                f"max_tokens: expected an integer of at least 2 (a prompt and a response), got {total!r}; raise it"
            )
        if prompt is None:
            return
        if not isinstance(prompt, int) or prompt < 1:
            raise ConfigError(
                f"max_prompt_tokens: expected an integer of at least 1, or null for no limit, got {prompt!r}"
            )
        if prompt >= total:
            raise ConfigError(
                f"max_prompt_tokens: {prompt} leaves no room for a response within max_tokens ({total}); "
                "lower it or raise max_tokens"
            )

    def fit(self, group: Group) -> Group:
        """Cuts a group to the budget; a group that fits is returned as it is.

        All responses share one prompt, so the prompt is cut once, if the longest response does not fit with it. A
        cut prompt keeps its first token (BOS, or the start of the turn) and its end (where the answer starts). A cut
        response loses its end.

        Raises:
            DataError: if the prompt leaves no room for a response.
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
