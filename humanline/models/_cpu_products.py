"""Products of bfloat16 matrices on processors that multiply float32 faster.

torch's bfloat16 kernels are fast with AMX, and with AMD's AVX-512 BF16. Elsewhere they take longer than its float32
kernels: 1.7 times with Intel's AVX-512 BF16 without AMX, 5 times with plain AVX-512, 6 to 33 times with AVX2, which is
what most desktops and laptops have (docs/benchmarks.md). Here float32 kernels compute such products. The result is the
same but for the order of the sums: a product of two bfloat16 numbers is exact in float32, the sums are float32, and
only the result is rounded.
"""

import functools
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PIECE = 768  # rows or columns of a large matrix that are held in float32 at a time, of a few MB
_LIBRARY = torch.library.Library("aten", "IMPL")


@functools.cache
def speed_up_bf16_products() -> None:
    """Computes products of bfloat16 matrices on the CPU by float32 kernels, if these are faster, in the whole process.

    Without ``torch.library.get_kernel``, which came with torch 2.9, this does nothing.
    """
    amx, avx512_bf16 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    if hasattr(torch.library, "get_kernel") and float32_is_faster(platform.machine(), _vendor(), amx, avx512_bf16):
        use_float32_kernels(smallest=64 if avx512_bf16 else 16)


def float32_is_faster(machine: str, vendor: str, amx: bool, avx512_bf16: bool) -> bool:
    """Returns whether a processor multiplies float32 matrices faster than bfloat16 ones.

    Args:
        machine (str): the architecture, of ``platform.machine()``; known for x86 only, False for others.
        vendor (str): the ``vendor_id`` of /proc/cpuinfo.
        amx (bool): whether it has AMX.
        avx512_bf16 (bool): whether it has AVX-512 BF16.
    """
    return machine in ("x86_64", "AMD64") and not amx and not (avx512_bf16 and vendor == "AuthenticAMD")


def use_float32_kernels(smallest: int) -> None:
    """Replaces the CPU's products of bfloat16 matrices, in the whole process.

    Args:
        smallest (int): matrices with a smaller side keep their kernel, since casts would take longer than the product.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")  # that kernels are replaced
        for name in ("mm", "addmm", "bmm", "baddbmm"):
            product = torch.library.get_kernel(f"aten::{name}", "CPU")
            for overload in (name, f"{name}.out"):
                own = torch.library.get_kernel(f"aten::{overload}", "CPU")
                _LIBRARY.impl(overload, _by_float32(product, own, smallest), "CPU", with_keyset=True)


def _by_float32(product: Any, own: Any, smallest: int) -> Callable[..., Tensor]:
    def multiply(keys: Any, *args: Tensor, out: Tensor | None = None, **settings: Any) -> Tensor:
        a, b = args[-2:]
        given = args if out is None else (*args, out)
        if min(*a.shape[-2:], b.size(-1)) < smallest or any(each.dtype != torch.bfloat16 for each in given):
            settings |= {} if out is None else {"out": out}
            return own.call_boxed(keys, *args, **settings)
        if len(args) == 2 and a.dim() == 2 and max(a.size(0), b.size(1)) > _PIECE:
            found = _in_pieces(functools.partial(product.call_boxed, keys), a, b)
        else:
            found = product.call_boxed(keys, *(each.float() for each in args), **settings)
        return found.to(torch.bfloat16) if out is None else out.resize_as_(found).copy_(found)

    return multiply


def _in_pieces(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Computes ``a @ b`` in bfloat16, without the larger matrix and the result as a whole in float32."""
    found, by_columns = a.new_empty(a.size(0), b.size(1)), a.size(0) <= b.size(1)
    a, b = (a.float(), b) if by_columns else (a, b.float())
    for start in range(0, max(found.shape), _PIECE):
        piece = slice(start, start + _PIECE)
        if by_columns:
            found[:, piece] = product(a, b[:, piece].float())
        else:
            found[piece] = product(a[piece].float(), b)
    return found


def _vendor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
