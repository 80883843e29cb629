"""What each objective learns from, derived from whatever groups there are: pairs, labels or scores."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from humanline.data._dataset import GroupDataset
from humanline.data._group import Group
from humanline.errors import DataError

__all__ = ["as_labelled", "as_pairs", "as_scored", "best_and_worst"]


def as_pairs(dataset: GroupDataset) -> GroupDataset:
    """Reduces each scored group to the pair (highest score, lowest score); of equal scores the first counts.

    Groups without a best and a worst (all scores equal, or both responses the same tokens) are dropped, and the report
    says how many. Pairs pass through, and a dataset of nothing but pairs is returned as it is.

    Raises:
        DataError: if a group is neither scored nor a pair, or if no pair is left.
    """
    remedy = "give scores that differ, or raise max_tokens where responses are cut to the same tokens"
    return _derive(dataset, _pair, lambda group: group.is_pair, "without a best and a worst response", remedy)


def as_labelled(dataset: GroupDataset) -> GroupDataset:
    """Gives each response a label: a pair's chosen one is desirable, and so is one scored above its group's mean.

    A response scored exactly the mean is neither and is left out; so are groups whose scores are all equal, and the
    report says how many. Labelled groups pass through, and a dataset of nothing else is returned as it is.

    Raises:
        DataError: if a group has neither labels nor scores and is no pair, or if no group is left.
    """
    remedy = "give scores that differ within a group, or labels"
    return _derive(dataset, _labelled, lambda group: group.labels is not None, "whose scores are all equal", remedy)


def as_scored(dataset: GroupDataset) -> GroupDataset:
    """Gives each response a score: 1 for the chosen one of a pair and for a desirable one, 0 for the others.

    Groups whose scores are all equal have no advantages to learn from: they are skipped, and the report says how many.

    Raises:
        DataError: if a group has neither scores nor labels and is no pair, or if no group is left.
    """
    remedy = "GRPO compares several responses to a prompt in one group, whose scores differ (scored_groups)"
    return _derive(dataset, _scored, lambda _: False, "whose scores are all equal", remedy)


def best_and_worst(values: Sequence[float]) -> tuple[int, int] | None:
    """Where the highest and the lowest value stand, the first of equals; None where all are equal."""
    best = max(range(len(values)), key=values.__getitem__)
    worst = min(range(len(values)), key=values.__getitem__)
    return None if values[best] == values[worst] else (best, worst)


def _derive(
    dataset: GroupDataset,
    convert: Callable[[Group], Group | None],
    is_derived: Callable[[Group], bool],
    why_dropped: str,
    remedy: str,
) -> GroupDataset:
    if all(map(is_derived, dataset.groups)):
        return dataset
    groups = [derived for group in dataset.groups if (derived := convert(group)) is not None]
    if not groups:
        raise DataError(f"{dataset.name}: no group has a best and a worst response; {remedy}")
    dropped = len(dataset.groups) - len(groups)
    return dataset.derived(groups, f"{dropped:,} groups {why_dropped} dropped" if dropped else None)


def _pair(group: Group) -> Group | None:
    if group.is_pair:
        return group
    if group.scores is None:
        found = f"{len(group.responses)} responses with {'labels' if group.labels else 'no scores'}"
        raise DataError(f"{group.id}: {found} make no pair; give scores, or two responses with the chosen one first")
    if (found_both := best_and_worst(group.scores)) is None:
        return None
    chosen, rejected = (group.responses[i] for i in found_both)
    return None if list(chosen) == list(rejected) else Group(group.prompt, (chosen, rejected), id=group.id)


def _labelled(group: Group) -> Group | None:
    if group.labels is not None:
        return group
    scores = _scores(group)
    if best_and_worst(scores) is None:
        return None
    mean = math.fsum(scores) / len(scores)
    # Rounding makes the mean of 0.1, 0.2 and 0.3 another number than 0.2. What is near is a matter of the scores'
    # spread: they may be large beside their differences, and their mean may be 0.
    near = max(1e-9 * (max(scores) - min(scores)), 2 * math.ulp(max(map(abs, scores))))
    kept = [i for i, score in enumerate(scores) if abs(score - mean) > near]
    return replace(group.part(kept), scores=None, labels=tuple(scores[i] > mean for i in kept)) if kept else None


def _scored(group: Group) -> Group | None:
    scores = _scores(group)
    return None if best_and_worst(scores) is None else replace(group, scores=scores, labels=None)


def _scores(group: Group) -> tuple[float, ...]:
    if group.scores is not None:
        return group.scores
    if group.labels is not None:
        return tuple(map(float, group.labels))
    if group.is_pair:
        return (1.0, 0.0)
    raise DataError(
        f"{group.id}: {len(group.responses)} responses without scores or labels say nothing of which is better; give "
        "scores, labels, or two responses with the chosen one first"
    )
