"""Adapters of layers that Hugging Face's files of Phi-3 and Phi-4 hold as one: queries, keys and values; gate and up.

torchtune has an adapter for each part. Together they are one adapter of the fused layer, of the sum of their ranks:
``A`` holds theirs below each other, and ``B`` theirs along its diagonal. With alpha grown alike, no update changes.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX

from humanline.errors import ConfigError
from humanline.models import adapter_modules, rank_and_alpha

# The parts of each fused layer in order. torchtune's conversion names the whole by the first.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("w1", "w3")}
A, B, MAGNITUDE = "lora_a.weight", "lora_b.weight", "magnitude"


class _Layer(NamedTuple):
    """A fused layer of the model."""

    fused: str  # its name in Hugging Face's files
    parent: str  # the module of its parts, in torchtune's names
    rows: dict[str, slice]  # of each part
    adapted: list[str]  # parts with an adapter

    @property
    def first(self) -> str:
        return f"{self.parent}.{next(iter(self.rows))}"


def fuse(adapter: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor] | None:
    """The adapters of parts, made adapters of fused layers.

    Args:
        adapter (dict[str, Tensor]): in torchtune's names.
        model (nn.Module): the model with the adapter, for its shapes.

    Returns:
        dict[str, Tensor] | None: the adapters of fused layers under the name of their first part, and the others; None
            if DoRA is on some parts of a layer only, since it would scale the rows of the other parts too.
    """
    adapter = dict(adapter)
    for layer in _layers(model):
        names = [f"{layer.parent}.{part}" for part in layer.adapted]
        a, b = ([adapter.pop(f"{name}.{kind}") for name in names] for kind in (A, B))
        total, column = max(rows.stop for rows in layer.rows.values()), 0
        diagonal = torch.zeros(total, sum(each.shape[1] for each in b))
        for part, each in zip(layer.adapted, b, strict=True):
            diagonal[layer.rows[part], column : column + each.shape[1]] = each
            column += each.shape[1]
        adapter |= {f"{layer.first}.{A}": torch.cat(a), f"{layer.first}.{B}": diagonal}
        if f"{names[0]}.{MAGNITUDE}" in adapter:
            if len(layer.adapted) < len(layer.rows):
                return None
            adapter[f"{layer.first}.{MAGNITUDE}"] = torch.cat([adapter.pop(f"{name}.{MAGNITUDE}") for name in names])
    return adapter


def split(adapter: dict[str, Tensor], model: nn.Module, path: str) -> dict[str, Tensor]:
    """The reverse of :func:`fuse`; an adapter of one rank for all parts becomes one for each, of the same update.

    Raises:
        ConfigError: if a part that has no adapter in the model is updated, or parts share columns.
    """
    adapter = dict(adapter)
    for layer in _layers(model):
        a, b, magnitude = (adapter.pop(f"{layer.first}.{kind}", None) for kind in (A, B, MAGNITUDE))
        if a is None or b is None:
            continue
        own = _rank(model) if a.shape[0] == len(layer.adapted) * _rank(model) else None  # None: all share the columns
        rest = b.clone()
        for place, part in enumerate(layer.adapted):
            columns = slice(None) if own is None else slice(place * own, (place + 1) * own)
            rows, name = layer.rows[part], f"{layer.parent}.{part}"
            adapter |= {f"{name}.{A}": a[columns].clone(), f"{name}.{B}": b[rows, columns].clone()}
            rest[rows, columns] = 0
            if magnitude is not None:
                adapter[f"{name}.{MAGNITUDE}"] = magnitude[rows].clone()
        if rest.any():
            raise ConfigError(
                f"adapter: {path} updates more of {layer.parent} ({layer.fused}) than the model's adapter of "
                f"{', '.join(layer.adapted)} can; give the model adapters of {', '.join(layer.rows)}"
            )
    return adapter


def patterns(model: nn.Module) -> dict[str, dict[str, float]]:
    """What PEFT's config says of fused layers, whose rank and alpha are sums of several."""
    rank, alpha = rank_and_alpha(next(iter(adapter_modules(model).values())))
    counts = {layer.fused: len(layer.adapted) for layer in _layers(model)}
    return {
        "rank_pattern": {name: count * rank for name, count in counts.items()},
        "alpha_pattern": {name: count * alpha for name, count in counts.items()},
    }


def _rank(model: nn.Module) -> int:
    return rank_and_alpha(next(iter(adapter_modules(model).values())))[0]


def _layers(model: nn.Module) -> Iterator[_Layer]:
    """The fused layers of which a part has an adapter."""
    adapters = adapter_modules(model)
    for name, module in model.named_modules():
        children = dict(module.named_children())
        for fused, parts in _FUSED.items():
            adapted = [part for part in parts if f"{name}.{part}" in adapters]
            if not adapted or not all(part in children for part in parts):
                continue
            ends = list(accumulate(children[part].weight.shape[0] for part in parts))
            rows = dict(zip(parts, map(slice, [0, *ends], ends), strict=False))
            yield _Layer(fused, name.replace(_CHECKPOINT_PREFIX, ""), rows, adapted)
