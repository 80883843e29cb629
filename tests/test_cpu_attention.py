"""Attention in blocks of queries, on a CPU: the rule of the dense mask, and its outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from humanline.data import Group, RowBudget, lay_out, pack
from humanline.models._cpu_attention import attend

HEADS, SIZE = 3, 16


@st.composite
def rows_of_groups(draw):
    """Rows whose prompts and responses are shorter and longer than a block, some responses of one token."""
    length = st.sampled_from([1, 2, 5, 30, 127, 128, 129, 300])
    groups = draw(
        st.lists(
            st.builds(
                lambda prompt, responses: Group(prompt=[1] * prompt, responses=tuple([1] * n for n in responses)),
                length,
                st.lists(length, min_size=1, max_size=5),
            ),
            min_size=1,
            max_size=3,
        )
    )
    budget = RowBudget(tokens_per_row=700, rows_per_pass=6, fixed_shape=draw(st.booleans()))
    return lay_out(groups, pack(groups, budget)[0], budget)


windows = st.sampled_from([None, 1, 7, 200, 10_000])


@settings(max_examples=40)
@given(rows=rows_of_groups(), window=windows)
def test_blocks_have_the_rule_of_the_dense_mask(rows, window):
    covered = torch.zeros_like(rows.attention_mask())
    for block in rows.query_blocks(window):
        visible = torch.ones(block.size).bool()
        visible[:, visible.size(1) - block.bias.size(1) :] = block.bias == 0
        assert visible.any(1).all()  # a query without a key would have no weights
        queries, keys = (sum(part.stop - part.start for part in parts) for parts in ([block.queries], block.keys))
        assert not visible[:queries, keys:].any()
        assert all(0 <= padded - count < 64 for padded, count in zip(block.size, (queries, keys), strict=True))
        visible = visible[:queries, :keys]
        parts = visible.split([part.stop - part.start for part in block.keys], 1)
        for keys, part in zip(block.keys, parts, strict=True):
            assert not covered[block.row, block.queries, keys].any()  # no score twice
            covered[block.row, block.queries, keys] = part
    tokens = rows.segments >= 0
    assert torch.equal(covered, rows.attention_mask(window) & tokens[:, :, None] & tokens[:, None, :])


@settings(max_examples=40)
@given(rows=rows_of_groups(), window=windows, scale=st.sampled_from([0.05, SIZE**-0.5, 1.0]))
def test_outputs_and_gradients_are_those_of_dense_attention(rows, window, scale):
    torch.manual_seed(0)
    shape = (rows.tokens.size(0), rows.tokens.size(1), HEADS, SIZE)
    q, k, v = (torch.randn(shape).transpose(1, 2).requires_grad_() for _ in range(3))
    tokens = (rows.segments >= 0)[:, None, :, None]
    grad = torch.randn(q.shape) * tokens
    found = attend(q, k, v, rows.query_blocks(window), scale)
    assert not (found * ~tokens).any()
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=rows.attention_mask(window)[:, None], scale=scale)
    torch.testing.assert_close(found, dense * tokens, atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(each, (q, k, v), grad) for each in (found, dense))
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_bfloat16_is_nearly_as_exact_as_the_fused_kernel(size, spread):
    torch.manual_seed(0)
    groups = [Group(prompt=[1] * 150, responses=([1] * 200, [1] * 30, [1] * 40))]
    rows = lay_out(groups, pack(groups, RowBudget(tokens_per_row=512))[0], RowBudget(tokens_per_row=512))
    shape, scale = (1, rows.tokens.size(1), HEADS, size), size**-0.5
    inputs = [(torch.randn(shape) * factor).bfloat16().transpose(1, 2) for factor in (spread, spread, 1.0)]
    grad = torch.randn(inputs[0].shape).bfloat16()

    def run(attention, dtype):
        leaves = [each.to(dtype, copy=True).requires_grad_() for each in inputs]
        output = attention(*leaves)
        return [output.double(), *(each.double() for each in torch.autograd.grad(output, leaves, grad.to(dtype)))]

    def dense(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=rows.attention_mask()[:, None], scale=scale)

    exact, fused = run(dense, torch.float64), run(dense, torch.bfloat16)
    ours = run(lambda q, k, v: attend(q, k, v, rows.query_blocks(), scale), torch.bfloat16)
    for right, theirs, mine in zip(exact, fused, ours, strict=True):
        assert (mine - right).norm() < 2.5 * (theirs - right).norm()


def test_a_hidden_score_does_not_drown_the_visible_ones():
    groups = [Group(prompt=[1] * 3, responses=([1] * 2,))]
    rows = lay_out(groups, pack(groups, RowBudget())[0], RowBudget())
    q = torch.ones(1, 1, 4, SIZE).bfloat16()
    k = torch.tensor([1.0, 2.0, 1000.0, 0.0]).view(1, 1, 4, 1).expand_as(q).bfloat16()
    v = torch.tensor([1.0, 3.0, 7.0, 100.0]).view(1, 1, 4, 1).expand_as(q).bfloat16()
    found = attend(q, k, v, rows.query_blocks(), 1 / SIZE)[0, 0, :, 0]
    first, second = 1.0, (1 + 3 * torch.e) / (1 + torch.e)
    torch.testing.assert_close(found.float(), torch.tensor([first, second, 7.0, 7.0]), atol=0.01, rtol=0.01)
