"""Rows: the layout of a microbatch of groups for the model.

A row has a fixed budget of tokens and holds groups one after the other. A group's prompt appears once, and its
responses branch from it. Each response's positions restart after the prompt, and its tokens attend to the prompt and
their own branch only. So the log-probs equal those of one sequence per response, but a group's prompt is computed once
and there is no padding between groups.

    prompt A | A1 . . | A2 . | prompt B | B1 . . . | B2 . . | padding

The last token of a response predicts nothing, so it is a target and never an input. One pass of the model holds at most
``rows_per_pass`` rows of ``tokens_per_row`` tokens. This bounds the memory of a step for any data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from humanline.data._group import Group
from humanline.data._query_blocks import QueryBlock, query_blocks
from humanline.errors import ConfigError, DataError
from humanline.torchtune_seam.internals import SUPPORTS_FLEX_ATTENTION

BLOCK = 128  # tokens on a side of a block of FlexAttention's masks


@dataclass(frozen=True, kw_only=True)
class RowBudget:
    """Limits of one pass of the model.

    Args:
        tokens_per_row (int): length of a row, tokens.
        rows_per_pass (int): most rows in one forward and backward pass.
        fixed_shape (bool): True pads every pass to ``rows_per_pass`` rows of one of four widths, since kernels are
            compiled for each shape; False pads only to the pass's longest row.

    Raises:
        ConfigError: if a limit is not a positive integer.
    """

    tokens_per_row: int = 2048
    rows_per_pass: int = 1
    fixed_shape: bool = False

    def __post_init__(self) -> None:
        for key in ("tokens_per_row", "rows_per_pass"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{key}: expected a positive integer, got {value!r}")

    def width(self, tokens: int) -> int:
        """Returns how wide a pass of ``fixed_shape`` is if its longest row has this many tokens.

        The widths are multiples of a quarter of ``tokens_per_row``, in whole blocks, and ``tokens_per_row``.
        """
        quarter = -(-self.tokens_per_row // (4 * BLOCK)) * BLOCK
        return min(-(-tokens // quarter) * quarter, self.tokens_per_row)


@dataclass(frozen=True)
class Segment:
    """A prompt and the responses that branch from it in one row: a whole group, or the part of it that fits."""

    group: int  # index into the microbatch
    responses: tuple[int, ...]  # indices into the group's responses
    tokens: int  # length in the row


@dataclass(frozen=True)
class Rows:
    """The tensors of one pass: ``R`` rows of ``L`` tokens, with ``N`` response tokens of ``B`` responses, at most ``S``
    tokens each.

    ``B`` runs over ``groups`` in order, and over each group's responses in order.
    """

    groups: tuple[Group, ...]
    indices: tuple[int, ...]  # each group's index in the microbatch
    tokens: Tensor  # [R, L] int64
    positions: Tensor  # [R, L] int64, restarting after the prompt
    segments: Tensor  # [R, L] int64, index of the segment in the row; -1 is padding
    branches: Tensor  # [R, L] int64, number of the response in the segment; 0 is the prompt
    predictors: Tensor  # [N] int64 into [R * L]: the token whose hidden state predicts the target
    targets: Tensor  # [N] int64, the response tokens
    mask: Tensor  # [B, S] bool, True where a response has a token; its True cells, in order, are the N tokens
    cells: Tensor  # [N] int64 into [B * S]: these cells
    _labels: Tensor | None  # [B] bool, whether each response is desirable; None if a group has no labels
    _advantages: Tensor | None  # [B] float32; None if a group has none
    sampler_logps: Tensor | None  # [N] float32, the engine's log-probs of the targets; None if a response has none
    num_tokens: int  # input tokens, without padding
    longest: int  # input tokens of the longest prompt with one response
    # For each row and segment: where the segment begins, where its prompt ends, and where each response ends.
    bounds: tuple[tuple[tuple[int, ...], ...], ...]
    _masks: dict[int | None, Tensor | BlockMask] = field(default_factory=dict, init=False, repr=False, compare=False)
    _blocks: dict[int | None, tuple[QueryBlock, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def to(self, device: torch.device) -> "Rows":
        """Returns the rows with every tensor on ``device``; masks are recomputed there.

        A copy to CUDA is asynchronous and complete for later work on the same stream.
        """
        here = {field.name: getattr(self, field.name) for field in fields(self) if field.init}
        ahead = device.type != "cpu"  # the CPU may read its copy at once, so that one must be complete
        moved: dict[str, Any] = {k: v.to(device, non_blocking=ahead) for k, v in here.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def visible(self, window: int | None = None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Returns the attention rule as FlexAttention's ``mask_mod(row, head, query, key)``.

        With a sliding window, a token attends to the last ``window`` positions of its sequence, itself included.
        """
        segments, branches, positions = self.segments, self.branches, self.positions

        def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same_segment = segments[row, query] == segments[row, key]
            key_branch = branches[row, key]
            seen = (query >= key) & same_segment & ((key_branch == 0) | (key_branch == branches[row, query]))
            return seen if window is None else seen & (positions[row, query] - positions[row, key] < window)

        return mask_mod

    def attention_mask(self, window: int | None = None) -> Tensor | BlockMask:
        """Returns torchtune's attention mask: a block mask for FlexAttention on CUDA, else dense bool ``[R, L, L]``."""
        window = self._felt(window)
        if window not in self._masks:
            self._masks[window] = self._mask(self.visible(window))
        return self._masks[window]

    def query_blocks(self, window: int | None = None) -> tuple[QueryBlock, ...]:
        """Returns the attention rule in blocks of queries, for attention on a CPU."""
        window = self._felt(window)
        if window not in self._blocks:
            rule = self.visible(window), window is not None, self.tokens.device
            self._blocks[window] = tuple(
                block
                for row, segments in enumerate(self.bounds)
                for bounds in segments
                for block in query_blocks(row, bounds, *rule)
            )
        return self._blocks[window]

    def _felt(self, window: int | None) -> int | None:
        """Returns the window, or None if no sequence is longer."""
        return None if window is None or window >= self.longest else window

    def _mask(self, visible: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor | BlockMask:
        rows, length = self.tokens.shape
        if self.tokens.is_cuda and SUPPORTS_FLEX_ATTENTION:
            return create_block_mask(visible, rows, None, length, length, device=self.tokens.device)
        row = torch.arange(rows, device=self.tokens.device)[:, None, None]
        at = torch.arange(length, device=self.tokens.device)
        return visible(row, row, at[None, :, None], at[None, None, :])

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each response."""
        return [len(response) for group in self.groups for response in group.responses]

    @property
    def labels(self) -> Tensor:
        """Whether each response is desirable, bool ``[B]``.

        Raises:
            DataError: if a group has no labels.
        """
        return self._of_every_group("labels", self._labels)

    @property
    def advantages(self) -> Tensor:
        """The advantage of each response, float32 ``[B]``.

        Raises:
            DataError: if a group has no advantages.
        """
        return self._of_every_group("advantages", self._advantages)

    def _of_every_group(self, name: str, values: Tensor | None) -> Tensor:
        if values is None:
            without = next(group for group in self.groups if getattr(group, name) is None)
            raise DataError(
                f"{without.id}: expected {name}, found none; use the objective that derives them: KTO for labels, "
                "GRPO for advantages"
            )
        return values

    def per_response(self, values: Tensor) -> Tensor:
        """Scatters one value per response token to its response: ``[..., N]`` to ``[..., B, S]``.

        Zero where ``mask`` is False. Differentiable.
        """
        # Not by masked_scatter, whose gradient makes the host wait for the device.
        cells = values.new_zeros(*values.shape[:-1], self.mask.numel()).index_copy(-1, self.cells, values)
        return cells.unflatten(-1, self.mask.shape)


def split(index: int, group: Group, budget: RowBudget) -> list[Segment]:
    """Cuts a group into segments that each fit a row; most groups are one segment.

    Raises:
        DataError: if the prompt with a single response is longer than a row.
    """
    segments: list[Segment] = []
    responses: list[int] = []
    used = prompt = len(group.prompt)
    for i, response in enumerate(group.responses):
        need = len(response) - 1
        if prompt + need > budget.tokens_per_row:
            raise DataError(
                f"{group.id}: prompt and response have {prompt + need} input tokens, but a row holds "
                f"{budget.tokens_per_row}; raise tokens_per_row or lower dataset.max_tokens"
            )
        if used + need > budget.tokens_per_row:
            segments.append(Segment(index, tuple(responses), used))
            responses, used = [], prompt
        responses.append(i)
        used += need
    return [*segments, Segment(index, tuple(responses), used)]


def parts(group: Group, budget: RowBudget) -> list[Group]:
    """Cuts a group into groups that each fit a row, for objectives that may see its responses in different passes.

    Raises:
        DataError: if the prompt with a single response is longer than a row.
    """
    segments = split(0, group, budget)
    return [group] if len(segments) == 1 else [group.part(segment.responses) for segment in segments]


def pack(groups: Sequence[Group], budget: RowBudget) -> list[list[list[Segment]]]:
    """Packs groups into rows, and rows into passes, first fit by decreasing size. A group is never split over passes.

    Returns:
        list[list[list[Segment]]]: for each pass, its rows; for each row, its segments.

    Raises:
        DataError: if a group does not fit into one pass; the message names it.
    """
    passes: list[list[list[Segment]]] = []
    segmented = [split(i, group, budget) for i, group in enumerate(groups)]
    for segments in sorted(segmented, key=lambda s: -sum(segment.tokens for segment in s)):
        for index, rows in enumerate(passes):
            if (placed := _place(segments, rows, budget)) is not None:
                passes[index] = placed
                break
        else:
            if (placed := _place(segments, [], budget)) is None:
                raise DataError(
                    f"{groups[segments[0].group].id}: its responses need {len(segments)} rows of "
                    f"{budget.tokens_per_row} tokens, but a pass holds {budget.rows_per_pass}; raise tokens_per_row or "
                    "rows_per_pass"
                )
            passes.append(placed)
    return passes


def _place(segments: list[Segment], rows: list[list[Segment]], budget: RowBudget) -> list[list[Segment]] | None:
    """Returns the rows with the segments added, or None if they do not all fit."""
    rows = [list(row) for row in rows]
    for segment in segments:
        for row in rows:
            if sum(s.tokens for s in row) + segment.tokens <= budget.tokens_per_row:
                row.append(segment)
                break
        else:
            if len(rows) == budget.rows_per_pass:
                return None
            rows.append([segment])
    return rows


def lay_out(groups: Sequence[Group], rows: list[list[Segment]], budget: RowBudget) -> Rows:
    """Builds the tensors of one pass.

    Args:
        groups (Sequence[Group]): the microbatch.
        rows (list[list[Segment]]): one of the passes that :func:`pack` returned for it.
        budget (RowBudget): the budget given to :func:`pack`.

    Returns:
        Rows: on the CPU, as wide as its longest row, or of one of the budget's shapes with ``fixed_shape``.
    """
    count, length = len(rows), max(sum(s.tokens for s in row) for row in rows)
    if budget.fixed_shape:
        count, length = budget.rows_per_pass, budget.width(length)
    order = sorted({s.group for row in rows for s in row})
    first_response = dict(zip(order, accumulate((len(groups[i].responses) for i in order), initial=0), strict=False))

    tokens = torch.zeros(count, length, dtype=torch.int64)
    positions = torch.zeros_like(tokens)
    segment_ids = torch.full_like(tokens, -1)
    branches = torch.zeros_like(tokens)
    predictors: dict[int, Tensor] = {}
    targets: dict[int, Tensor] = {}
    bounds: list[list[list[int]]] = [[] for _ in rows]
    for r, row in enumerate(rows):
        start = 0
        for s, segment in enumerate(row):
            group = groups[segment.group]
            prompt = torch.tensor(group.prompt, dtype=torch.int64)
            segment_ids[r, start : start + segment.tokens] = s
            last_of_prompt = start + len(prompt) - 1
            tokens[r, start : start + len(prompt)] = prompt
            positions[r, start : start + len(prompt)] = torch.arange(len(prompt))
            bounds[r].append([start, start + len(prompt)])
            start += len(prompt)
            for branch, i in enumerate(segment.responses, 1):
                response = torch.tensor(group.responses[i], dtype=torch.int64)
                inputs = slice(start, start + len(response) - 1)
                tokens[r, inputs] = response[:-1]
                positions[r, inputs] = len(prompt) + torch.arange(len(response) - 1)
                branches[r, inputs] = branch
                b = first_response[segment.group] + i
                predictors[b] = r * length + torch.tensor([last_of_prompt, *range(start, inputs.stop)])
                targets[b] = response
                start = inputs.stop
                bounds[r][-1].append(start)
    lengths = torch.tensor([len(targets[b]) for b in range(len(targets))])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    laid = tuple(groups[i] for i in order)
    return Rows(
        groups=laid,
        indices=tuple(order),
        tokens=tokens,
        positions=positions,
        segments=segment_ids,
        branches=branches,
        predictors=torch.cat([predictors[b] for b in range(len(predictors))]),
        targets=torch.cat([targets[b] for b in range(len(targets))]),
        mask=mask,
        cells=mask.flatten().nonzero().squeeze(1),
        _labels=_of_responses([group.labels for group in laid], torch.bool),
        _advantages=_of_responses([group.advantages for group in laid], torch.float32),
        sampler_logps=_sampler_logps(laid),
        num_tokens=sum(segment.tokens for row in rows for segment in row),
        longest=int(positions.max()) + 1,
        bounds=tuple(tuple(tuple(segment) for segment in row) for row in bounds),
    )


def _sampler_logps(groups: Sequence[Group]) -> Tensor | None:
    """Returns the engine's log-probs of all response tokens, in order; None if a response has none."""
    given = [logps for group in groups for logps in group.logps or [None]]
    known = [logps for logps in given if logps is not None]
    return None if len(known) < len(given) else torch.tensor([logp for logps in known for logp in logps])


def _of_responses(values: Sequence[Sequence[float] | None], dtype: torch.dtype) -> Tensor | None:
    """Returns one value per response as a tensor; None if a group has no values."""
    given = [each for each in values if each is not None]
    return None if len(given) < len(values) else torch.tensor([x for each in given for x in each], dtype=dtype)
