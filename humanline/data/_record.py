"""One example of a source, with typed access to its fields.

All errors about an example come from ``Record.error``, so they name the file, the line and the user's column. A path is
a field's name with the way to a value inside it, such as "chosen[1].content".
"""

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as short_repr
from typing import Any

from humanline.errors import DataError

__all__ = ["Message", "Record"]

Message = dict[str, str]
"""One turn of a conversation: {"role": ..., "content": ...}."""

_ROLES = ("system", "user", "assistant")
_INT_LIMIT = 2 ** (8 * array("i").itemsize - 1)


@dataclass(frozen=True, slots=True)
class Record:
    """A row of a source.

    Attributes:
        where (str): the place in the source, for messages, such as "pairs.jsonl line 7".
        row (Mapping[str, Any]): the row's columns.
        column_map (Mapping[str, str]): maps a field to its column, if their names differ.
    """

    where: str
    row: Mapping[str, Any]
    column_map: Mapping[str, str]

    def error(self, path: str, problem: str) -> DataError:
        """Returns an error about the value at ``path``."""
        field, bracket, inside = path.partition("[")
        return DataError(f"{self.where}: field '{self._column(field)}{bracket}{inside}' {problem}")

    def get(self, field: str) -> Any | None:
        """Returns the field's value; None if it is missing or null, since tables do not distinguish the two."""
        return self.row.get(self._column(field))

    def require(self, field: str, kind: type | tuple[type, ...], expected: str) -> Any:
        """Returns the field's value, which must exist and be of ``kind``; ``expected`` describes the kind in words."""
        value = self.get(field)
        if value is None:
            found = ", ".join(self.row) or "nothing"
            raise self.error(field, f"is missing (found: {found}); add it, or map its column in column_map")
        if not isinstance(value, kind):
            raise self._type_error(field, value, expected)
        return value

    def prompt(self) -> list[Message]:
        """Returns the field ``prompt``, a string or messages, as messages that end with the user's."""
        value = self.require("prompt", (str, list), "a string or a list of messages")
        if isinstance(value, str):
            return [{"role": "user", "content": self._filled("prompt", value)}]
        return self._prompt_messages("prompt", self._messages("prompt", value))

    def turn(self, field: str) -> tuple[list[Message] | None, str]:
        """Parses a response: a string, an assistant message, or the last message of a whole conversation.

        Returns:
            The messages before the response (None if the field holds only the response), and the response's text.
        """
        value = self.require(field, (str, list), "a string or a list of messages")
        if isinstance(value, str):
            return None, self._filled(field, value)
        *before, response = self._messages(field, value)
        path = f"{field}[{len(before)}]"
        if response["role"] != "assistant":
            raise self.error(f"{path}.role", f"must be 'assistant' in the last message, got '{response['role']}'")
        text = self._filled(f"{path}.content", response["content"])
        if not before:
            return None, text
        if before[0]["role"] == "assistant":
            raise self.error(field, "starts with the assistant; provide the whole conversation, or only the response")
        return self._prompt_messages(field, before), text

    def texts(self, field: str) -> list[str]:
        """Returns a list of at least one string; a string may be empty, since a model may end its turn at once."""
        value = self._filled_list(field, self.require(field, list, "a list of strings"))
        for i, text in enumerate(value):
            if not isinstance(text, str):
                raise self._type_error(f"{field}[{i}]", text, "a string")
        return value

    def scores(self, field: str, count: int) -> tuple[float, ...]:
        """Returns ``count`` finite numbers."""
        value = self._one_each(field, self.require(field, list, "a list of numbers"), count)
        for i, score in enumerate(value):
            if isinstance(score, bool) or not isinstance(score, int | float):
                raise self._type_error(f"{field}[{i}]", score, "a number")
            if not math.isfinite(score):
                raise self.error(f"{field}[{i}]", f"must be a finite number, got {score}; correct it or drop the line")
        return tuple(map(float, value))

    def labels(self, field: str, count: int) -> tuple[bool, ...]:
        """Returns ``count`` booleans."""
        value = self._one_each(field, self.require(field, list, "a list of true or false"), count)
        for i, label in enumerate(value):
            if not isinstance(label, bool):
                raise self._type_error(f"{field}[{i}]", label, "true or false")
        return tuple(value)

    def ids(self, field: str, vocab_size: int | None) -> array:
        """Returns at least one token id, each below ``vocab_size`` (None: any that fits a C int)."""
        return self._token_ids(field, self.require(field, list, "a list of token ids"), vocab_size)

    def id_lists(self, field: str, vocab_size: int | None) -> tuple[array, ...]:
        """Returns at least one list of token ids, each as from :meth:`ids`."""
        value = self._filled_list(field, self.require(field, list, "a list of lists of token ids"))
        return tuple(self._token_ids(f"{field}[{i}]", ids, vocab_size) for i, ids in enumerate(value))

    def _column(self, field: str) -> str:
        return self.column_map.get(field, field)

    def _type_error(self, path: str, value: Any, expected: str) -> DataError:
        return self.error(path, f"must be {expected}, got {short_repr(value)} ({type(value).__name__})")

    def _filled_list(self, path: str, value: list) -> list:
        if not value:
            raise self.error(path, "is empty; fill it or drop the line")
        return value

    def _one_each(self, path: str, value: list, count: int) -> list:
        if len(value) != count:
            raise self.error(path, f"has {len(value)} entries for {count} responses; provide one per response")
        return value

    def _filled(self, path: str, text: str) -> str:
        if not text.strip():
            raise self.error(path, "is empty; fill it or drop the line")
        return self._encodable(path, text)

    def _encodable(self, path: str, text: str) -> str:
        # JSON can escape half of a surrogate pair, which tokenizers reject without naming the place.
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise self.error(path, f"has half of a character, {half!r}, at position {error.start}; remove it") from None
        return text

    def _messages(self, path: str, value: list) -> list[Message]:
        messages = []
        for i, message in enumerate(self._filled_list(path, value)):
            if not isinstance(message, Mapping):
                raise self._type_error(f"{path}[{i}]", message, "a message with role and content")
            role, content = message.get("role"), message.get("content")
            if role not in _ROLES:
                raise self.error(f"{path}[{i}].role", f"must be one of {', '.join(_ROLES)}, got {short_repr(role)}")
            if not isinstance(content, str):
                raise self._type_error(f"{path}[{i}].content", content, "a string")
            messages.append({"role": role, "content": self._encodable(f"{path}[{i}].content", content)})
        return messages

    def _prompt_messages(self, path: str, messages: list[Message]) -> list[Message]:
        last, path = messages[-1], f"{path}[{len(messages) - 1}]"
        if last["role"] != "user":
            raise self.error(f"{path}.role", f"must be 'user' in the prompt's last message, got '{last['role']}'")
        self._filled(f"{path}.content", last["content"])
        return messages

    def _token_ids(self, path: str, value: Any, vocab_size: int | None) -> array:
        if not isinstance(value, list):
            raise self._type_error(path, value, "a list of token ids")
        limit = vocab_size or _INT_LIMIT
        for i, token in enumerate(self._filled_list(path, value)):
            if isinstance(token, bool) or not isinstance(token, int):
                raise self._type_error(f"{path}[{i}]", token, "a token id")
            if not 0 <= token < limit:
                problem = f"must be a token id from 0 to {limit - 1}, got {token}; encode with this model's tokenizer"
                raise self.error(f"{path}[{i}]", problem)
        return array("i", value)
