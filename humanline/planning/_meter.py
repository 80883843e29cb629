"""Counts what tensors take and what operations cost, of fake tensors and of real ones alike."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torchtune.modules.common_utils import NF4Tensor

_BLOCK = 512  # bytes; allocators give whole blocks

aten = torch.ops.aten
FLOPS = flop_registry | {  # torch does not count the flash kernel of CPUs
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class Meter(TorchDispatchMode):
    """Within it, every new storage counts under the label of the moment until it is freed.

    Args:
        vocabulary (int): tensors of so many columns count as logits.

    Attributes:
        moment (tuple[Any, ...]): a name for what happens now.
        peaks (dict[tuple[Any, ...], Counter[str]]): for each moment, bytes by label when all together were the most.
        flops (int): floating-point operations of matrix products and attention, of which each token counts with each.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.now: Counter[str] = Counter()
        self.moment: tuple[Any, ...] = ()
        self.peaks: dict[tuple[Any, ...], Counter[str]] = {}
        self.flops = 0
        self._label = "activations"
        self._storage_resize: Any = torch.UntypedStorage.resize_
        self._labels: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(each, "__tensor_flatten__") and not issubclass(each, FakeTensor) for each in types):
            return NotImplemented  # it comes back with what the subclass is made of
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in FLOPS:
            self.flops += FLOPS[packet](*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._count(leaf)
        return out

    def __enter__(self) -> "Meter":
        def resized(storage: Any, size: int) -> Any:  # how FSDP gives the memory of gathered weights back
            done = self._storage_resize(storage, size)
            self._resize(storage, "gathered weights")
            return done

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.UntypedStorage.resize_ = self._storage_resize  # type: ignore[method-assign]

    @property
    def peak(self) -> Counter[str]:
        """Bytes by label at the moment at which all together were the most."""
        return max(self.peaks.values(), key=Counter.total, default=Counter())

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """New storages count under another name."""
        before, self._label = self._label, name
        try:
            yield
        finally:
            self._label = before

    def relabel(self, tensor: Tensor, name: str) -> None:
        """Counts a tensor's storages under another name."""
        for part in _parts(tensor):
            entry = self._labels.get(part.untyped_storage())
            if entry is not None:
                self.now[entry[0]] -= entry[1]
                self.now[name] += entry[1]
                entry[0] = name

    def forget_peak(self) -> None:
        """Begins to look for the peak, and to count operations, anew."""
        self.peaks, self.flops = {}, 0
        self._watch()

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._labels:
            return
        is_logits = tensor.dim() == 2 and tensor.size(1) == self.vocabulary and self._label == "activations"
        entry = ["logits" if is_logits else self._label, 0]
        self._labels[storage] = entry
        weakref.finalize(storage, self._free, entry)
        self._resize(storage)

    def _resize(self, storage: Any, label: str | None = None) -> None:
        entry = self._labels.get(storage)
        if entry is None:
            return
        if label is not None:
            self.now[entry[0]] -= entry[1]
            self.now[label] += entry[1]
            entry[0] = label
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self.now[entry[0]] += size - entry[1]
        entry[1] = size
        self._watch()

    def _watch(self) -> None:
        peak = self.peaks.get(self.moment)
        if peak is None or self.now.total() > peak.total():
            self.peaks[self.moment] = Counter(self.now)

    def _free(self, entry: list[Any]) -> None:
        self.now[entry[0]] -= entry[1]


def _parts(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _parts(getattr(tensor, name))
    elif isinstance(tensor, Tensor):
        yield tensor


def blank(tensor: Any, device: torch.device) -> Any:
    """A tensor like another, of undefined values, on a device; of a wrapper subclass too."""
    if not isinstance(tensor, Tensor):  # such as the mesh of a DTensor
        return tensor
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        if isinstance(tensor, NF4Tensor):  # it has its device in writing
            context = context | {"tensor_meta": replace(context["tensor_meta"], device=device)}
        parts = {name: blank(getattr(tensor, name), device) for name in names}
        return type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())
    return torch.empty_like(tensor, device=device)
