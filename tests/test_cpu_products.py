import subprocess
import sys

import pytest

from humanline.models._cpu_products import float32_is_faster


@pytest.mark.parametrize(
    ("machine", "vendor", "amx", "avx512_bf16", "expected"),
    [
        ("x86_64", "GenuineIntel", True, True, False),
        ("x86_64", "GenuineIntel", False, True, True),
        ("x86_64", "GenuineIntel", False, False, True),
        ("x86_64", "AuthenticAMD", False, True, False),
        ("x86_64", "AuthenticAMD", False, False, True),
        ("aarch64", "", False, False, False),
    ],
)
def test_processors_whose_float32_products_are_faster(machine, vendor, amx, avx512_bf16, expected):
    assert float32_is_faster(machine, vendor, amx, avx512_bf16) is expected


# In a process of its own, since kernels are replaced for the whole process.
PRODUCTS = """
import torch
from torch.nn.functional import linear
from humanline.models._cpu_products import use_float32_kernels

def random(*shape):
    return torch.randn(shape, generator=generator).bfloat16()

generator = torch.Generator().manual_seed(0)
a, b, c = random(64, 96), random(96, 80), random(64, 80)
q, k, peaks = random(3, 64, 96), random(3, 96, 80), random(3, 64, 1)
x, weight, bias = a.clone().requires_grad_(), random(80, 96).requires_grad_(), random(80).requires_grad_()
part = torch.full((2, 64, 80), 7.0, dtype=torch.bfloat16)
small, before = (a[:15], b), a[:15] @ b
mistakes = [lambda: a @ b.float(), lambda: a @ c, lambda: torch.mm(a, b, out=c.float())]
messages = []
for mistake in mistakes:
    try:
        mistake()
    except RuntimeError as error:
        messages.append(str(error))
assert len(messages) == len(mistakes)

with torch.profiler.profile() as before_it:
    a @ b
use_float32_kernels(smallest=16)
with torch.profiler.profile() as after_it:
    a @ b
casts = ["aten::to" in {event.key for event in each.key_averages()} for each in (before_it, after_it)]
assert casts == [False, True]

def same(found, expected):
    assert found.dtype == torch.bfloat16 and found.is_contiguous() and torch.equal(found, expected.bfloat16())

A, B, C, Q, K = (each.float() for each in (a, b, c, q, k))
same(a @ b, A @ B)
same(torch.addmm(c, a, b, beta=0.5, alpha=-2), torch.addmm(C, A, B, beta=0.5, alpha=-2))
same(q @ k, Q @ K)
same(torch.baddbmm(-peaks, q, k, alpha=0.25), torch.baddbmm(-peaks.float(), Q, K, alpha=0.25))
torch.mm(a, b, out=part[0])
same(part[0], A @ B)
assert torch.all(part[1] == 7)
same(torch.mm(a, b, out=torch.empty(0, dtype=torch.bfloat16)), A @ B)
same(linear(x, weight, bias), linear(A, weight.float(), bias.float()))
linear(x, weight, bias).backward(c)
same(x.grad, C @ weight.float())
same(weight.grad, C.t() @ A)
wide, tall = random(96, 9000), random(9000, 96)  # in pieces
same(a @ wide, A @ wide.float())
same(tall @ b, tall.float() @ B)
part = torch.empty(9000, 80, dtype=torch.bfloat16)
torch.mm(tall, b, out=part)
same(part, tall.float() @ B)
assert torch.equal(small[0] @ small[1], before)
for mistake, message in zip(mistakes, messages, strict=True):
    try:
        mistake()
    except RuntimeError as error:
        assert str(error) == message, error
    else:
        raise AssertionError(f"not refused: {message}")
"""


def test_products_of_bf16_are_those_of_float32_rounded_once():
    command = [sys.executable, "-W", "error", "-c", PRODUCTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
