"""Rows: packed groups with shared prompts give the log-probs of one padded sequence a response."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_2 import llama3_2

from humanline.data import Group, RowBudget, lay_out, pack
from humanline.errors import ConfigError, DataError
from humanline.models import LogProbDecoder, log_probs

VOCAB = 64
SHAPE = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "max_seq_len": 256,
    "intermediate_dim": 64,
}


@pytest.fixture(scope="module", params=["untied", "tied"])
def decoder(request):
    torch.manual_seed(0)
    decoder = llama3(**SHAPE) if request.param == "untied" else llama3_2(**SHAPE)
    torch.nn.init.normal_(decoder.tok_embeddings.weight, std=0.2)  # logits of an ordinary size also where they are tied
    return decoder


def one_sequence_each(decoder, groups):
    """The definition: softmax of full logits over prompt + response, one response at a time."""
    logps = []
    for group in groups:
        for response in group.responses:
            tokens = torch.tensor([*group.prompt, *response])
            logits = decoder(tokens[None])[0].log_softmax(-1)
            start = len(group.prompt)
            logps.append(logits[start - 1 : -1].gather(1, tokens[start:, None]).squeeze(1))
    return logps


tokens = st.integers(0, VOCAB - 1)
sequences = st.lists(tokens, min_size=1, max_size=12)
groups = st.lists(
    st.builds(Group, prompt=sequences, responses=st.lists(sequences, min_size=1, max_size=4).map(tuple)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60)
@given(groups=groups, tokens_per_row=st.integers(24, 70) | st.integers(129, 600), fixed_shape=st.booleans())
def test_log_probs_from_rows_equal_those_from_one_sequence_each(decoder, groups, tokens_per_row, fixed_shape):
    budget = RowBudget(tokens_per_row=tokens_per_row, rows_per_pass=4, fixed_shape=fixed_shape)
    model = LogProbDecoder(decoder)
    seen = []
    for planned in pack(groups, budget):
        rows = lay_out(groups, planned, budget)
        ours = rows.per_response(log_probs(model, rows))
        expected = one_sequence_each(decoder, rows.groups)
        seen += [id(group) for group in rows.groups]
        assert ours.shape == rows.mask.shape == (len(expected), max(map(len, expected)))
        for response, mask, logps in zip(ours, rows.mask, expected, strict=True):
            torch.testing.assert_close(response[mask], logps, atol=1e-5, rtol=0)
            assert not response[~mask].any()
    assert sorted(seen) == sorted(map(id, groups))


def test_gradients_from_rows_equal_those_from_one_sequence_each(decoder):
    groups = [Group(prompt=[1, 2, 3], responses=([4, 5], [6])), Group(prompt=[7], responses=([8, 9, 10], [11, 12]))]
    budget = RowBudget(tokens_per_row=16)
    model = LogProbDecoder(decoder)

    def gradients(loss):
        return torch.autograd.grad(loss, list(model.parameters()))

    rows = lay_out(groups, pack(groups, budget)[0], budget)
    ours = gradients(log_probs(model, rows).square().sum())
    expected = gradients(torch.cat(one_sequence_each(decoder, groups)).square().sum())
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# A group of four long responses takes four rows of 24 tokens: fewer a pass is refused, as tested below.
@given(groups=groups, tokens_per_row=st.integers(24, 70), rows_per_pass=st.integers(4, 6))
@example(groups=[Group(prompt=[1] * 12, responses=([2] * 12,) * 4)], tokens_per_row=24, rows_per_pass=4)
def test_no_pass_exceeds_its_budget_and_no_response_is_lost(groups, tokens_per_row, rows_per_pass):
    budget = RowBudget(tokens_per_row=tokens_per_row, rows_per_pass=rows_per_pass)
    placed = []
    for planned in pack(groups, budget):
        assert len(planned) <= rows_per_pass
        for row in planned:
            assert sum(segment.tokens for segment in row) <= tokens_per_row
            placed += [(segment.group, response) for segment in row for response in segment.responses]
    assert sorted(placed) == [(g, r) for g, group in enumerate(groups) for r in range(len(group.responses))]


@given(tokens_per_row=st.integers(1, 5000))
def test_fixed_shapes_have_at_most_four_widths_and_hold_every_row(tokens_per_row):
    budget = RowBudget(tokens_per_row=tokens_per_row, fixed_shape=True)
    needed = range(1, tokens_per_row + 1)
    widths = [budget.width(tokens) for tokens in needed]
    assert len(set(widths)) <= 4
    assert all(tokens <= width <= tokens_per_row for tokens, width in zip(needed, widths, strict=True))
    assert all(width % 128 == 0 or width == tokens_per_row for width in widths)
    assert all(width - tokens < tokens_per_row / 4 + 128 for tokens, width in zip(needed, widths, strict=True))


@given(groups=groups, tokens_per_row=st.integers(24, 600), rows_per_pass=st.integers(4, 6))
def test_a_pass_of_a_fixed_shape_is_as_wide_as_its_longest_row_needs(groups, tokens_per_row, rows_per_pass):
    budget = RowBudget(tokens_per_row=tokens_per_row, rows_per_pass=rows_per_pass, fixed_shape=True)
    for planned in pack(groups, budget):
        longest = max(sum(segment.tokens for segment in row) for row in planned)
        assert lay_out(groups, planned, budget).tokens.shape == (rows_per_pass, budget.width(longest))


@given(groups=groups)
def test_flex_attention_is_given_the_rule_of_the_dense_mask(groups):
    budget = RowBudget(tokens_per_row=64, rows_per_pass=4)
    rows = lay_out(groups, pack(groups, budget)[0], budget)
    count, length = rows.tokens.shape
    # One-token blocks, so that the block mask is the mask itself.
    flex = (
        create_block_mask(rows.visible(), count, None, length, length, device="cpu", BLOCK_SIZE=1)
        .to_dense()[:, 0]
        .bool()
    )
    assert torch.equal(flex, rows.attention_mask())


def test_a_prompt_stands_once_and_every_token_sees_its_own_past_only():
    budget = RowBudget(tokens_per_row=16)
    groups = [Group(prompt=[1, 2], responses=([3, 4], [5, 6, 7]))]
    rows = lay_out(groups, pack(groups, budget)[0], budget)
    assert rows.tokens.tolist() == [[1, 2, 3, 5, 6]]
    assert rows.positions.tolist() == [[0, 1, 2, 2, 3]]
    assert rows.targets.tolist() == [3, 4, 5, 6, 7]
    assert rows.predictors.tolist() == [1, 2, 1, 3, 4]
    assert rows.attention_mask()[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]


def test_several_values_a_token_are_scattered_as_each_alone():
    budget = RowBudget(tokens_per_row=16)
    groups = [Group(prompt=[1, 2], responses=([3, 4], [5, 6, 7])), Group(prompt=[8], responses=([9],))]
    rows = lay_out(groups, pack(groups, budget)[0], budget)
    values = torch.arange(1.0, 13.0).view(2, 6)
    assert rows.per_response(values[0]).tolist() == [[1, 2, 0], [3, 4, 5], [6, 0, 0]]
    assert torch.equal(rows.per_response(values), torch.stack([rows.per_response(each) for each in values]))


def test_a_group_longer_than_a_row_repeats_its_prompt_within_one_pass():
    group = Group(prompt=[1] * 6, responses=([2] * 5, [3] * 5))
    (planned,) = pack([group], RowBudget(tokens_per_row=10, rows_per_pass=2))
    assert [[segment.responses for segment in row] for row in planned] == [[(0,)], [(1,)]]


def test_a_group_that_no_pass_can_hold_is_refused_by_name():
    group = Group(prompt=[1] * 6, responses=([2] * 5, [3] * 5), id="pairs.jsonl line 7")
    with pytest.raises(
        DataError, match="pairs.jsonl line 7: its responses need 2 rows of 10 tokens, but a pass holds 1"
    ):
        pack([group], RowBudget(tokens_per_row=10))
    with pytest.raises(
        DataError, match="pairs.jsonl line 7: prompt and response have 10 input tokens, but a row holds 8"
    ):
        pack([group], RowBudget(tokens_per_row=8))


@pytest.mark.parametrize("key", ["tokens_per_row", "rows_per_pass"])
@pytest.mark.parametrize("value", [0, -1, True, 2.5])
def test_a_budget_that_is_no_count_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"^{key}: expected a positive integer, got {value}$"):
        RowBudget(**{key: value})


def test_the_order_of_groups_changes_no_loss(decoder):
    generator = torch.Generator().manual_seed(1)

    def sequence(longest):
        return torch.randint(
            0, VOCAB, (int(torch.randint(1, longest, (1,), generator=generator)),), generator=generator
        ).tolist()

    groups = [Group(prompt=sequence(9), responses=(sequence(9), sequence(9)), id=str(i)) for i in range(7)]
    model, budget = LogProbDecoder(decoder), RowBudget(tokens_per_row=40, rows_per_pass=2)

    def sums(order):
        by_id = {}
        for planned in pack(order, budget):
            rows = lay_out(order, planned, budget)
            totals = rows.per_response(log_probs(model, rows)).sum(1).view(-1, 2)
            by_id |= {group.id: total for group, total in zip(rows.groups, totals, strict=True)}
        return torch.stack([by_id[group.id] for group in groups])

    torch.testing.assert_close(sums(groups), sums(groups[::-1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["labels", "advantages"])
def test_what_a_group_lacks_is_refused_with_the_group_s_name(name):
    budget, values = RowBudget(tokens_per_row=16), {"labels": (True,), "advantages": (0.5,)}
    groups = [Group([1], ([2],), **values), Group([1], ([2],), id="pairs.jsonl line 7")]
    (planned,) = pack(groups, budget)
    assert getattr(lay_out(groups[:1], pack(groups[:1], budget)[0], budget), name).tolist() == list(values[name])
    with pytest.raises(DataError, match=f"^pairs.jsonl line 7: expected {name}, found none; use the objective"):
        getattr(lay_out(groups, planned, budget), name)


def test_padding_alone_is_visible_to_itself_so_that_attention_stays_finite():
    budget = RowBudget(tokens_per_row=32, fixed_shape=True)
    groups = [Group(prompt=[1], responses=([2, 3],))]
    rows = lay_out(groups, pack(groups, budget)[0], budget)
    assert rows.tokens.shape == (1, 32)
    assert bool(rows.attention_mask().any(-1).all())
    assert rows.num_tokens == 2
