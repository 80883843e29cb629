import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchtune.utils import get_logger, log_rank_zero

from humanline.data import Message, Record, read_records, take
from humanline.errors import ConfigError, DataError

log = get_logger("INFO")

__all__ = ["Prompt", "read_prompts"]

_TABLES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a prompt file.

    Attributes:
        where (str): the prompt's file and line, such as "prompts.jsonl line 7".
        messages (list[Message]): the chat to answer; the last message is the user's.
        fields (Mapping[str, Any]): all fields of the prompt's line, with the prompt as the line has it under
            ``prompt``.
    """

    where: str
    messages: list[Message]
    fields: Mapping[str, Any]

    @property
    def has_system_message(self) -> bool:
        """Whether the chat starts with a system message of its own."""
        return self.messages[0]["role"] in ("system", "developer")

    def under(self, system_prompt: str | None) -> "Prompt":
        """Returns the prompt with a system message before the chat, unless the chat has its own."""
        if not system_prompt or self.has_system_message:
            return self
        return replace(self, messages=[{"role": "system", "content": system_prompt}, *self.messages])


def read_prompts(path: str, split: str = "train", column_map: Mapping[str, str] | None = None) -> list[Prompt]:
    """Reads a prompt file.

    Args:
        path (str): a .jsonl, .json (an array) or .parquet file of objects whose ``prompt`` (or ``instruction``, as in
            AlpacaEval) is the user's text, or a list of messages; a .txt file with one prompt per line; or a hub
            dataset ``owner/name``.
        split (str): the split, with an optional slice such as "train[:95%]"; files have one split, "train".
        column_map (Mapping[str, str] | None): the source's column for each field that has another name there, such as
            ``{prompt: problem}``; None renames nothing.

    Returns:
        list[Prompt]: the prompts, in the order of the source.

    Raises:
        ConfigError: if the file does not exist, has an unsupported type, or holds no prompt.
        DataError: if a line is invalid; the message names it.
    """
    file = Path(path).expanduser()
    on_hub = not file.exists() and not file.suffix and len(file.parts) == 2
    if not file.is_file() and not on_hub:
        raise ConfigError(f"prompts: file '{path}' not found (from {Path.cwd()}); correct the path")
    if file.suffix in _TABLES or on_hub:
        _, found = read_records(path if on_hub else str(file), split, None, column_map or {})
        records = list(found)
        _warn_of_hidden(records, column_map or {})
        prompts = [_from_record(record, column_map or {}) for record in records]
    elif file.suffix == ".txt":
        lines = ((prompt.where, prompt) for prompt in _from_lines(file))
        prompts = [prompt for _, prompt in take(split, lines)]
    else:
        raise ConfigError(f"prompts: expected a file of type {', '.join(_TABLES)} or .txt, got '{path}'; convert it")
    if not prompts:
        raise ConfigError(f"prompts: expected at least one prompt, got none in '{path}'; use another file")
    return prompts


def _warn_of_hidden(records: Sequence[Record], column_map: Mapping[str, str]) -> None:
    """Warns of columns that ``column_map`` replaces by another one."""
    for name, column in column_map.items():
        if name != column and any(name in record.row and column in record.row for record in records):
            log_rank_zero(
                log,
                f"column_map: {{{name}: {column}}} hides the source's own column '{name}'; rename one to keep both",
                level=logging.WARNING,
            )


def _from_record(record: Record, column_map: Mapping[str, str]) -> Prompt:
    fields = dict(record.row)
    fields |= {name: fields[column] for name, column in column_map.items() if column in fields}
    if fields.get("prompt") is None and fields.get("instruction") is not None:
        record = Record(record.where, record.row, {"prompt": "instruction"})
        fields["prompt"] = fields["instruction"]
    return Prompt(record.where, record.prompt(), fields)


def _from_lines(file: Path) -> Iterator[Prompt]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file} line {number}: expected UTF-8 text ({error.reason}); convert the file"
                ) from error
            if text:
                yield Prompt(f"{file} line {number}", [{"role": "user", "content": text}], {"prompt": text})
