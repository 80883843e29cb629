"""The modules for eager mode compute the functions of torchtune's modules that they replace."""

import pytest
import torch
from torch.testing import assert_close
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.modules import RMSNorm, RotaryPositionalEmbeddings

from humanline.models._eager_modules import ComplexRotary, CPUNorm, FusedNorm

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8}  # relative to the largest value


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ours", "kind"), [(CPUNorm, RMSNorm), (CPUNorm, GemmaRMSNorm), (FusedNorm, RMSNorm)])
@pytest.mark.parametrize("shape", [(2, 7, 64), (2, 5, 3, 16)], ids=["hidden states", "heads"])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_norms_and_their_gradients_are_torchtunes(dtype, weight_dtype, ours, kind, shape, size):
    torch.manual_seed(0)
    norm = kind(shape[-1], eps=1e-5)
    torch.nn.init.normal_(norm.scale)
    norm.to(weight_dtype)
    x, grad = size * torch.randn(shape), torch.randn(shape)

    def computed(module):
        module.zero_grad()
        given = x.to(dtype).requires_grad_()
        y = module(given)
        y.backward(grad.to(dtype))
        return y.detach(), given.grad, module.scale.grad

    for mine, theirs in zip(computed(ours(norm)), computed(norm), strict=True):
        assert mine.dtype == theirs.dtype
        bound = max(ROUNDING[theirs.dtype], 1e-6) * theirs.abs().max().item()
        assert_close(mine, theirs, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_one_kernel_is_torchtunes_bit_for_bit(dtype):
    torch.manual_seed(0)
    norm = RMSNorm(576).to(dtype)
    torch.nn.init.normal_(norm.scale)
    x = (torch.randn(100, 576) * torch.logspace(-4, 3, 100)[:, None]).to(dtype)
    assert torch.equal(FusedNorm(norm)(x), norm(x))


def test_a_norm_in_bfloat16_is_rounded_once():
    torch.manual_seed(0)
    norm = RMSNorm(576)
    torch.nn.init.normal_(norm.scale)
    x = torch.randn(100, 576).bfloat16()
    assert (CPUNorm(norm)(x) == norm(x)).float().mean() > 0.999


def test_a_frozen_norm_has_no_gradient():
    norm = CPUNorm(RMSNorm(8).requires_grad_(False))
    x = torch.randn(3, 8, requires_grad=True)
    norm(x).sum().backward()
    assert norm.scale.grad is None and x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [RotaryPositionalEmbeddings, Llama3ScaledRoPE])
@pytest.mark.parametrize("positions", [None, (1, 7), (2, 7)], ids=["counted", "of all rows", "of each row"])
def test_rotary_positions_and_their_gradient_are_torchtunes_bit_for_bit(dtype, kind, positions):
    torch.manual_seed(0)
    rotary = kind(64, max_seq_len=5000, base=10_000)
    x, grad = torch.randn(2, 7, 3, 64).to(dtype), torch.randn(2, 7, 3, 64).to(dtype)
    input_pos = None if positions is None else torch.randint(5000, positions)

    def computed(module):
        given = x.clone().requires_grad_()
        # As in attention, queries are a view.
        y = module(given.flatten(-2).unflatten(-1, (-1, 64)), input_pos=input_pos)
        y.backward(grad)
        return y.detach(), given.grad

    for ours, theirs in zip(computed(ComplexRotary(rotary)), computed(rotary), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
