"""Measures the function of a built decoder by calling its modules; names and builders are not considered.

A decoder on the meta device has no numbers, so each module is called on the host with small weights instead of its own.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torchtune.modules import FeedForward, MultiHeadAttention, TransformerDecoder
from torchtune.modules.tied_linear import TiedLinear

from humanline.models._head_normed_attention import HeadNormedAttention
from humanline.models._policy import LogProbDecoder
from humanline.models._rotation import Rotation
from humanline.torchtune_seam.internals import attention_call


class Norm(NamedTuple):
    """A norm over the last dimension: ``x / sqrt(mean(x^2) + eps)``, times its weight or ``1 + weight``."""

    eps: float
    one_plus_weight: bool


class Scores(NamedTuple):
    """The scores of attention: ``cap * tanh(q . k * scale / cap)``, or ``q . k * scale`` without a cap."""

    scale: float
    cap: float | None


class Layer(NamedTuple):
    """A layer; a string describes a part that could not be measured."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotation: Rotation | str
    scores: Scores | str
    head_norms: str  # of queries and keys: none, or where they stand
    activation: str
    has_windows: bool
    window: int | None


class Built(NamedTuple):
    """The function that a decoder computes from its weights."""

    layers: list[Layer]
    norms: list[Norm | str]
    embedding_scale: float
    logit_cap: float | None
    tied: bool


def measure(model: TransformerDecoder | LogProbDecoder) -> Built:
    """Measures a decoder, possibly on the meta device; modules of one kind are measured once."""
    known: dict[Any, Any] = {}

    def once(of: Callable[..., Any], module: Any, *arguments: Any) -> Any:
        key = (of, _kind(module))
        if key not in known:
            try:
                known[key] = of(*arguments)
            except Exception:  # a user's own module may raise anything
                known[key] = None
            if known[key] is None:
                known[key] = f"a different one ({type(module).__name__})"
        return known[key]

    dim = model.tok_embeddings.embedding_dim
    norms, layers = [once(norm_of, model.norm, model.norm, dim)], []
    for layer in model.layers:
        attn, mlp = layer.attn, layer.mlp
        plain = type(attn).forward in (MultiHeadAttention.forward, HeadNormedAttention.forward)
        gated = type(mlp).forward is FeedForward.forward and mlp.w3 is not None
        layers.append(
            Layer(
                attn.num_heads,
                attn.num_kv_heads,
                attn.head_dim,
                once(rotation_of, attn.pos_embeddings, attn.pos_embeddings, attn.head_dim),
                once(scores_of, attn, attention_call(attn), attn.head_dim) if plain else type(attn).__name__,
                _where_heads_are_normed(attn),
                once(activation_of, mlp.activation, mlp.activation) if gated else type(mlp).__name__,
                hasattr(attn, "sliding_window"),
                getattr(attn, "sliding_window", None),
            )
        )
        beside = (layer.sa_norm, layer.mlp_norm, layer.sa_scale, layer.mlp_scale)
        norms += [once(norm_of, norm, norm, dim) for norm in beside if not isinstance(norm, nn.Identity)]
        of_heads = (getattr(attn, name, None) for name in ("q_norm", "k_norm"))
        norms += [once(norm_of, norm, norm, attn.head_dim) for norm in of_heads if norm is not None]
    scale = embedding_scale_of(model.tok_embeddings, dim)
    cap = getattr(model.output, "soft_cap", None)
    return Built(layers, list(dict.fromkeys(norms)), scale, cap, isinstance(model.output, TiedLinear))


def _where_heads_are_normed(attention: nn.Module) -> str:
    if getattr(attention, "q_norm", None) is None:
        return "none"
    return "before RoPE" if isinstance(attention, HeadNormedAttention) else "after RoPE"


def rotation_of(module: nn.Module | None, head_dim: int) -> Rotation | None:
    """Measures how rotary embeddings rotate queries and keys; None if they do more than rotate pairs of dimensions."""
    if module is None:
        return Rotation(torch.empty(0, dtype=torch.float64))
    with torch.device("cpu"):
        module = copy.deepcopy(module)
        if hasattr(module, "rope_init"):
            module.rope_init()  # type: ignore[operator]
        basis = torch.eye(head_dim).view(1, 1, head_dim, head_dim)
        turned = module(basis, input_pos=torch.ones(1, 1, dtype=torch.int64)).view(head_dim, head_dim).double()
    for halves in (False, True):
        found = _pairs(turned, halves)
        if found is not None:
            return found
    return None


def _pairs(turned: Tensor, halves: bool) -> Rotation | None:
    """Returns the angles of a matrix that rotates pairs of its first dimensions; None if it does something else."""
    head_dim = len(turned)
    off_diagonal = turned - turned.diagonal().diag()
    rotated = int((off_diagonal.abs().sum(1) > 0).sum())
    first = torch.arange(rotated // 2)
    first, second = (first, first + rotated // 2) if halves else (2 * first, 2 * first + 1)
    cosines, sines = turned[first, first], turned[first, second]
    expected = torch.eye(head_dim, dtype=turned.dtype)
    expected[first, first] = expected[second, second] = cosines
    expected[first, second], expected[second, first] = sines, -sines
    if rotated % 2 or not torch.allclose(turned, expected, atol=1e-6, rtol=0):
        return None
    factor = float(torch.hypot(cosines, sines).mean()) if rotated else 1.0
    return Rotation(torch.atan2(sines, cosines), factor, halves if rotated > 2 else None)


def norm_of(module: nn.Module, dim: int) -> Norm | None:
    """Measures how a norm scales; None if it is not an RMS norm."""
    x = torch.zeros(1, dim)
    x[0, ::2] = 1e-4  # small, so that eps matters, and with a non-zero mean
    mean_square = float(x.double().square().mean())

    def call(weight: float) -> Tensor:
        weights = {name: torch.full(p.shape, weight) for name, p in module.named_parameters()}
        return functional_call(module, weights, (x,)).double()[0]

    with torch.device("cpu"):
        zero, one = call(0.0), call(1.0)
    one_plus_weight = bool(zero[0] != 0)
    gain = float(one[0] / x[0, 0]) / (2 if one_plus_weight else 1)
    if gain <= 0 or bool(one[1::2].any()) or not torch.allclose(one[::2], one[0]):
        return None
    return Norm(max(gain**-2 - mean_square, 0.0), one_plus_weight)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


def activation_of(function: Callable[[Tensor], Tensor]) -> str:
    """Returns the name of an activation from its values, as in :class:`~humanline.models._published.Published`."""
    x = torch.linspace(-4, 4, 41)
    values = function(x.clone())
    alike = (name for name, known in _ACTIVATIONS.items() if torch.allclose(values, known(x), atol=1e-6))
    return next(alike, f"a different function ({getattr(function, '__name__', type(function).__name__)})")


def scores_of(attend: Callable[..., Tensor], head_dim: int) -> Scores:
    """Measures the scale and the soft-cap of attention's scores from the weights it gives to two keys.

    Args:
        attend (Callable[..., Tensor]): ``(q, k, v, *, mask, dropout_p, is_causal)``, each ``[B, H, S, D]``.
        head_dim (int): ``D``, at least 2.
    """

    def score(product: float) -> float:
        query, keys, values = torch.zeros(1, 1, 1, head_dim), torch.zeros(1, 1, 2, head_dim), torch.zeros(2, head_dim)
        query[..., 0], keys[0, 0, 0, 0] = 1, product
        values[0, 0] = values[1, 1] = 1  # so that the output is the two weights
        arguments = (tensor.double() for tensor in (query, keys, values[None, None]))
        weights = attend(*arguments, mask=None, dropout_p=0.0, is_causal=False).double().flatten()
        return math.log(weights[0] / weights[1])

    small = 1e-2
    scale = score(small) / small
    uncapped = 60.0  # large enough to reveal caps, and within float32
    capped = score(uncapped / scale)
    if capped > 0.9999 * uncapped:
        return Scores(scale, None)
    low, high = capped, 1e4
    for _ in range(60):  # bisection: the capped score grows with the cap
        middle = (low + high) / 2
        low, high = (middle, high) if middle * math.tanh(uncapped / middle) < capped else (low, middle)
    return Scores(scale, high)


def embedding_scale_of(module: nn.Module, dim: int) -> float:
    """Measures the factor that embeddings are multiplied with after the lookup."""
    with torch.device("cpu"):
        ids = torch.ones(1, 1, dtype=torch.int64)
        return float(functional_call(module, {"weight": torch.ones(2, dim)}, (ids,)).double().mean())


def _kind(module: Any) -> tuple[Any, ...]:
    """Returns a key that is equal for modules of the same type and settings."""
    if not isinstance(module, nn.Module):
        return (module,)
    parts = [(type(part), *_plain(part)) for part in module.modules()]
    return tuple(parts)


def _plain(module: nn.Module) -> list[tuple[str, Any]]:
    values = vars(module).items()
    return sorted((key, value) for key, value in values if isinstance(value, int | float | str | type(None)))
