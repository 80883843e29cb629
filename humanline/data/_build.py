"""Builds a dataset: reads rows, checks them, encodes them, cuts them, and counts what is left out."""

import json
import logging
from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from difflib import get_close_matches
from functools import cache
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any

from humanline.data._batch_encoder import Disagreement
from humanline.data._dataset import GroupDataset
from humanline.data._encoded import GroupWriter, open_encoded
from humanline.data._examples import read_examples
from humanline.data._files import Row
from humanline.data._group import Group
from humanline.data._left_out import LeftOut
from humanline.data._options import DatasetOptions
from humanline.data._read import SourceName, open_rows
from humanline.data._readers import Example
from humanline.data._record import BadRow, Record
from humanline.data._schemas import FIELDS, RESPONSES, find_schema, unread_columns
from humanline.data._tally import Tally
from humanline.errors import ConfigError, DataError
from humanline.progress import Progress

__all__ = ["build", "map_rows", "parse_text"]

log = logging.getLogger(__name__)

Groups = Callable[[Iterator[Row], Tally], Iterable[Group | BadRow]]

CHUNK = 256
"""Examples whose texts are tokenised together."""


def build(
    source: SourceName, options: DatasetOptions, fields: Collection[str], made_of: Any, groups_of: Groups
) -> GroupDataset:
    """Builds the dataset of a source. Collective if there are ranks: they share the encoded groups.

    Args:
        source (SourceName): the source.
        options (DatasetOptions): how it is read and cut.
        fields (Collection[str]): the fields that ``column_map`` may name.
        made_of (Any): what the groups depend on besides source and options, as JSON; None keeps no groups for later.
        groups_of (Groups): turns rows into groups, and those that cannot be used into errors.

    Raises:
        ConfigError: if a setting is invalid.
        DataError: if too many rows cannot be used, or no group is left.
    """
    budget = options.budget
    for field in options.column_map or {}:
        if field not in fields:
            near = get_close_matches(str(field), fields, n=1) or ["prompt"]
            raise ConfigError(f"column_map: expected fields of a known schema, such as {near[0]}, got '{field}'")
    keys = ("split", "name", "data_files", "revision", "streaming", "column_map")
    reading = {key: getattr(options, key) for key in keys}
    opened = cache(lambda: open_rows(source, **reading))  # only where it is needed: not on every rank

    def key() -> str | None:
        if made_of is None:
            return None
        facts = [opened().digest(), asdict(options), made_of, _code()]
        return blake2b(json.dumps(facts, default=_plain).encode(), digest_size=16).hexdigest()

    def encode(folder: Path) -> None:
        tally, writer = Tally(opened().name, options.split), GroupWriter(folder)
        rows = tally.counted(opened().read())
        with Progress(rows, desc=f"reading {tally.name}", unit=" rows", delay=2, leave=False) as bar:
            for found in groups_of(iter(bar), tally):
                if (group := tally.fitted(found, budget)) is not None:
                    writer.add(group)
        opened().check_columns()
        tally.check(options.on_bad_row)
        tally.check_any(len(writer))
        writer.close({"name": tally.name, "notes": [*tally.notes(), *tally.cuts(budget)], "dropped": tally.dropped})

    def encode_again_if_needed(folder: Path) -> None:
        try:
            encode(folder)
        except Disagreement:
            log.warning(f"{opened().name}: fastokens gives other ids than tokenizers, which is used instead")
            encode(folder)

    groups = open_encoded(key, encode_again_if_needed)
    facts = groups.facts
    return GroupDataset(groups, facts["name"], facts["notes"], budget, facts["dropped"])


def map_rows(parse: Callable[[Record], Group], column_map: Mapping[str, str | None]) -> Groups:
    """Returns a function that turns each row into a group."""

    def groups_of(rows: Iterator[Row], tally: Tally) -> Iterator[Group | BadRow]:
        for where, row in rows:
            try:
                yield row if isinstance(row, BadRow) else parse(Record(where, row, column_map))
            except BadRow as error:
                yield error

    return groups_of


def parse_text(kind: str, tokenizer: Any, source: SourceName, options: DatasetOptions) -> GroupDataset:
    """Builds the dataset of a source of text; of several schemas that fit, one of ``kind`` is meant."""

    def groups_of(rows: Iterator[Row], tally: Tally) -> Iterator[Group | BadRow]:
        head: list[Row] = []
        sound: list[Any] = []
        while not sound and (part := list(islice(rows, 64))):  # the first rows may all be bad
            head += part
            sound = [row for _, row in part if not isinstance(row, BadRow)]
        column_map = options.column_map or {}
        if not sound:
            return (row for _, row in head)
        schema = find_schema(sound, kind, column_map, options.format)
        if schema.kind == RESPONSES:
            raise DataError(
                f"{tally.name}: schema {schema.name} ({schema.columns}) does not say which response is better; score "
                "the responses with humanline_label, and use its output"
            )
        tally.schema = f"{schema.name} ({schema.columns})"
        tally.unread = unread_columns(sound, schema, column_map)
        markers = getattr(tokenizer, "markers", ())
        examples = read_examples(chain(head, rows), schema, column_map, options.system_prompt, markers, tally)
        return _encoded(tokenizer, examples)

    fingerprint = getattr(tokenizer, "fingerprint", None)
    made_of = None if fingerprint is None else [kind, fingerprint()]
    return build(source, options, FIELDS, made_of, groups_of)


def _encoded(tokenizer: Any, examples: Iterator[Example | BadRow]) -> Iterator[Group | BadRow]:
    """Encodes examples. Texts are tokenised in threads of their own while the next ones are rendered."""
    if not hasattr(tokenizer, "encode_texts"):
        yield from (_one_by_one(tokenizer, example) for example in examples)
        return
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[Any] = deque()
        while chunk := list(islice(examples, CHUNK)):
            rendered = [_rendered(tokenizer, example) for example in chunk]
            texts = [text for each in rendered if not isinstance(each, BadRow) for text in each]
            waiting.append((chunk, rendered, thread.submit(tokenizer.encode_texts, texts)))
            if len(waiting) > 2:
                yield from _joined(tokenizer, *waiting.popleft())
        for each in waiting:
            yield from _joined(tokenizer, *each)


def _joined(tokenizer: Any, chunk: list[Any], rendered: list[Any], encoded: Any) -> Iterator[Group | BadRow]:
    ids = iter(encoded.result())
    for example, texts in zip(chunk, rendered, strict=True):
        if isinstance(texts, BadRow):
            yield texts
            continue
        try:
            prompt, responses = tokenizer.split(list(islice(ids, len(texts))), example.tools)
        except DataError as error:
            yield BadRow.of(error, example.where)
        else:
            yield Group(prompt, tuple(responses), example.scores, example.labels, example.where)


def _rendered(tokenizer: Any, example: Example | BadRow) -> list[str] | BadRow:
    if isinstance(example, BadRow):
        return example
    try:
        texts: list[str] = tokenizer.render(example.prompt, example.responses, example.tools)
        for text in texts:
            text.encode("utf-8")
        return texts
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair
        reason = "a text has half of a character"
        return BadRow(example.where, f"{reason} (a lone surrogate); remove it", reason)
    except (DataError, LeftOut) as error:  # the chat template knows no places
        return _bad(error, example.where)


def _one_by_one(tokenizer: Any, example: Example | BadRow) -> Group | BadRow:
    """Encodes an example with a tokenizer that has only ``encode_prompt`` and ``encode_response``."""
    if isinstance(example, BadRow):
        return example
    tools = {} if example.tools is None else {"tools": example.tools}
    try:
        prompt = tokenizer.encode_prompt(example.prompt, **tools)
        responses = [
            tokenizer.encode_response(example.prompt, m if m.keys() - {"role", "content"} else m["content"], **tools)
            for m in example.responses
        ]
    except (DataError, LeftOut) as error:
        return _bad(error, example.where)
    ids = (array("i", response) for response in responses)
    return Group(array("i", prompt), tuple(ids), example.scores, example.labels, example.where)


def _bad(error: DataError | LeftOut, where: str) -> BadRow:
    if isinstance(error, DataError):
        return BadRow.of(error, where)
    bad = BadRow(where, str(error), error.reason)
    bad.__cause__ = error  # if most rows are like this, it is the error
    return bad


def _code() -> str:
    """Returns a digest of the code that turns rows into groups."""
    total = blake2b(digest_size=8)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        total.update(file.read_bytes())
    return total.hexdigest()


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else list(value)
