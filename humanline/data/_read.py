"""Opens sources of rows: local files, and everything that ``datasets`` can load.

Local files have readers of their own, because an error about an example must name the file's line, which ``datasets``
does not keep.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from hashlib import blake2b
from itertools import chain
from os.path import expanduser, realpath
from pathlib import Path
from typing import Any

from humanline.data._column_map import MappedColumns, check_column_map, check_prompt_fields
from humanline.data._files import READERS, TEXT_READERS, Reader, Row, kind_of, without_gaps
from humanline.data._load import batches, file_like, load, parts_of
from humanline.errors import ConfigError

__all__ = ["DataFiles", "RowSource", "SourceName", "open_rows", "take"]

log = logging.getLogger(__name__)

SourceName = str | Sequence[str]
DataFiles = str | Sequence[str] | Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class RowSource:
    """The rows of a source, which are read when they are iterated.

    Attributes:
        name (str): the source, for messages.
        digest (Callable[[], str]): returns a digest of the content.
        read (Callable[[], Iterator[Row]]): returns each row with its place.
        check_columns (Callable[[], None]): once the rows are read, raises an error about a column of ``column_map``
            that none of them has.
    """

    name: str
    digest: Callable[[], str]
    read: Callable[[], Iterator[Row]]
    check_columns: Callable[[], None]


def open_rows(
    source: SourceName,
    *,
    split: str = "train",
    name: str | None = None,
    data_files: DataFiles | None = None,
    revision: str | None = None,
    streaming: bool = False,
    column_map: Mapping[str, str | None] | None = None,
    key: str = "source",
    for_prompts: bool = False,
) -> RowSource:
    """Opens a source.

    Args:
        source (SourceName): a file (.json, .jsonl, .csv, .tsv, also with .gz; .parquet), a glob, or a list of these; or
            "json", "csv" or "parquet" with the files in ``data_files``; a folder of such files, or one written by
            ``save_to_disk``; or the name of a dataset on the Hugging Face hub.
        split (str): the split, or a slice of it such as "train[:95%]". Local files have one split, "train".
        name (str | None): the dataset's config.
        data_files (DataFiles | None): the files to read, in the forms that ``source`` accepts, or by split; None reads
            ``source`` itself.
        revision (str | None): the hub dataset's commit, tag or branch; None for the newest.
        streaming (bool): refused, since every row is checked before a run.
        column_map (Mapping[str, str | None] | None): maps a field to its column.
        key (str): the config key of ``source``, for messages.
        for_prompts (bool): whether the rows are read as prompts, of which a .txt file has one in each line.

    Raises:
        ConfigError: if the source, config or split does not exist, or a setting does not apply to it.
    """
    if not isinstance(split, str):
        raise ConfigError(f"split: expected the name of a split such as train or train[:95%], got {split!r}")
    if streaming is not False:
        raise ConfigError(
            f"streaming: expected false, got {streaming!r}; all rows are checked before training starts. For a part of "
            "a large dataset, set split, such as train[:100000]"
        )
    check_column_map(column_map)
    column_map = column_map or {}
    if for_prompts:
        check_prompt_fields(column_map)
    readers = READERS | TEXT_READERS if for_prompts else READERS
    mapped = MappedColumns(column_map)
    source, data_files = _plain(source), _plain(data_files)
    files = _local_files(key, source, data_files, readers)
    if files is None:
        return _from_datasets(key, source, split, name, data_files, revision, mapped)
    for setting, value in (("name", name), ("revision", revision)):
        if value is not None:
            raise ConfigError(f"{setting}: expected null for local files, got {value!r}; only datasets have it")
    for file in files if column_map else ():
        if kind_of(file) in TEXT_READERS:
            raise ConfigError(f"column_map: expected null for '{file}', whose lines have no columns, got {column_map}")
    for file, times in Counter(map(realpath, files)).items():
        if times > 1:
            log.warning(f"{key}: file '{file}' is listed {times} times, so each of its rows is read {times} times")
    title = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"

    def read() -> Iterator[Row]:
        rows = chain.from_iterable(readers[kind_of(file)](file) for file in files)
        return take(split, mapped.looked_for(rows))

    def digest() -> str:
        return " ".join(_digest_of(file) for file in files)

    return RowSource(title, digest, read, lambda: mapped.check(title))


def _plain(value: Any) -> Any:
    """Returns a config's list or mapping as Python's own, which ``datasets`` needs."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [*value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def take(split: str, rows: Iterator[Row]) -> Iterator[Row]:
    """Returns the rows of "train", or of slices of it in the notation of ``datasets``."""
    if split == "train":
        return rows
    everything = list(rows)
    parts = parts_of(split, {"train": len(everything)}, "local files")
    return chain.from_iterable(everything[part.from_ : part.to] for part in parts)


def _digest_of(file: str) -> str:
    total = blake2b(digest_size=16)
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            total.update(block)
    return f"{file} {total.hexdigest()}"


def _local_files(key: str, source: Any, data_files: Any, readers: Mapping[str, Reader]) -> list[str] | None:
    """Returns the local files of a source; None if ``datasets`` has to find it."""
    if data_files is not None and (not isinstance(source, str) or _looks_like_files(source, readers)):
        raise ConfigError(
            f"data_files: expected null for {key} {source!r}, got {data_files!r}; data_files names files of a folder, "
            "of a hub dataset, or of json, csv or parquet"
        )
    if isinstance(data_files, Mapping):
        return None
    if data_files is None:
        patterns = [source] if isinstance(source, str) else source
    else:
        key, patterns = "data_files", [data_files] if isinstance(data_files, str) else data_files
    if not isinstance(patterns, Sequence) or not patterns or not all(isinstance(it, str) and it for it in patterns):
        raise ConfigError(f"{key}: expected a file, a glob, a list of these, or a hub dataset, got {patterns!r}")
    if data_files is not None:
        if source not in ("json", "csv", "parquet") or any("://" in pattern for pattern in patterns):
            return None
    elif isinstance(source, str) and not _looks_like_files(source, readers):
        return None
    files = list(chain.from_iterable(_expand(key, pattern) for pattern in patterns))
    for file in files:
        if kind_of(file) not in readers:
            raise ConfigError(f"{key}: '{file}' has an unsupported type; convert it to one of {', '.join(readers)}")
    return files


def _looks_like_files(source: str, readers: Mapping[str, Reader]) -> bool:
    """Whether a source means files, and not a folder, a web address or a hub dataset ("owner/name")."""
    path = Path(expanduser(source))
    if path.is_dir() or "://" in source:
        return False
    return (
        path.is_file()
        or kind_of(source) in readers
        or has_magic(source)
        or path.is_absolute()
        or source.count("/") > 1
        or source.startswith(".")
    )


def _expand(key: str, pattern: str) -> list[str]:
    pattern = expanduser(pattern)
    # A file's name may contain glob characters, so an existing file with that exact name takes precedence.
    matches = [pattern] if Path(pattern).exists() else sorted(glob(pattern, recursive=True))
    files = [match for match in matches if Path(match).is_file()]
    if not files:
        remedy = f"did you mean '{near}'?" if (near := file_like(pattern)) else "correct the path"
        raise ConfigError(f"{key}: file '{pattern}' not found (working directory {Path.cwd()}); {remedy}")
    return files


def _from_datasets(
    key: str,
    source: Any,
    split: str,
    name: str | None,
    data_files: Any,
    revision: str | None,
    mapped: MappedColumns,
) -> RowSource:
    dataset = load(key, source, split, name, data_files, revision)
    title = str(source) if name is None else f"{source}, {name}"

    def read() -> Iterator[Row]:
        count = 0
        for batch in batches(title, dataset):
            columns = list(batch)
            for values in zip(*batch.values(), strict=True):
                count += 1
                yield f"{title} ({split}) row {count}", without_gaps(dict(zip(columns, values, strict=True)))

    def digest() -> str:
        return f"{dataset._fingerprint} {len(dataset)}"

    return RowSource(title, digest, lambda: mapped.looked_for(read()), lambda: mapped.check(title))
