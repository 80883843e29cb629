"""Memory that was freed goes back to the system, in the forward pass and in backward."""

import resource
import sys
from pathlib import Path

import pytest
import torch
from ranks import forkserver
from torchtune.models.llama3 import llama3

from humanline.models import LogProbDecoder
from humanline.models._heap import return_freed_memory

PIECES, SIZE = 2000, 100_000  # below the size that malloc gives a mapping of its own
ENOUGH = PIECES * SIZE * 0.8


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def freed_between_kept_pieces():
    """Returns the kept pieces. Between any two of them there is freed memory."""
    pieces = [(torch.ones(SIZE // 4), torch.ones(1)) for _ in range(PIECES)]
    return [small for _, small in pieces]


def backward_after_freeing(tensor):
    """Returns by how many bytes the process shrinks in backward, with freed memory between pieces in use before it."""
    kept = freed_between_kept_pieces()
    before = resident()
    tensor.sum().backward()
    assert sum(kept) == PIECES
    return before - resident()


def it_is_returned_now_and_in_backward():
    weight = torch.ones(1, requires_grad=True)
    kept = freed_between_kept_pieces()
    before = resident()
    marked = return_freed_memory(weight * 2)
    assert before - resident() > ENOUGH
    assert backward_after_freeing(marked * weight) > ENOUGH
    assert sum(kept) == PIECES and weight.grad == 4


def a_pass_returns_it_in_forward_and_in_backward():
    model = LogProbDecoder(llama3(32, 1, 2, 1, 16, 16))
    tokens = torch.arange(8)[None]
    kept = freed_between_kept_pieces()
    before = resident()
    found = model(
        tokens,
        masks={None: torch.ones(1, 8, 8, dtype=torch.bool).tril()},
        positions=tokens,
        predictors=torch.arange(7),
        targets=torch.arange(1, 8),
    )
    assert before - resident() > ENOUGH
    assert backward_after_freeing(found) > ENOUGH
    assert sum(kept) == PIECES


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("check", [it_is_returned_now_and_in_backward, a_pass_returns_it_in_forward_and_in_backward])
def test_freed_memory_between_pieces_in_use(check):
    """In a process of its own, whose heap has no gaps of earlier tests."""
    process = forkserver.Process(target=check)
    process.start()
    process.join(120)
    assert process.exitcode == 0
