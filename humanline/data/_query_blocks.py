"""Blocks of queries: the attention rule of rows in pieces, for devices where a mask over a whole row is dear.

A block is a run of neighbouring tokens of one segment. The tokens that it attends to lie in at most two slices of the
row: the prompt, and the responses from the block's first one on. So there are no scores for the rest of the row, and
only the scores of the block's tokens with each other need a mask.

Blocks are padded to few sizes, since a CPU prepares a matrix product for each shape and keeps what it prepared.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

LENGTH = 128  # tokens; longer blocks compute more scores that are hidden, shorter ones make more calls
_QUERIES, _KEYS = 32, 64  # which the sizes of blocks are multiples of

Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class QueryBlock:
    """``n`` neighbouring tokens of a row and the ``m`` tokens that they may attend to.

    Attributes:
        row (int): the row.
        queries (slice): the ``n`` tokens.
        keys (tuple[slice, ...]): the ``m`` tokens, in one or two slices.
        size (tuple[int, int]): of the padded block, ``N`` queries and ``M`` keys, at least ``n`` and ``m``.
        bias (Tensor): of the scores with the last keys: -inf where a token does not attend to one, else 0, bfloat16
            ``[N, at most M]``. Every token attends to all keys before them, and to no padding. Padding attends to some
            key.
    """

    row: int
    queries: slice
    keys: tuple[slice, ...]
    size: tuple[int, int]
    bias: Tensor


def query_blocks(
    row: int, bounds: Sequence[int], visible: Visible, windowed: bool, device: torch.device
) -> Iterator[QueryBlock]:
    """Cuts a segment into blocks.

    Args:
        row (int): the segment's row.
        bounds (Sequence[int]): where the segment begins, where its prompt ends, and where each response ends.
        visible (Visible): the attention rule, of row, head, query and key.
        windowed (bool): whether the rule hides distant tokens too, and so keys of every part.
        device (torch.device): where the masks are made.
    """
    begin, prompt_end = bounds[:2]
    for first, start, stop in _runs(bounds):
        keys = (slice(begin, stop),) if first == begin else (slice(begin, prompt_end), slice(first, stop))
        index = torch.cat([torch.arange(part.start, part.stop, device=device) for part in keys])
        # Without a window, all that comes before a block is visible to each of its tokens.
        asked = index if windowed else index[start - stop :]
        queries = torch.arange(start, stop, device=device)
        hidden = ~visible(torch.tensor(row, device=device), queries, queries[:, None], asked[None])
        size = _up(len(queries), _QUERIES), _up(len(index), _KEYS)
        hidden = F.pad(hidden, (0, size[1] - len(index)), value=True)
        hidden = F.pad(hidden, (0, 0, 0, size[0] - len(queries)), value=False)
        bias = torch.zeros(hidden.shape, dtype=torch.bfloat16, device=device).masked_fill_(hidden, float("-inf"))
        yield QueryBlock(row, slice(start, stop), keys, size, bias)


def _up(count: int, step: int) -> int:
    return -(-count // step) * step


def _runs(bounds: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yields each block's first and last token, and where the part of the segment begins that it is in.

    Short responses share a block, whose part begins with the first of them.
    """
    shared: tuple[int, int] | None = None
    for start, stop in pairwise(bounds):
        is_prompt = start == bounds[0]
        if shared and (is_prompt or stop - shared[0] > LENGTH):
            yield shared[0], *shared
            shared = None
        if is_prompt or stop - start > LENGTH:
            for at in range(start, stop, LENGTH):
                yield start, at, min(at + LENGTH, stop)
        elif stop > start:
            shared = (shared[0] if shared else start, stop)
    if shared:
        yield shared[0], *shared
