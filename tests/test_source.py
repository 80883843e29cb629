"""Which groups are trained on at which step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from humanline.data import Group, GroupDataset, OfflineSource
from humanline.errors import ConfigError


def source(count, *, batch_size=2, accumulation=1, world_size=1, seed=0, shuffle=True):
    dataset = GroupDataset([Group([i], ([i], [i + 1]), id=str(i)) for i in range(count)])
    return OfflineSource(
        dataset,
        batch_size=batch_size,
        accumulation=accumulation,
        world_size=world_size,
        seed=seed,
        shuffle=shuffle,
    )


def ids(groups):
    return [int(group.id) for group in groups]


def epoch(source, index=0):
    steps = range(index * source.steps_per_epoch + 1, (index + 1) * source.steps_per_epoch + 1)
    return [i for step in steps for microbatch in source.batch(step) for i in ids(microbatch)]


@given(st.integers(12, 60), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.booleans())
def test_any_number_of_ranks_sees_the_same_microbatches(count, batch_size, accumulation, world_size, shuffle):
    shape = {"accumulation": accumulation, "shuffle": shuffle}
    if count < batch_size * accumulation * world_size:
        return
    alone = source(count, batch_size=batch_size * world_size, **shape)
    together = source(count, batch_size=batch_size, world_size=world_size, **shape)
    for step in (1, alone.steps_per_epoch, alone.steps_per_epoch + 1):
        assert [len(microbatch) for microbatch in alone.batch(step)] == [batch_size * world_size] * accumulation
        assert list(map(ids, alone.batch(step))) == list(map(ids, together.batch(step)))


def test_an_epoch_has_every_group_once_in_an_order_of_its_own():
    shuffled = source(20)
    first, second = epoch(shuffled, 0), epoch(shuffled, 1)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second and first != list(range(20))
    assert epoch(source(20)) == first
    assert epoch(source(20, seed=1)) != first


def test_without_shuffling_every_epoch_has_the_dataset_s_order():
    plain = source(20, shuffle=False)
    assert epoch(plain, 0) == epoch(plain, 1) == list(range(20))


def test_groups_that_do_not_fill_a_step_are_left_out():
    assert len(epoch(source(21, batch_size=4))) == 20


def test_a_dataset_smaller_than_a_step_is_refused():
    with pytest.raises(ConfigError, match="batch_size: a step needs 4 x 2 accumulated x 3 ranks = 24 groups"):
        source(23, batch_size=4, accumulation=2, world_size=3)
