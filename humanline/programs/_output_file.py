import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


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
