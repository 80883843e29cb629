"""Readers of local files, each row with its place: the file and its line, row or item."""

import csv
import gzip
import json
import sys
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from humanline.data._record import BadRow
from humanline.data._schemas import ANSWER_PARTS, CONTEXT
from humanline.errors import DataError

__all__ = ["READERS", "TEXT_READERS", "Reader", "Row", "first_line", "kind_of", "without_gaps"]

Row = tuple[str, Any]
"""A row's place, for messages, and its content; a :class:`BadRow` if it cannot be read."""
Reader = Callable[[str], Iterator[Row]]
"""Yields the rows of a file."""


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


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message; its type if there is none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextmanager
def _opened(file: str) -> Iterator[BinaryIO]:
    """Opens a file, decompressed."""
    try:
        with cast(BinaryIO, gzip.open(file, "rb")) if file.endswith(".gz") else open(file, "rb") as stream:
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file}: cannot be decompressed ({error}); write the file again") from error


def _refuse_repeated(where: str, columns: Sequence[str]) -> None:
    """Refuses columns of one name, of which a row would keep only the last."""
    for column, count in Counter(columns).items():
        if count > 1 and column:  # a spreadsheet may have columns without name and content
            raise DataError(f"{where}: {count} columns have the name '{column}'; rename or remove all but one")


# ---- JSON


class _RepeatedKey(ValueError):
    """An object has a key twice. Of its values, all but the last would be lost."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise _RepeatedKey(f"an object has the key '{key}' twice; rename or remove one")
    return found


_decode = json.JSONDecoder(object_pairs_hook=_object).decode


def _parsed(content: bytes) -> Any:
    return _decode(content.removeprefix(BOM_UTF8).decode("utf-8", "surrogatepass"))


def _json_rows(file: str) -> Iterator[Row]:
    """Yields rows from a JSON array, from JSON Lines, or from a JSON object that holds nothing but a list of rows.

    The content decides, since .json is used for all of them.
    """
    with _opened(file) as stream:
        filled = (line for line in stream if line.strip())
        first, second = next(filled, b""), next(filled, b"")
        stream.seek(0)
        if first.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
            yield from _array_rows(file, stream)
        elif (document := _document(stream, first, second)) is not None:
            yield from _document_rows(file, document, is_line=not second)
        else:
            stream.seek(0)
            yield from _line_rows(file, stream)


def _document(stream: BinaryIO, first: bytes, second: bytes) -> dict[str, Any] | None:
    """Returns the object that a whole file is, on one line or on many; None if it is none."""
    try:
        found = _parsed(first)
        return found if not second and isinstance(found, dict) else None
    except json.JSONDecodeError as error:
        if error.pos < len(error.doc.rstrip()):  # a fault, and not an object that continues on the next line
            return None
    except (ValueError, RecursionError):
        return None
    try:
        found = _parsed(stream.read())
    except _RepeatedKey as error:
        raise DataError(f"{stream.name}: {error}") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise DataError(f"{stream.name} line 1: {_malformed('objects over several lines each')}") from error
        return None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _document_rows(file: str, document: dict[str, Any], is_line: bool) -> Iterator[Row]:
    """Yields the rows of a file that is one object: those in its only list, or the object itself if it is a line."""
    if document and all(map(_holds_rows, document.values())):
        if len(document) > 1:
            raise DataError(f"{file}: holds the lists {', '.join(document)}; write each list to a file of its own")
        ((key, rows),) = document.items()
        yield from (_checked(f"{file} {key} item {number}", row) for number, row in enumerate(rows, start=1))
    elif _is_by_column(document):
        raise DataError(
            f"{file}: holds the columns {', '.join(document)} instead of rows; write one object per row, "
            "as pandas does with to_json(..., orient='records', lines=True)"
        )
    elif is_line:
        yield _checked(f"{file} line 1", document)
    else:
        problem = f"one object over several lines, with the keys {', '.join(document) or '(none)'}"
        raise DataError(f"{file} line 1: {_malformed(problem)}")


def _holds_rows(value: Any) -> bool:
    """Whether a value is a list of objects that are no messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) and each.keys().isdisjoint(("role", "from")) for each in value)
    )


def _is_by_column(document: dict[str, Any]) -> bool:
    """Whether an object has the rows of a table as lists of equal length, or as objects with the rows' numbers."""
    columns = [*document.values()]
    if columns and all(isinstance(column, dict) and column for column in columns):
        return all(column.keys() == columns[0].keys() for column in columns) and all(map(str.isdigit, columns[0]))
    if not all(isinstance(column, list) for column in columns) or len({*map(len, columns)}) != 1:
        return False
    # Token ids and messages can be one row. A list of a single text is a text.
    return len(columns[0]) > 1 and any(all(isinstance(cell, str) for cell in column) for column in columns)


def _array_rows(file: str, stream: BinaryIO) -> Iterator[Row]:
    try:
        rows = _parsed(stream.read())
    except _RepeatedKey as error:
        raise DataError(f"{file}: {error}") from error
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
            yield _checked(where, _parsed(line))
        except _RepeatedKey as error:
            yield where, BadRow(where, str(error), "a key twice in an object")
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


# ---- Tables and text

_NO_TEXT = (CONTEXT | ANSWER_PARTS) - {"input"}
"""Columns that hold lists and objects. A cell elsewhere is text, such as "[]" as a response about Python."""
_NOTHING = ("[]", "{}", "null")


def _csv_rows(file: str) -> Iterator[Row]:
    """Yields rows of text; an empty cell is null, and so is the JSON of nothing where lists and objects are."""
    csv.field_size_limit(sys.maxsize)
    start = 1
    with _opened(file) as stream:
        lines = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(stream))
        reader = csv.DictReader(lines, delimiter="\t" if kind_of(file).startswith(".tsv") else ",", strict=True)
        try:
            columns = reader.fieldnames or ()
            _refuse_repeated(f"{file} line 1", columns)
            no_text = [column for column in columns if column in _NO_TEXT]
            start = reader.line_num + 1
            for row in reader:
                where = f"{file} line {start}"
                start = reader.line_num + 1
                if None in row or None in row.values():
                    problem = f"expected {len(columns)} cells, as in the first line; correct the quotes"
                    yield where, BadRow(where, problem, "another number of cells than the first line")
                    continue
                for column in no_text:
                    if row[column] in _NOTHING:
                        row[column] = ""
                yield where, {name: cell or None for name, cell in row.items()}
        except csv.Error as error:
            end = reader.reader.line_num
            place = f"lines {start} to {end}" if end > start else f"line {start}"
            raise DataError(
                f"{file} {place}: cannot be read as CSV ({error}); put text with commas, quotes or line breaks into "
                'quotes, and write a quote inside of them as ""'
            ) from error
        except UnicodeDecodeError as error:
            line = reader.reader.line_num + 1
            raise DataError(
                f"{file} line {line}: cannot be read as CSV ({error}); write the file again, as UTF-8"
            ) from error


def _parquet_rows(file: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    def listed(batch: Any) -> list[dict[str, Any]]:
        try:
            return batch.to_pylist()
        except (ValueError, OverflowError) as error:  # no UTF-8, or a time that Python has no value for
            for column, values in zip(batch.schema.names, batch.columns, strict=True):
                try:
                    values.to_pylist()
                except (ValueError, OverflowError):
                    problem = f"column '{column}' cannot be read ({first_line(error)})"
                    raise DataError(f"{file}: {problem}; correct it, or write the file without it") from error
            raise

    try:
        table = parquet.ParquetFile(file)
        _refuse_repeated(file, table.schema_arrow.names)
        rows = chain.from_iterable(map(listed, table.iter_batches(batch_size=1024)))
        for number, row in enumerate(rows, start=1):
            yield f"{file} row {number}", without_gaps(row)
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: cannot be read as parquet ({first_line(error)}); write the file again") from error


def _text_rows(file: str) -> Iterator[Row]:
    """Yields each line of text as a row with the column ``prompt``."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file} line {number}"
            try:
                text = line.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: expected UTF-8 text ({error.reason}); convert the file") from error
            if text:
                yield where, {"prompt": text}


READERS: dict[str, Reader] = {
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
TEXT_READERS: dict[str, Reader] = {".txt": _text_rows}
"""The readers of files that can hold prompts only."""
