"""Preference pairs from scored groups: the best response against the worst."""

from humanline.data._dataset import GroupDataset
from humanline.data._group import Group
from humanline.errors import DataError

__all__ = ["as_pairs"]


def as_pairs(dataset: GroupDataset) -> GroupDataset:
    """Reduces each scored group to the pair (highest score, lowest score); of equal scores the first counts.

    Groups without a best and a worst (all scores equal, or both responses the same tokens) are dropped, and the report
    says how many. Pairs pass through, and a dataset of nothing but pairs is returned as it is.

    Raises:
        DataError: if a group is neither scored nor a pair, or if no pair is left.
    """
    if all(group.is_pair for group in dataset.groups):
        return dataset
    candidates = [_best_and_worst(group) for group in dataset.groups]
    pairs = [pair for pair in candidates if pair is not None]
    if not pairs:
        raise DataError(f"{dataset.name}: no group has a best and a worst response; give scores that differ")
    dropped = len(candidates) - len(pairs)
    notes = [f"{dropped:,} groups without a best and a worst response dropped"] if dropped else []
    return GroupDataset(pairs, dataset.name, [*dataset.notes, *notes])


def _best_and_worst(group: Group) -> Group | None:
    if group.is_pair:
        return group
    scores = group.scores
    if scores is None:
        found = f"{len(group.responses)} responses with {'labels' if group.labels else 'no scores'}"
        raise DataError(f"{group.id}: {found} make no pair; give scores, or two responses with the chosen one first")
    # max and min return the first of equals, so the same file always gives the same pairs.
    best = max(range(len(scores)), key=scores.__getitem__)
    worst = min(range(len(scores)), key=scores.__getitem__)
    chosen, rejected = group.responses[best], group.responses[worst]
    if scores[best] == scores[worst] or list(chosen) == list(rejected):
        return None
    return Group(group.prompt, (chosen, rejected), id=group.id)
