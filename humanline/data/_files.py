"""Readers of local files, each row with its place: the file and its line, row or item."""

import csv
import gzip
import json
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from humanline.data._record import BadRow
from humanline.errors import DataError

__all__ = ["READERS", "Row", "kind_of", "without_gaps"]

Row = tuple[str, Any]
"""A row's place, for messages, and its content; a :class:`BadRow` if it cannot be read."""


def kind_of(file: str) -> str:
    """Returns a file's suffix; that of a compressed one has two parts, such as ".jsonl.gz"."""
    path = Path(file)
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def without_gaps(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of a table without the nulls of its nested objects.

    Objects in one column of a table have the same fields, so a field that only one object has is null in all others.
    """
    return {name: _without_gaps(value) if isinstance(value, list | dict) else value for name, value in row.items()}


def _without_gaps(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_gaps(each) if isinstance(each, list | dict) else each for each in value]
    return {
        name: _without_gaps(each) if isinstance(each, list | dict) else each
        for name, each in value.items()
        if each is not None
    }


def _open(file: str) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file, "rb")) if file.endswith(".gz") else open(file, "rb")


def _json_rows(file: str) -> Iterator[Row]:
    """Yields rows from a JSON array or from JSON Lines; the first character decides, since .json is used for both."""
    try:
        with _open(file) as stream:
            first = next((line for line in stream if line.strip()), b"")
            stream.seek(0)
            is_array = first.decode("utf-8-sig", errors="ignore").lstrip().startswith("[")
            yield from _array_rows(file, stream) if is_array else _line_rows(file, stream)
    except (EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{file}: cannot be decompressed ({error}); write the file again") from error


def _array_rows(file: str, stream: BinaryIO) -> Iterator[Row]:
    try:
        rows = json.loads(stream.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{file} line {error.lineno}: {_malformed(_said(error))}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: {_malformed(_said(error))}") from error
    for number, row in enumerate(rows, start=1):
        yield _checked(f"{file} item {number}", row)


def _line_rows(file: str, stream: BinaryIO) -> Iterator[Row]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            yield _checked(where, json.loads(line))
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, too deep, or an integer with many digits
            yield where, BadRow(where, _malformed(_said(error)), "malformed JSON")


def _said(error: Exception) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _malformed(problem: str) -> str:
    return f"malformed JSON ({problem}); expected UTF-8 with one object per line, or one array"


def _checked(where: str, row: Any) -> Row:
    if isinstance(row, dict):
        return where, row
    problem = f"expected an object with named fields, {{...}}, got {type(row).__name__}"
    return where, BadRow(where, problem, "not an object")


def _csv_rows(file: str) -> Iterator[Row]:
    """Yields rows of text; an empty cell is null."""
    csv.field_size_limit(sys.maxsize)
    try:
        with _open(file) as stream:
            lines = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(stream))
            reader = csv.DictReader(lines, delimiter="\t" if ".tsv" in file else ",", strict=True)
            start = 2
            for row in reader:
                where = f"{file} line {start}"
                start = reader.line_num + 1
                if None in row or None in row.values():
                    problem = f"expected {len(reader.fieldnames or ())} cells, as in the first line; correct the quotes"
                    yield where, BadRow(where, problem, "another number of cells than the first line")
                else:
                    yield where, {name: cell or None for name, cell in row.items()}
    except (csv.Error, UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{file}: cannot be read as CSV ({error}); write the file again, as UTF-8") from error


def _parquet_rows(file: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = chain.from_iterable(
            batch.to_pylist() for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024)
        )
        for number, row in enumerate(rows, start=1):
            yield f"{file} row {number}", without_gaps(row)
    except pyarrow.ArrowException as error:
        problem = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{file}: cannot be read as parquet ({problem}); write the file again") from error


READERS: dict[str, Callable[[str], Iterator[Row]]] = {
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".json.gz": _json_rows,
    ".jsonl.gz": _json_rows,
    ".csv": _csv_rows,
    ".csv.gz": _csv_rows,
    ".tsv": _csv_rows,
    ".tsv.gz": _csv_rows,
    ".parquet": _parquet_rows,
}
"""The reader of each type of file."""
