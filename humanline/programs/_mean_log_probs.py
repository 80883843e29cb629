"""Mean log-probs of responses under a model that does not train."""

from collections.abc import Iterable, Mapping

import torch
from torchtune.modules import TransformerDecoder

from humanline.data import Group, RowBudget, lay_out, pack, parts
from humanline.errors import DataError
from humanline.models import LogProbDecoder, fixed_log_probs


def check_fit(groups: Iterable[Group], model: TransformerDecoder) -> None:
    """
    Raises:
        DataError: if a group has more positions or other tokens than the model.
    """
    rows = model.tok_embeddings.num_embeddings
    for group in groups:
        longest = len(group.prompt) + max(map(len, group.responses)) - 1
        if longest > model.max_seq_len:
            raise DataError(
                f"{group.id}: prompt and response need {longest} positions, the model has {model.max_seq_len} "
                "(max_seq_len); lower dataset.max_tokens"
            )
        largest = max(max(tokens) for tokens in (group.prompt, *group.responses))
        if largest >= rows:
            raise DataError(
                f"{group.id}: token id {largest} is outside the model's vocabulary of {rows:,}; encode with the "
                "model's tokenizer"
            )


def mean_log_probs(
    model: LogProbDecoder, groups: Mapping[int, Group], budget: RowBudget, device: torch.device
) -> dict[int, list[float]]:
    """Computes the mean log-prob of each response's tokens.

    Args:
        model (LogProbDecoder): the model.
        groups (Mapping[int, Group]): the groups, each under a key.
        budget (RowBudget): the most that a pass takes; a larger group is cut to several.
        device (torch.device): the model's device.

    Returns:
        dict[int, list[float]]: nats, for each response of the group under each key.
    """
    owners = [key for key, group in groups.items() for _ in parts(group, budget)]
    pieces = [part for group in groups.values() for part in parts(group, budget)]
    of_pieces: dict[int, list[float]] = {}
    for planned in pack(pieces, budget) if pieces else ():
        rows = lay_out(pieces, planned, budget).to(device)
        sums = rows.per_response(fixed_log_probs(model, rows)).sum(1, dtype=torch.float64)
        means = iter((sums / rows.mask.sum(1)).tolist())
        of_pieces |= {
            piece: [next(means) for _ in part.responses] for piece, part in zip(rows.indices, rows.groups, strict=True)
        }
    found: dict[int, list[float]] = {key: [] for key in groups}
    for piece, key in enumerate(owners):
        found[key] += of_pieces[piece]
    return found
