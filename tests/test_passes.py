"""How the groups of a microbatch are dealt to the ranks."""

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from humanline.data import Group, RowBudget, TokenBudget
from humanline.losses import HumanlineGRPOLoss
from humanline.training import GRPO
from humanline.training._passes import Passes, deal

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


def test_over_the_ranks_each_response_has_a_place_of_its_own():
    microbatch = [Group([1, 2], tuple([3] * (4 + i) for _ in range(2 + i))) for i in range(5)]
    taken = []
    for rank in range(3):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=3)
        try:  # rows so short that groups are cut
            passes = Passes(
                objective=GRPO(HumanlineGRPOLoss()),
                budget=RowBudget(tokens_per_row=16),
                limits=TokenBudget(max_tokens=16, max_prompt_tokens=None),
                device=torch.device("cpu"),
                seed=0,
            )
            for first, group in zip(passes.places(microbatch), passes.share(microbatch), strict=True):
                taken += [(first + i, tuple(response)) for i, response in enumerate(group.responses)]
        finally:
            dist.destroy_process_group()
    assert sorted(taken) == list(enumerate(tuple(response) for group in microbatch for response in group.responses))
