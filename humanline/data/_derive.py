"""Converts groups to the form that each objective learns from: pairs, labels or scores."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from humanline.data._dataset import GroupDataset
from humanline.data._group import Group
from humanline.errors import DataError

__all__ = ["as_labelled", "as_pairs", "as_scored", "best_and_worst"]


def as_pairs(dataset: GroupDataset) -> GroupDataset:
    """Reduces each scored group to the pair (highest score, lowest score); among equal scores the first one counts.

    Groups without a best and a worst response are dropped and counted in the report: those whose scores are all equal,
    or whose best and worst responses have the same tokens. Pairs stay unchanged. A dataset of pairs alone is returned
    as it is.

    Raises:
        DataError: if a group has no scores and is not a pair, or if no pair is left.
    """
    remedy = "provide scores that differ, or raise max_tokens if responses are cut to the same tokens"
    return _derive(dataset, _pair, lambda group: group.is_pair, "no best and worst response", remedy)


def as_labelled(dataset: GroupDataset) -> GroupDataset:
    """Labels each response: desirable if it is a pair's chosen one, or scored above its group's mean.

    A response scored exactly the mean is left out. Groups whose scores are all equal are dropped and counted in the
    report. Labelled groups stay unchanged. A dataset of labelled groups alone is returned as it is.

    Raises:
        DataError: if a group has no labels and no scores and is not a pair, or if no group is left.
    """
    remedy = "provide scores that differ within a group, or labels"
    return _derive(dataset, _labelled, lambda group: group.labels is not None, "all scores equal", remedy)


def as_scored(dataset: GroupDataset) -> GroupDataset:
    """Scores each response: 1 if it is a pair's chosen one or labelled desirable, else 0. Existing scores are kept.

    Groups whose scores are all equal have no advantages to learn from. They are dropped and counted in the report.

    Raises:
        DataError: if a group has no scores and no labels and is not a pair, or if no group is left.
    """
    remedy = "GRPO needs groups of several responses to a prompt with different scores (scored_groups)"
    return _derive(dataset, _scored, lambda _: False, "all scores equal", remedy)


def best_and_worst(values: Sequence[float]) -> tuple[int, int] | None:
    """Returns the indices of the highest and the lowest value, the first among equals; None if all are equal."""
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
    derived = dataset.derived(convert, why_dropped)
    if not len(derived):
        raise DataError(f"{dataset.name}: no group has a best and a worst response; {remedy}")
    return derived


def _pair(group: Group) -> Group | None:
    if group.is_pair:
        return group
    if group.scores is None:
        count, known = len(group.responses), "labels" if group.labels else "no scores"
        found = f"{count} responses with {known} make" if count > 1 else f"1 response with {known} makes"
        recipe = "a KTO recipe learns from labels; else " if group.labels else ""
        raise DataError(
            f"{group.id}: {found} no pair; {recipe}provide scores, or two responses with the chosen one first"
        )
    if (found_both := best_and_worst(group.scores)) is None:
        return None
    pair = replace(group.part(found_both), scores=None, labels=None, advantages=None)
    return None if list(pair.responses[0]) == list(pair.responses[1]) else pair


def _labelled(group: Group) -> Group | None:
    if group.labels is not None:
        return group
    scores = _scores(group)
    if best_and_worst(scores) is None:
        return None
    mean = math.fsum(scores) / len(scores)
    # The mean of 0.1, 0.2 and 0.3 differs from 0.2 by rounding, so "equal to the mean" needs a tolerance. It depends on
    # the spread of the scores, since scores may be large compared with their differences, or have a mean of 0.
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
        f"{group.id}: {len(group.responses)} responses without scores or labels do not say which is better; provide "
        "scores, labels, or two responses with the chosen one first"
    )
