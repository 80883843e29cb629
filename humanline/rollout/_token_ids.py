from collections.abc import Collection
from typing import Any


def token_ids(tokenizer: Any) -> Collection[int] | None:
    """The ids that a tokenizer has a token for. A model's embedding may have rows for others: padding, and gaps.

    Returns:
        Collection[int] | None: its ``token_ids``; for a tokenizer without, all below its ``vocab_size``; None if it
            has neither.
    """
    ids: Collection[int] | None = getattr(tokenizer, "token_ids", None)
    size: int | None = getattr(tokenizer, "vocab_size", None)
    return ids if ids is not None else None if size is None else range(size)
