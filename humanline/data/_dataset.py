"""Datasets of groups, with a one-line report about them."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b

from torch.utils.data import Dataset

from humanline.data._group import Group, LazyGroups, TokenBudget

__all__ = ["GroupDataset"]


class GroupDataset(Dataset[Group]):
    """Groups in the order of their source.

    Args:
        groups (Sequence[Group]): the groups, at least one.
        name (str): name of their source, for messages.
        notes (Sequence[str]): phrases for the report about what was cut or dropped.
        budget (TokenBudget | None): limits that the groups were cut to; None uses the length of the longest prompt with
            its longest response.
        dropped (int): rows and groups of the source that are left out.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        name: str = "memory",
        notes: Sequence[str] = (),
        budget: TokenBudget | None = None,
        dropped: int = 0,
    ) -> None:
        self.groups = groups
        self.name = name
        self.notes = tuple(notes)
        self.budget = budget or TokenBudget(max_tokens=max(map(_length, groups)), max_prompt_tokens=None)
        self.dropped = dropped

    def derived(self, convert: Callable[[Group], Group | None], why_dropped: str = "") -> "GroupDataset":
        """Returns the dataset of converted groups, without those that become None; the report counts these."""
        kept = array("q", (i for i, group in enumerate(self.groups) if convert(group) is not None))
        dropped = len(self.groups) - len(kept)
        note = [f"{dropped:,} groups dropped ({why_dropped})"] if dropped else []
        groups = _Derived(self.groups, kept, convert)
        return GroupDataset(groups, self.name, [*self.notes, *note], self.budget, self.dropped + dropped)

    def digest(self) -> str:
        """Returns a digest of all tokens, scores and labels, in order."""
        total = blake2b(digest_size=8)
        for group in self.groups:
            for tokens in (group.prompt, *group.responses):
                total.update(len(tokens).to_bytes(4, "little"))
                total.update(array("i", tokens))
            total.update(f"{group.scores} {group.labels}".encode())
        return total.hexdigest()

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Group:
        return self.groups[index]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def report(self) -> str:
        """Returns one line: number of groups, source, what was cut or dropped, and lengths in tokens."""
        prompts, responses = array("q"), array("q")
        for group in self.groups:
            prompts.append(len(group.prompt))
            responses.extend(map(len, group.responses))
        lengths = (
            f"prompt/response tokens mean {sum(prompts) / len(prompts):.0f}/{sum(responses) / len(responses):.0f}, "
            f"max {max(prompts)}/{max(responses)}"
        )
        return f"{len(self):,} group{'s' * (len(self) != 1)} from {self.name}: " + "; ".join([*self.notes, lengths])


class _Derived(LazyGroups):
    """Some of the groups, each converted when it is asked for, so that they need no memory of their own."""

    def __init__(self, groups: Sequence[Group], kept: Sequence[int], convert: Callable[[Group], Group | None]) -> None:
        self._groups, self._kept, self._convert = groups, kept, convert

    def __len__(self) -> int:
        return len(self._kept)

    def group(self, index: int) -> Group:
        group = self._convert(self._groups[self._kept[index]])
        assert group is not None
        return group


def _length(group: Group) -> int:
    return len(group.prompt) + max(map(len, group.responses))
