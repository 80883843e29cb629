"""How the groups of a microbatch are dealt to the ranks."""

from hypothesis import given
from hypothesis import strategies as st

from humanline.training._passes import deal

SIZES = st.lists(st.integers(1, 2000), min_size=1, max_size=64)


@given(SIZES, st.integers(1, 9))
def test_each_group_goes_to_one_rank(sizes, ranks):
    hands = deal(sizes, ranks)
    assert len(hands) == ranks
    assert sorted(index for hand in hands for index in hand) == list(range(len(sizes)))


@given(SIZES, st.integers(1, 9))
def test_no_rank_has_more_than_another_by_more_than_the_largest_group(sizes, ranks):
    tokens = [sum(sizes[index] for index in hand) for hand in deal(sizes, ranks)]
    assert max(tokens) - min(tokens) <= max(sizes)


@given(st.lists(st.integers(1, 2000), min_size=8, max_size=64), st.integers(1, 8))
def test_no_rank_goes_empty_where_there_are_enough(sizes, ranks):
    assert all(deal(sizes, ranks))
