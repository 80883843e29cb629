"""Measures products of bfloat16 matrices by torch's kernels for bfloat16, and by those for float32.

    python benchmarks/cpu_products.py
    python benchmarks/cpu_products.py AVX2           # as on a processor that has no more
    python benchmarks/cpu_products.py AVX512_CORE

The products are SmolLM2-135M's, for 2,048 tokens where no other number is named, on one thread. A time is the shortest
of seven. A run chooses between the kernels by the processor (humanline/models/_cpu_products.py).
"""

import os
import sys
import time
from collections.abc import Callable

if sys.argv[1:]:  # read when torch is imported
    os.environ["ONEDNN_MAX_CPU_ISA"] = sys.argv[1]
    os.environ["MKL_ENABLE_INSTRUCTIONS"] = sys.argv[1].partition("_")[0]

import torch
from humanline.models._cpu_products import use_float32_kernels
from torch import Tensor

RUNS = 7


def random(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def products() -> dict[str, Callable[[], Tensor]]:
    x, w, grad = random(2048, 576), random(1536, 576), random(2048, 1536)
    q, keys = random(9, 128, 64), random(9, 64, 512)
    one, few, head = random(1, 576), random(64, 576), random(49152, 576)
    return {
        "layer, forward": lambda: x @ w.t(),
        "layer, gradient of the input": lambda: grad @ w,
        "layer, gradient of the weight": lambda: grad.t() @ x,
        "attention's scores, 128 queries and 512 keys": lambda: torch.bmm(q, keys),
        "layer, 1 token (keeps its kernel)": lambda: one @ w.t(),
        "layer, 64 tokens, as in sampling": lambda: few @ w.t(),
        "head, 64 tokens, as in sampling": lambda: few @ head.t(),
    }


def milliseconds(product: Callable[[], Tensor]) -> float:
    product()
    shortest = float("inf")
    for _ in range(RUNS):
        start = time.perf_counter()
        product()
        shortest = min(shortest, time.perf_counter() - start)
    return 1e3 * shortest


def main() -> None:
    torch.set_num_threads(1)
    by_bf16 = {name: milliseconds(product) for name, product in products().items()}
    use_float32_kernels(smallest=16)
    by_float32 = {name: milliseconds(product) for name, product in products().items()}
    print(f"torch {torch.__version__}, {sys.argv[1:] or 'all that the processor has'}")
    print("| product | bfloat16 kernel, ms | float32 kernel, ms | ratio |\n|---|---|---|---|")
    for name, before in by_bf16.items():
        print(f"| {name} | {before:.2f} | {by_float32[name]:.2f} | {before / by_float32[name]:.1f} |")


if __name__ == "__main__":
    main()
