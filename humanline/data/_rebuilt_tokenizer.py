"""Compares a tokenizer with the one that ``transformers`` 5 makes from the same folder."""

import logging
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tokenizers import Tokenizer

__all__ = ["warn_if_rebuilt"]

log = logging.getLogger(__name__)

REBUILT = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
"""Of these classes ``transformers`` 5 reads the vocabulary only. How text is split, it decides itself."""

PARTS = ("normalizer", "pre_tokenizer")
TEXT = "  Hi\n\n there,\tcafe\u0301 123 東京"


def warn_if_rebuilt(folder: Path, tokenizer_class: str | None, tokenizer: Tokenizer, chat: str) -> None:
    """Warns on rank 0 if ``transformers`` gives a chat other ids than tokenizer.json.

    Args:
        folder (Path): the tokenizer's folder.
        tokenizer_class (str | None): the class that its tokenizer_config.json names. Only those in ``REBUILT`` are
            compared, because the import of ``transformers`` needs seconds.
        tokenizer (Tokenizer): the tokenizer in use, as in tokenizer.json.
        chat (str): a chat's text.
    """
    if tokenizer_class not in REBUILT or (dist.is_initialized() and dist.get_rank() > 0):
        return
    theirs = _of_transformers(folder)
    if theirs is None:
        return
    ours, others = (each.encode(chat + TEXT, add_special_tokens=False).tokens for each in (tokenizer, theirs))
    if ours != others:
        at = next(i for i, (one, other) in enumerate(zip_longest(ours, others)) if one != other)
        parts = [part for part in PARTS if repr(getattr(tokenizer, part)) != repr(getattr(theirs, part))]
        log.warning(
            f"tokenizer.path: transformers {version('transformers')} gives chats other ids than "
            f"{folder / 'tokenizer.json'}, which is used here: its {tokenizer_class} has another "
            f"{' and '.join(parts) or 'vocabulary'}, so a chat has {others[at : at + 2]} instead of "
            f'{ours[at : at + 2]}; set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json to have '
            "the ids of tokenizer.json in both"
        )


def _of_transformers(folder: Path) -> Any:
    """Returns the tokenizer of ``transformers``; None if it is not installed, or cannot read the folder."""
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True).backend_tokenizer
    except Exception as error:  # of any kind: a checkpoint need not be one that it knows
        log.debug(f"the tokenizer is not compared with that of transformers: {error}")
        return None
