"""Tokenises many texts at once: with fastokens, which is faster than tokenizers, where both give the same ids."""

import logging
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from humanline.errors import DataError

__all__ = ["BatchEncoder", "Disagreement"]

log = logging.getLogger(__name__)

CHECK_EVERY = 64
"""One text of so many is also tokenised by ``tokenizers``."""


class Disagreement(Exception):
    """fastokens gave other ids than tokenizers, so what it has tokenised must be tokenised again."""


class BatchEncoder:
    """Tokenises lists of texts, in threads.

    Args:
        source (Path | str): tokenizer.json, or such a file's text.
        tokenizer (Tokenizer): the same tokenizer, whose ids count.
    """

    def __init__(self, source: Path | str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._fast = _load(source)
        self._seen = 0

    def __call__(self, texts: Sequence[str]) -> list[array]:
        """Returns the ids of each text, without special tokens around it.

        Raises:
            DataError: if a text is not valid Unicode.
            Disagreement: if the texts so far must be tokenised again; from then on ``tokenizers`` tokenises alone.
        """
        if self._fast is None:
            return self._exactly(texts)
        try:
            ids, ends = self._fast.encode_batch_flat(list(texts), add_special_tokens=False)
        except Exception:  # a text that fastokens does not accept
            self._fast = None
            raise Disagreement from None
        tokens, offsets = array("i"), array("q")
        tokens.frombytes(ids)
        offsets.frombytes(ends)
        found = [tokens[start:end] for start, end in zip(offsets, offsets[1:], strict=False)]
        checked = range(-self._seen % CHECK_EVERY, len(texts), CHECK_EVERY)
        self._seen += len(texts)
        if [found[i] for i in checked] != self._exactly([texts[i] for i in checked]):
            self._fast = None
            raise Disagreement
        return found

    def _exactly(self, texts: Sequence[str]) -> list[array]:
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            raise DataError("messages: a text is not valid Unicode (it has a lone surrogate); correct it") from None
        return [array("i", each.ids) for each in encodings]


def _load(source: Path | str) -> Any:
    """Returns fastokens' tokenizer; None if it is not installed, or does not know this kind of tokenizer."""
    try:
        from fastokens import Tokenizer as FastTokenizer

        fast = FastTokenizer.from_json_str(source if isinstance(source, str) else source.read_text(encoding="utf-8"))
        fast.no_truncation()
        fast.no_padding()
    except Exception as error:
        log.debug(f"fastokens is not used: {error}")
        return None
    return fast
