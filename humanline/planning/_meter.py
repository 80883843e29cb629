"""Counts the memory of tensors and the floating-point operations, for fake and real tensors."""

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

_BLOCK = 512  # bytes; allocators round up to blocks

aten = torch.ops.aten
FLOPS = flop_registry | {  # torch does not count the CPU's flash kernel
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class Meter(TorchDispatchMode):
    """A mode that counts every new storage under the current label until the storage is freed.

    Args:
        embed_dim (int): matrices that the head makes with another number of columns count as logits.

    Attributes:
        moment (tuple[Any, ...]): name of the current phase of the step.
        peaks (dict[tuple[Any, ...], Counter[str]]): for each moment, bytes by label when their total was largest.
        flops (int): floating-point operations of matrix products and attention. A fused kernel's attention counts all
            pairs of tokens.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.now: Counter[str] = Counter()
        self.moment: tuple[Any, ...] = ()
        self.peaks: dict[tuple[Any, ...], Counter[str]] = {}
        self.flops = 0
        self._label = "activations"
        self._storage_resize: Any = torch.UntypedStorage.resize_
        self._labels: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(each, "__tensor_flatten__") and not issubclass(each, FakeTensor) for each in types):
            return NotImplemented  # called again with the tensors inside the subclass
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in FLOPS:
            self.flops += FLOPS[packet](*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._count(leaf)
        return out

    def __enter__(self) -> "Meter":
        def resized(storage: Any, size: int) -> Any:  # FSDP frees the memory of gathered weights in this way
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
        """Bytes by label at the moment with the largest total."""
        return max(self.peaks.values(), key=Counter.total, default=Counter())

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """Counts new storages under another label."""
        before, self._label = self._label, name
        try:
            yield
        finally:
            self._label = before

    def relabel(self, tensor: Tensor, name: str) -> None:
        """Moves a tensor's storages to another label."""
        for part in _parts(tensor):
            entry = self._labels.get(part.untyped_storage())
            if entry is not None:
                self.now[entry[0]] -= entry[1]
                self.now[name] += entry[1]
                entry[0] = name

    def forget_peak(self) -> None:
        """Resets the peaks and the count of operations."""
        self.peaks, self.flops = {}, 0
        self._watch()

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._labels:
            return
        in_head = self.moment[-1:] == ("head",) and self._label == "activations"
        is_logits = in_head and tensor.dim() == 2 and tensor.size(1) not in (1, self.embed_dim)
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
    """Yields the plain tensors inside a tensor."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _parts(getattr(tensor, name))
    elif isinstance(tensor, Tensor):
        yield tensor


def blank(tensor: Any, device: torch.device) -> Any:
    """Returns a tensor like another one, on a device and with undefined values. Wrapper subclasses work too."""
    if not isinstance(tensor, Tensor):  # for example the mesh of a DTensor
        return tensor
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        if isinstance(tensor, NF4Tensor):  # it also stores its device in its metadata
            context = context | {"tensor_meta": replace(context["tensor_meta"], device=device)}
        parts = {name: blank(getattr(tensor, name), device) for name in names}
        return type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())
    return torch.empty_like(tensor, device=device)
