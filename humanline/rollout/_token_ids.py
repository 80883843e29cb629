from collections.abc import Collection
from typing import Any


def token_ids(tokenizer: Any) -> Collection[int] | None:
    """Returns the ids that have a token. A model's embedding may have more rows: padding, and gaps.

    Returns:
        Collection[int] | None: the tokenizer's ``token_ids``, else all ids below its ``vocab_size``; None if it has
            neither.
    """
    ids: Collection[int] | None = getattr(tokenizer, "token_ids", None)
    size: int | None = getattr(tokenizer, "vocab_size", None)
    return ids if ids is not None else None if size is None else range(size)
