"""Groups in memory, with a one-line report about them."""

from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from torch.utils.data import Dataset

from humanline.data._group import Group, TokenBudget

__all__ = ["GroupDataset"]


class GroupDataset(Dataset[Group]):
    """Groups held in memory, in the order of their source.

    Args:
        groups (Sequence[Group]): the groups, at least one.
        name (str): name of their source, for messages.
        notes (Sequence[str]): phrases for the report about what was cut or dropped.
        budget (TokenBudget | None): limits that the groups were cut to; None uses the length of the longest prompt with
            its longest response.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        name: str = "memory",
        notes: Sequence[str] = (),
        budget: TokenBudget | None = None,
    ) -> None:
        self.groups = groups
        self.name = name
        self.notes = tuple(notes)
        self.budget = budget or TokenBudget(max_tokens=max(map(_length, groups)), max_prompt_tokens=None)

    def derived(self, groups: Sequence[Group], note: str | None) -> "GroupDataset":
        """Returns a dataset of ``groups`` derived from these, with one more note."""
        return GroupDataset(groups, self.name, [*self.notes, note] if note else self.notes, self.budget)

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
        prompts = [len(group.prompt) for group in self.groups]
        responses = [len(response) for group in self.groups for response in group.responses]
        lengths = (
            f"prompt/response tokens mean {sum(prompts) / len(prompts):.0f}/{sum(responses) / len(responses):.0f}, "
            f"max {max(prompts)}/{max(responses)}"
        )
        return f"{len(self):,} groups from {self.name}: " + "; ".join([*self.notes, lengths])


def _length(group: Group) -> int:
    return len(group.prompt) + max(map(len, group.responses))
