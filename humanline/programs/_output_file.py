import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from humanline.errors import ConfigError


def check_outputs(outputs: Iterable[str | Path], source: Any) -> None:
    """Checks that no output takes the place of a file that is read.

    Args:
        outputs (Iterable[str | Path]): the files that the program writes.
        source (Any): the config's value for what it reads: a path or a glob, or a list or a mapping of them.

    Raises:
        ConfigError: if an output is one of the source's files.
    """
    read = {Path(file).resolve() for name in _strings(source) for file in glob.glob(os.path.expanduser(name))}
    for path in map(Path, outputs):
        if path.expanduser().resolve() in read:
            raise ConfigError(f"output: {path} would be written over, but it is read here; use another output")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | Sequence):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(inner)


def write_json(output: str | Path, value: Any) -> None:
    """Writes a value as indented JSON. The file gets its name only once it is complete."""
    _write(output, [json.dumps(value, ensure_ascii=False, indent=2) + "\n"])


def write_jsonl(output: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSON Lines. The file gets its name only once it is complete."""
    _write(output, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write(output: str | Path, lines: Iterable[str]) -> None:
    path = Path(output).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    # The file may have JSON's escape of half a character, which UTF-8 cannot encode: it is escaped again.
    with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(lines)
    os.replace(partial, path)
