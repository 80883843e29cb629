"""Memory that was freed goes back to the system where backward needs more at once."""

import resource
import sys
from pathlib import Path

import pytest
import torch

from humanline.models._heap import trim_in_backward

PIECES, SIZE = 2000, 100_000  # below the size that malloc gives a mapping of its own


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("requires_grad", [True, False])
def test_freed_memory_between_pieces_in_use_is_returned_where_a_gradient_is_known(requires_grad):
    weight = torch.ones(1, requires_grad=True)
    pieces = [(torch.ones(SIZE // 4), torch.ones(1)) for _ in range(PIECES)]
    kept = [small for _, small in pieces]
    pieces.clear()
    before = resident()
    marked = trim_in_backward((weight if requires_grad else weight.detach()) * 2)
    (marked * weight).sum().backward()
    assert (before - resident() > PIECES * SIZE * 0.8) == requires_grad
    assert sum(kept) == PIECES and weight.grad == (4 if requires_grad else 2)
