"""A KV cache for a batch whose rows start, grow and end at different times.

Each attention layer has one slot per row, with room for the longest sequence. The model runs two kinds of pass:
prefills that fill slots with prompts, and steps that add one token to every row. torchtune's own ``KVCache`` has one
position for all rows, attends over the whole allocated length in every step, and copies each key for every query head
that shares it.
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
    """One pass of the model: how it uses a layer's slots, ``[slots, kv heads, capacity, head dim]``."""

    def store(self, slots: Tensor, new: Tensor) -> None:
        """Writes the new keys or values, ``[B, kv heads, S, head dim]``."""

    def attend(
        self, layer: "_LayerCache", queries: Tensor, new: tuple[Tensor, Tensor], slots: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Returns a layer's attention output for ``queries``, ``[B, heads, S, head dim]``.

        It reads either the new keys and values, or those in the slots.
        """


class Prefill:
    """A pass over whole prompts. They are padded on the right, where causal attention does not look.

    Args:
        copies (Sequence[int]): for each slot to fill, the index of its prompt in the batch.
        first_slot (int): the first slot to fill; the others follow it.
        device (torch.device): the model's device.
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
    """A pass that adds one token to each of the first ``B`` slots.

    Args:
        positions (Sequence[int]): the position of each row's token in its sequence, ``[B]``.
        device (torch.device): the model's device.
    """

    def __init__(self, positions: Sequence[int], device: torch.device) -> None:
        self.positions = torch.tensor(positions, device=device)
        self._rows = torch.arange(len(positions), device=device)
        self._used = max(positions) + 1
        self._visible = cache(self._visible_in)

    def _visible_in(self, window: int | None) -> Tensor:
        """Returns which cached positions each row's token attends to, bool ``[B, 1, 1, used]``."""
        distance = self.positions[:, None] - torch.arange(self._used, device=self.positions.device)
        return ((distance >= 0) & (distance < (window or self._used)))[:, None, None]

    def store(self, slots: Tensor, new: Tensor) -> None:
        slots[self._rows, :, self.positions] = new.squeeze(2)

    def attend(
        self, layer: "_LayerCache", queries: Tensor, new: tuple[Tensor, Tensor], slots: tuple[Tensor, Tensor]
    ) -> Tensor:
        keys, values = (cached[: len(self._rows), :, : self._used] for cached in slots)
        # Query heads that share a key become several queries of one head, so each key is read once and never copied.
        grouped = queries.view(keys.size(0), keys.size(1), -1, keys.size(3))
        return layer.attention(grouped, keys, values, attn_mask=self._visible(layer.window)).view_as(queries)


class KVCache:
    """The keys and values of all layers.

    Args:
        attentions (Sequence[nn.Module]): the model's attention modules.
        slots (int): the maximum number of rows in a step.
        capacity (int): tokens in the longest sequence.
    """

    def __init__(self, attentions: Sequence[nn.Module], slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.layers = [_LayerCache(self, attention) for attention in attentions]
        self.current: Pass  # set before the model is called

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies the ``sources`` slots onto the ``targets`` slots."""
        for layer in self.layers:
            layer.keys[targets] = layer.keys[sources]
            layer.values[targets] = layer.values[sources]


class _LayerCache(nn.Module):
    """One layer's slots. Replaces torchtune's ``KVCache`` (``update``) and its attention function (``attend``).

    It is a module because ``KVCache`` is one: torch lets only a module replace a module.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, cache: KVCache, attention: nn.Module) -> None:
        super().__init__()
        self._cache = cache
        self.attention: Any = getattr(attention, "attend", F.scaled_dot_product_attention)  # Gemma 2 has its own
        self.window: int | None = getattr(attention, "sliding_window", None)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new keys and values, ``[B, kv heads, S, head dim]``, and returns only these, for :meth:`attend`."""
        if not hasattr(self, "keys"):  # here the dtype and the shape of a head are known
            shape = (self._cache.slots, keys.size(1), self._cache.capacity, keys.size(3))
            self.keys, self.values = keys.new_zeros(shape), values.new_zeros(shape)
        self._cache.current.store(self.keys, keys)
        self._cache.current.store(self.values, values)
        return keys, values

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, **_: Any) -> Tensor:
        return self._cache.current.attend(self, queries, (keys, values), (self.keys, self.values))


@contextmanager
def attached(model: TransformerDecoder | LogProbDecoder, slots: int, capacity: int) -> Iterator[KVCache]:
    """Gives the model's attention a KV cache, in evaluation mode; restores the model when the context ends."""
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
        cache.layers.clear()  # breaks a reference cycle that would keep the tensors alive
        model.train(was_training)
