"""Reads rows from local JSON, JSON Lines and parquet files, or through ``datasets.load_dataset``.

Local files are read here and not through ``datasets``, because an error about an example must name the file's line,
which ``datasets`` does not keep.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from glob import glob, has_magic
from itertools import chain
from os.path import expanduser
from pathlib import Path
from typing import Any, BinaryIO

from humanline.data._record import Record
from humanline.errors import ConfigError, DataError

__all__ = ["read_records", "take"]

Row = tuple[str, Any]
"""A row's place, for messages, and its content."""


def read_records(
    source: str | Sequence[str],
    split: str,
    data_files: str | Sequence[str] | None,
    column_map: Mapping[str, str],
) -> tuple[str, Iterator[Record]]:
    """Opens a source of records.

    Args:
        source (str | Sequence[str]): a .json, .jsonl or .parquet file, a glob, or a list of these; or "json" or
            "parquet" with the files in ``data_files``; or a folder or hub dataset for ``datasets.load_dataset``.
        split (str): the split, or a slice of it such as "train[:95%]". Local files have one split, "train".
        data_files (str | Sequence[str] | None): the files to read, in the forms that ``source`` accepts; None reads
            ``source`` itself.
        column_map (Mapping[str, str]): maps a field to its column, if their names differ.

    Returns:
        The source's name, and its records in the order of the source.

    Raises:
        ConfigError: if the source or split does not exist.
        DataError: during iteration, if a line cannot be parsed or is not an object.
    """
    if not isinstance(split, str):
        raise ConfigError(f"split: expected the name of a split such as train or train[:95%], got {split!r}")
    files = _local_files(source, data_files)
    if files is None:
        name, rows = str(source), _load_dataset(source, split, data_files)
    else:
        name = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
        rows = take(split, chain.from_iterable(_READERS[Path(file).suffix](file) for file in files))
    return name, (_record(where, row, column_map) for where, row in rows)


def _record(where: str, row: Any, column_map: Mapping[str, str]) -> Record:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object with named fields, {{...}}, got {type(row).__name__}")
    return Record(where, row, column_map)


def _local_files(source: Any, data_files: Any) -> list[str] | None:
    """Returns the local files of a source; None if ``datasets`` has to find it."""
    if data_files is None:
        key, patterns = "source", [source] if isinstance(source, str) else source
    else:
        key, patterns = "data_files", [data_files] if isinstance(data_files, str) else data_files
    if not isinstance(patterns, Sequence) or not patterns or not all(isinstance(it, str) and it for it in patterns):
        raise ConfigError(f"{key}: expected a file, a glob, a list of these, or a hub dataset, got {patterns!r}")
    if data_files is not None:
        if source not in ("json", "parquet") or any("://" in pattern for pattern in patterns):
            return None
    elif isinstance(source, str) and not _looks_like_files(source):
        return None
    files = list(chain.from_iterable(_expand(key, pattern) for pattern in patterns))
    for file in files:
        if Path(file).suffix not in _READERS:
            raise ConfigError(f"{key}: '{file}' has an unsupported type; convert it to one of {', '.join(_READERS)}")
    return files


def _looks_like_files(source: str) -> bool:
    """Whether a source means files, and not a folder or a hub dataset ("owner/name")."""
    path = Path(expanduser(source))
    if path.is_dir():
        return False
    return (
        path.is_file()
        or path.suffix in _READERS
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
        raise ConfigError(f"{key}: file '{pattern}' not found (working directory {Path.cwd()}); correct the path")
    return files


def take(split: str, rows: Iterator[Row]) -> Iterator[Row]:
    """Returns the rows of "train", or of slices of it in the notation of ``datasets``."""
    if split == "train":
        return rows
    from datasets import ReadInstruction

    everything = list(rows)
    try:
        slices = ReadInstruction.from_spec(split).to_absolute({"train": len(everything)})
    except ValueError as error:
        raise ConfigError(
            f"split: '{split}' does not work for local files ({error}); use train, or a slice such as train[:95%]"
        ) from error
    return chain.from_iterable(everything[piece.from_ : piece.to] for piece in slices)


def _json_rows(file: str) -> Iterator[Row]:
    """Yields rows from a JSON array or from JSON Lines; the first character decides, since .json is used for both."""
    with open(file, "rb") as stream:
        first = next((line for line in stream if line.strip()), b"")
        stream.seek(0)
        is_array = first.decode("utf-8-sig", errors="ignore").lstrip().startswith("[")
        yield from _array_rows(file, stream) if is_array else _line_rows(file, stream)


def _array_rows(file: str, stream: BinaryIO) -> Iterator[Row]:
    for number, row in enumerate(_parse(file, None, stream.read()), start=1):
        yield f"{file} item {number}", row


def _line_rows(file: str, stream: BinaryIO) -> Iterator[Row]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield f"{file} line {number}", _parse(file, number, line)


def _parse(file: str, number: int | None, text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        place, problem = f"{file} line {number or error.lineno}", f"{error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # not UTF-8, nested too deeply, or an integer with too many digits
        place, problem = file if number is None else f"{file} line {number}", str(error)
    raise DataError(f"{place}: malformed JSON ({problem}); expected UTF-8 with one object per line, or one array")


def _parquet_rows(file: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = chain.from_iterable(
            batch.to_pylist() for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024)
        )
        for number, row in enumerate(rows, start=1):
            yield f"{file} row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: cannot be read as parquet ({_first_line(error)}); write the file again") from error


_READERS = {".json": _json_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows}


def _load_dataset(source: Any, split: str, data_files: Any) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(source, split=split, data_files=data_files)
    except Exception as error:  # load_dataset passes on errors of many libraries; each means that there is no data
        raise ConfigError(
            f"source: '{source}' (split '{split}') cannot be loaded ({_first_line(error)}); correct the name, log in "
            "with `hf auth login` if access is restricted, or use local files"
        ) from error
    return ((f"{source} ({split}) row {number}", row) for number, row in enumerate(dataset, start=1))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
