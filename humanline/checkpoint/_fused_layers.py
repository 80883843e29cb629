"""Adapters of fused layers: HF files of Phi-3 and Phi-4 have queries, keys and values as one layer, gate and up as one.

torchtune has an adapter for each part. Together they are one adapter of the fused layer, whose rank is the sum of
theirs: its ``A`` has theirs one below the other, its ``B`` theirs along the diagonal. Alpha is the sum too, so the
update is the same.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX

from humanline.errors import ConfigError
from humanline.models import adapter_modules, rank_and_alpha

# The parts of each fused layer, in order. torchtune's conversion gives the whole the name of the first.
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
    """Makes one adapter per fused layer from the adapters of its parts.

    Args:
        adapter (dict[str, Tensor]): in torchtune's names.
        model (nn.Module): the model with the adapter, for its shapes.

    Returns:
        dict[str, Tensor] | None: the adapters, those of fused layers under the name of their first part. None if
            only some parts of a layer have DoRA, which would scale the rows of the other parts too.
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
    """Makes adapters of parts from those of fused layers: the reverse of :func:`fuse`.

    An adapter of another origin, with the model's rank for all parts together, becomes adapters with a copy of its
    ``A`` for each part. The update is the same.

    Raises:
        ConfigError: if the adapter updates a part that has no adapter in the model.
    """
    adapter = dict(adapter)
    for layer in _layers(model):
        a, b, magnitude = (adapter.pop(f"{layer.first}.{kind}", None) for kind in (A, B, MAGNITUDE))
        if a is None or b is None:
            continue
        own = _rank(model) if a.shape[0] == len(layer.adapted) * _rank(model) else None  # None: the parts share columns
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
    """Returns the keys of PEFT's config with rank and alpha of fused layers, which are sums."""
    rank, alpha = rank_and_alpha(next(iter(adapter_modules(model).values())))
    counts = {layer.fused: len(layer.adapted) for layer in _layers(model)}
    return {
        "rank_pattern": {name: count * rank for name, count in counts.items()},
        "alpha_pattern": {name: count * alpha for name, count in counts.items()},
    }


def _rank(model: nn.Module) -> int:
    return rank_and_alpha(next(iter(adapter_modules(model).values())))[0]


def _layers(model: nn.Module) -> Iterator[_Layer]:
    """Yields the fused layers with an adapter on one part at least."""
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
