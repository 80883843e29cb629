"""Modules that compute torchtune's functions in fewer passes over memory, for layers that are not compiled.

An eager elementwise operation reads and writes memory. On a CPU it takes as long as a matrix product of the same
tensors. The modules here keep float32 arithmetic and round to the activations' dtype once, as torchtune's do.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.modules import MultiHeadAttention, RMSNorm, RotaryPositionalEmbeddings

from humanline.models._cpu_attention import attend
from humanline.models._head_normed_attention import HeadNormedAttention
from humanline.models._policy import LogProbDecoder
from humanline.models.gemma3 import Gemma3Attention
from humanline.torchtune_seam.internals import Attend, attention_call, set_attention_call

_PLAIN_ATTENTION = (MultiHeadAttention, HeadNormedAttention, Gemma3Attention)  # without a soft-cap


def use_eager_modules(model: LogProbDecoder, device: torch.device) -> None:
    """Replaces modules of torchtune with those for eager mode on ``device``, in place. Parameters keep their names."""
    on_cpu = device.type == "cpu"
    if on_cpu:
        _attend_by_blocks(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (RotaryPositionalEmbeddings, Llama3ScaledRoPE):
                setattr(parent, name, ComplexRotary(child))
            elif type(child) in (RMSNorm, GemmaRMSNorm) and on_cpu:
                setattr(parent, name, CPUNorm(child))
            elif type(child) is RMSNorm:
                setattr(parent, name, FusedNorm(child))


def _attend_by_blocks(model: LogProbDecoder) -> None:
    attentions = [layer.attn for layer in model.layers]
    if all(type(attn) in _PLAIN_ATTENTION and not attn.attn_dropout for attn in attentions):
        model.by_blocks = True
        for attn in attentions:
            set_attention_call(attn, _by_blocks(attention_call(attn), getattr(attn, "scale", attn.head_dim**-0.5)))


def _by_blocks(otherwise: Attend, scale: float) -> Attend:
    """Returns a layer's function of q, k, v and a mask, which may be a tuple of blocks."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Any, **settings: Any) -> Tensor:
        return attend(q, k, v, mask, scale) if isinstance(mask, tuple) else otherwise(q, k, v, mask=mask, **settings)

    return attention


class FusedNorm(nn.Module):
    """The function of torchtune's ``RMSNorm``, in the one kernel that torch has for an input and a weight of one dtype.

    Args:
        norm (RMSNorm): the module whose weight and function this one has.
    """

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.scale, self.eps = norm.scale, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises over the last dimension: ``[..., D]`` to ``[..., D]``."""
        common = torch.promote_types(x.dtype, self.scale.dtype)
        return F.rms_norm(x.to(common), self.scale.shape, self.scale.to(common), self.eps).to(x.dtype)


class CPUNorm(nn.Module):
    """The function of torchtune's ``RMSNorm`` or ``GemmaRMSNorm``, which scales with ``1 + scale``.

    Args:
        norm (RMSNorm | GemmaRMSNorm): the module whose weight and function this one has.
    """

    def __init__(self, norm: RMSNorm | GemmaRMSNorm) -> None:
        super().__init__()
        self.scale, self.eps = norm.scale, norm.eps
        self.one_plus_scale = isinstance(norm, GemmaRMSNorm)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises over the last dimension: ``[..., D]`` to ``[..., D]``."""
        scale = 1.0 + self.scale.float() if self.one_plus_scale else self.scale
        return _ScaledRMS.apply(x, scale, self.eps)


class _ScaledRMS(torch.autograd.Function):
    """``x * scale / rms(x)``; between forward and backward it keeps ``x`` and one float per vector."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        x_ = x.float()  # products of two dtypes are slow
        inverse_rms = torch.linalg.vector_norm(x_, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, inverse_rms)
        return (x_ * inverse_rms).mul_(scale.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, inverse_rms = ctx.saved_tensors
        need_x, need_scale = ctx.needs_input_grad[:2]
        x_, grad, scale_ = x.float(), grad.float(), scale.float()
        products = grad * x_
        grad_x = grad_scale = None
        if need_scale:
            grad_scale = (products.flatten(0, -2).t() @ inverse_rms.flatten()).to(scale.dtype)
        if need_x:
            # d/dx = (scale * grad - x * mean(scale * grad * x) / rms^2) / rms
            slope = (products @ scale_).unsqueeze(-1).mul_(inverse_rms.pow(3)).div_(-x.size(-1))
            grad_x = (grad * scale_).mul_(inverse_rms).addcmul_(x_, slope).to(x.dtype)
        return grad_x, grad_scale, None


class ComplexRotary(nn.Module):
    """torchtune's rotary positions of neighbouring dimensions, as products of complex numbers.

    Args:
        rotary (RotaryPositionalEmbeddings | Llama3ScaledRoPE): has the table of cosines and sines.
    """

    def __init__(self, rotary: RotaryPositionalEmbeddings | Llama3ScaledRoPE) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """
        Args:
            x (Tensor): queries or keys, ``[B, S, H, D]``.
            input_pos (Tensor | None): positions, int64 ``[B, S]`` or ``[1, S]``; None counts from 0.

        Returns:
            Tensor: ``x`` turned, bit for bit as by torchtune.
        """
        turns = torch.view_as_complex(self.rotary.cache)
        turns = turns[: x.size(1)] if input_pos is None else turns[input_pos]
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns.unsqueeze(-2)).flatten(-2).to(x.dtype)
