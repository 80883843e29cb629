import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torchtune.utils import get_logger, log_rank_zero

from humanline.data import (
    BadRow,
    DataFiles,
    Message,
    Record,
    SourceName,
    Tally,
    open_rows,
    prompt_field,
    read_prompt,
)
from humanline.errors import ConfigError, DataError

log = get_logger("INFO")

__all__ = ["Prompt", "read_prompts"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a prompt file.

    Attributes:
        where (str): the prompt's file and line, such as "prompts.jsonl line 7".
        messages (list[Message]): the chat to answer; the last message is the user's.
        fields (Mapping[str, Any]): all fields of the prompt's line, with the prompt as the line has it under
            ``prompt``.
        tools (list[Any] | None): the tools that the model may call; None without any.
    """

    where: str
    messages: list[Message]
    fields: Mapping[str, Any]
    tools: list[Any] | None = None

    @property
    def has_system_message(self) -> bool:
        """Whether the chat starts with a system message of its own."""
        return self.messages[0]["role"] in ("system", "developer")

    def encoded(self, tokenizer: Any) -> list[int]:
        """Returns the prompt's ids.

        Raises:
            DataError: if the chat template rejects the chat; the message names the line.
            ConfigError: if the chat template leaves out a part of it.
        """
        tools = {} if self.tools is None else {"tools": self.tools}
        try:
            return tokenizer.encode_prompt(self.messages, **tools)
        except DataError as error:
            raise DataError(f"{self.where}: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"{error} (first seen in {self.where})") from error

    def under(self, system_prompt: str | None) -> "Prompt":
        """Returns the prompt with a system message before the chat, unless the chat has its own."""
        if not system_prompt or self.has_system_message:
            return self
        return replace(self, messages=[{"role": "system", "content": system_prompt}, *self.messages])


def read_prompts(
    source: SourceName,
    split: str = "train",
    column_map: Mapping[str, str | None] | None = None,
    *,
    name: str | None = None,
    data_files: DataFiles | None = None,
    revision: str | None = None,
    key: str = "prompts",
) -> list[Prompt]:
    """Reads a prompt file. Rows that cannot be used are left out and counted in a warning.

    Args:
        source (SourceName): a file of objects (.jsonl, .json, .csv, .parquet), a glob, a list, or a dataset, as in
            :func:`humanline.data.preference_groups`. Lines of a .txt file are prompts. The prompt is text or a list of
            messages, in the column ``prompt``, or else ``instruction`` (with ``input``), ``question``,
            ``problem``, ``query``, ``messages``, ``conversations`` or ``conversation``.
        split (str): the split, with an optional slice such as "train[:95%]"; files have one split, "train".
        column_map (Mapping[str, str | None] | None): the source's column for each field that has another name there,
            such as ``{prompt: problem}``; None renames nothing.
        name (str | None): the config of a dataset, such as "main".
        data_files (DataFiles | None): the files of a dataset to read; None reads all.
        revision (str | None): commit, tag or branch of a dataset on the hub; None for the newest.
        key (str): the config key of the source, for messages.

    Returns:
        list[Prompt]: the prompts, in the order of the source.

    Raises:
        ConfigError: if the source does not exist, has an unsupported type, or holds no prompt.
        DataError: if more than a tenth of the rows cannot be used; the message names the first of each reason.
    """
    rows = open_rows(
        source,
        split=split,
        name=name,
        data_files=data_files,
        revision=revision,
        column_map=column_map,
        key=key,
        for_prompts=True,
    )
    prompts = _from_rows(rows, column_map or {})
    if not prompts:
        raise ConfigError(f"{key}: expected at least one prompt, got none in '{source}'; use another file")
    return prompts


def _from_rows(rows: Any, column_map: Mapping[str, str | None]) -> list[Prompt]:
    tally = Tally(rows.name)
    prompts: list[Prompt] = []
    hidden: set[str] = set()
    for where, row in tally.counted(rows.read()):
        try:
            if isinstance(row, BadRow):
                raise row
            field = prompt_field(row, column_map)
            record = Record(where, row, column_map)
            messages, tools = read_prompt(record, field), record.tools()
        except BadRow as error:
            tally.add(error)
            continue
        tally.remark(record)
        renamed = {name: row[column] for name, column in column_map.items() if column in row}
        hidden.update(name for name, column in column_map.items() if name in row and column in row and name != column)
        fields = {**row, **renamed, "prompt": record.get(field)}
        prompts.append(Prompt(where, messages, fields, tools))
    tally.check("drop")
    rows.check_columns()
    for name in sorted(hidden):
        _warn(
            f"column_map: {{{name}: {column_map[name]}}} hides the source's own column '{name}'; rename one to keep "
            "both"
        )
    for note in tally.notes():
        _warn(f"{rows.name}: {note}")
    return prompts


def _warn(message: str) -> None:
    log_rank_zero(log, message, level=logging.WARNING)
