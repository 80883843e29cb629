"""Keys and values of a batch whose rows start, grow and end at different times.

Each attention layer has slots, one a row, with room for the longest sequence. The model sees two kinds of pass: prompts
that fill slots, and steps that add one token to every row. torchtune's own ``KVCache`` has one position for all rows,
has every step attend over the whole allocated length, and has each key copied for every query head that shares it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from humanline.models import LogProbDecoder
from humanline.torchtune_seam.internals import attention_call, set_attention_call

__all__ = ["KVCache", "Prefill", "Step", "attached"]


class Pass(Protocol):
    """What one pass of the model does with a layer's slots, ``[slots, kv heads, capacity, head dim]``."""

    def store(self, slots: Tensor, new: Tensor) -> None:
        """Writes the new keys or values, ``[B, kv heads, S, head dim]``."""

    def attend(
        self, layer: "_LayerCache", queries: Tensor, new: tuple[Tensor, Tensor], slots: tuple[Tensor, Tensor]
    ) -> Tensor:
        """A layer's attention of ``queries``, ``[B, heads, S, head dim]``, given keys and values: the new ones, and the
        slots."""


class Prefill:
    """Whole prompts, padded on the right, where causal attention does not look.

    Args:
        copies (Sequence[int]): which prompt of the batch each of the slots gets.
        first_slot (int): the first of these slots.
        device (torch.device): the model's.
    """

    def __init__(self, copies: Sequence[int], first_slot: int, device: torch.device) -> None:
        self._copies = torch.tensor(copies, device=device)
        self._slots = slice(first_slot, first_slot + len(copies))

    def store(self, slots: Tensor, new: Tensor) -> None:
        slots[self._slots, :, : new.size(2)] = new[self._copies]

    def attend(
        self, layer: "_LayerCache", queries: Tensor, new: tuple[Tensor, Tensor], slots: tuple[Tensor, Tensor]
    ) -> Tensor:
        if layer.window is None or queries.size(2) <= layer.window:
            return layer.attention(queries, *new, is_causal=True)
        at = torch.arange(queries.size(2), device=queries.device)
        distance = at[:, None] - at
        return layer.attention(queries, *new, attn_mask=(distance >= 0) & (distance < layer.window))


class Step:
    """One token for each of the first ``B`` slots.

    Args:
        positions (Sequence[int]): where each row's token stands in its sequence, ``[B]``.
        device (torch.device): the model's.
    """

    def __init__(self, positions: Sequence[int], device: torch.device) -> None:
        self.positions = torch.tensor(positions, device=device)
        self._rows = torch.arange(len(positions), device=device)
        self._used = max(positions) + 1
        self._visible = cache(self._visible_in)

    def _visible_in(self, window: int | None) -> Tensor:
        """Which slots each row's token sees, ``[B, 1, 1, used]``."""
        distance = self.positions[:, None] - torch.arange(self._used, device=self.positions.device)
        return ((distance >= 0) & (distance < (window or self._used)))[:, None, None]

    def store(self, slots: Tensor, new: Tensor) -> None:
        slots[self._rows, :, self.positions] = new.squeeze(2)

    def attend(
        self, layer: "_LayerCache", queries: Tensor, new: tuple[Tensor, Tensor], slots: tuple[Tensor, Tensor]
    ) -> Tensor:
        keys, values = (cached[: len(self._rows), :, : self._used] for cached in slots)
        # The heads that share a key stand as several queries of one head: each key is read once, and never copied.
        grouped = queries.view(keys.size(0), keys.size(1), -1, keys.size(3))
        return layer.attention(grouped, keys, values, attn_mask=self._visible(layer.window)).view_as(queries)


class KVCache:
    """All layers' keys and values.

    Args:
        attentions (Sequence[nn.Module]): the model's.
        slots (int): the most rows of a step.
        capacity (int): tokens in the longest sequence.
    """

    def __init__(self, attentions: Sequence[nn.Module], slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.layers = [_LayerCache(self, attention) for attention in attentions]
        self.current: Pass  # the pass under way, set before the model is called

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies slots onto others."""
        for layer in self.layers:
            layer.keys[targets] = layer.keys[sources]
            layer.values[targets] = layer.values[sources]


class _LayerCache(nn.Module):
    """One layer's slots. Stands in for torchtune's ``KVCache`` (``update``) and its attention function (``attend``).

    A module only because ``KVCache`` is one: where one has been, torch lets nothing else be.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, cache: KVCache, attention: nn.Module) -> None:
        super().__init__()
        self._cache = cache
        self.attention: Any = getattr(attention, "attend", F.scaled_dot_product_attention)  # Gemma 2 has its own
        self.window: int | None = getattr(attention, "sliding_window", None)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new keys and values, ``[B, kv heads, S, head dim]``, and returns just these, for :meth:`attend`."""
        if not hasattr(self, "keys"):  # allocated here, where the dtype and the shape of a head are known
            shape = (self._cache.slots, keys.size(1), self._cache.capacity, keys.size(3))
            self.keys, self.values = keys.new_zeros(shape), values.new_zeros(shape)
        self._cache.current.store(self.keys, keys)
        self._cache.current.store(self.values, values)
        return keys, values

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, **_: Any) -> Tensor:
        return self._cache.current.attend(self, queries, (keys, values), (self.keys, self.values))


@contextmanager
def attached(model: TransformerDecoder | LogProbDecoder, slots: int, capacity: int) -> Iterator[KVCache]:
    """A cache that the model's attention uses, in evaluation mode, until the context ends; then all is as before."""
    attentions = [layer.attn for layer in model.layers]
    before = [(attn.kv_cache, attn.cache_enabled, attention_call(attn)) for attn in attentions]
    was_training = model.training
    cache = KVCache(attentions, slots, capacity)
    try:
        model.eval()
        for attn, layer in zip(attentions, cache.layers, strict=True):
            attn.kv_cache, attn.cache_enabled = layer, True
            set_attention_call(attn, layer.attend)
        yield cache
    finally:
        for attn, (kv_cache, cache_enabled, call) in zip(attentions, before, strict=True):
            attn.kv_cache, attn.cache_enabled = kv_cache, cache_enabled
            set_attention_call(attn, call)
        cache.layers.clear()  # they name the cache, and the cache them: a ring that would keep its tensors for a while
        model.train(was_training)
