"""One example of a source, with typed access to its fields.

All errors about an example come from ``Record.error``, so they name the file, the line and the user's column. A path is
a field's name with the way to a value inside it, such as "chosen[1].content".
"""

import dataclasses
import json
import math
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as short_repr
from typing import Any

from humanline.data._messages import Message, has_turns_within, is_printed_texts, messages_from
from humanline.errors import DataError

__all__ = ["SYSTEM", "BadRow", "Message", "Record", "WrongFormat"]

SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
"""Fields that hold a system message; the first with text counts."""

_INT_LIMIT = 2 ** (8 * array("i").itemsize - 1)
_LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
_TRAINED = ("weight", "train", "training", "loss", "trainable")
"""Fields of a message that say whether it is learnt from."""
_NEXT = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
}
"""The roles that can follow a role; None is the start."""


class BadRow(DataError):
    """A row cannot be used; those around it can.

    Args:
        where (str): the row's place.
        problem (str): what is wrong, and what to do.
        reason (str): what is wrong, in words that are the same for all rows with this fault.
        is_fault (bool): False if the row is sound but teaches nothing, such as a tie.
    """

    def __init__(self, where: str, problem: str, reason: str, is_fault: bool = True) -> None:
        super().__init__(f"{where}: {problem}")
        self.where, self.problem, self.reason, self.is_fault = where, problem, reason, is_fault

    @classmethod
    def of(cls, error: DataError, where: str | None = None) -> "BadRow":
        """Returns the error about a row as one that counts; without ``where``, its message starts with the place."""
        if isinstance(error, BadRow):
            return error
        place, _, problem = (where, "", str(error)) if where else str(error).partition(": ")
        return cls(place, problem, re.split("[;(]", re.sub(r"\d[\d,]*", "N", problem), maxsplit=1)[0].strip())


class WrongFormat(DataError):
    """A row shows that its whole source cannot be used."""


@dataclass(frozen=True, slots=True)
class Record:
    """A row of a source.

    Attributes:
        where (str): the place in the source, for messages, such as "pairs.jsonl line 7".
        row (Mapping[str, Any]): the row's columns.
        column_map (Mapping[str, str | None]): maps a field to its column, if their names differ; None means that the
            field has no column.
        remarks (list[str]): what is said of the row, although it can be used.
    """

    where: str
    row: Mapping[str, Any]
    column_map: Mapping[str, str | None]
    remarks: list[str] = dataclasses.field(default_factory=list)

    def error(self, path: str, problem: str, reason: str | None = None) -> BadRow:
        """Returns an error about the value at ``path``; ``reason`` are words for all rows with this fault."""
        field = re.split(r"[.[]", path, maxsplit=1)[0]
        column = self.column_map.get(field) or field
        reason = re.split("[,;(]", problem, maxsplit=1)[0].strip() if reason is None else reason
        return BadRow(self.where, f"field '{column}{path[len(field) :]}' {problem}", f"'{column}' {reason}")

    def tie(self, problem: str) -> BadRow:
        """Returns an error about a row that prefers no response."""
        return BadRow(self.where, f"{problem}; it is left out", problem, is_fault=False)

    def get(self, field: str) -> Any | None:
        """Returns the field's value; None if it is missing or null, since tables do not distinguish the two."""
        column = self.column_map.get(field, field)
        return None if column is None else self.row.get(column)

    def require(self, field: str, kind: type | tuple[type, ...], expected: str) -> Any:
        """Returns the field's value, which must exist and be of ``kind``; ``expected`` describes the kind in words."""
        value = self.get(field)
        if value is None:
            found = ", ".join(map(str, self.row)) or "nothing"
            raise self.error(field, f"is missing (found: {found}); add it, or map its column in column_map")
        if not isinstance(value, kind):
            raise self._type_error(field, value, expected)
        return value

    # ---- Conversations

    def prompt(self, field: str = "prompt", answered: bool = False) -> list[Message]:
        """Returns a prompt, text or messages, as messages that end with the user's.

        Args:
            field (str): the prompt's field.
            answered (bool): leaves out an answer at the end of the messages.
        """
        value = self.require(field, (str, list, dict), "a string or a list of messages")
        messages = messages_from(field, value, self.error)
        if messages is None:
            if is_printed_texts(value):
                self.remarks.append(f"'{field}' is a printed list of texts, and taken as it is")
            return [{"role": "user", "content": self._text(field, value)}]
        if answered and len(messages) > 1 and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return self._prompt_messages(field, self._filled_list(field, messages))

    def turn(self, field: str) -> tuple[list[Message] | None, Message]:
        """Parses a response: a text, an assistant's message, or the last message of a whole conversation.

        Returns:
            The messages before the response (None if the field holds only the response), and the assistant's message.
        """
        value = self.require(field, (str, list, dict), "a string or a list of messages")
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            (value,) = value
        messages = messages_from(field, value, self.error)
        if messages is None:
            return None, {"role": "assistant", "content": self._text(field, value)}
        if isinstance(value, str) and value.lstrip().startswith("{") and len(messages) > 1:
            raise self.error(field, "is a printed conversation; store it as messages, or drop the line")
        *before, response = self._filled_list(field, messages)
        path = f"{field}[{len(before)}]"
        if response["role"] != "assistant":
            raise self.error(f"{path}.role", f"must be 'assistant' in the last message, got '{response['role']}'")
        if "tool_calls" not in response:
            self._filled(f"{path}.content", response["content"])
        self._check_learnt(path, response)
        if not before:
            return None, response
        if before[0]["role"] == "assistant":
            raise self.error(field, "starts with the assistant; provide the whole conversation, or only the response")
        return self._prompt_messages(field, before), response

    def system(self) -> str | None:
        """Returns the system message that stands in a column of its own; None if there is none."""
        found = None
        for field in SYSTEM:
            if (value := self.get(field)) is not None:
                if not isinstance(value, str):
                    raise self._type_error(field, value, "a string")
                if value.strip() and found not in (None, value):
                    raise self.error(field, "differs from another column with a system message; keep one of them")
                found = self._encodable(field, value) if value.strip() else found
        return found

    def tools(self) -> list[Any] | None:
        """Returns the tools that the model may call, a list or its JSON; None if there are none."""
        value = self.get("tools")
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if not (value := self._from_json("tools", value)):
            return None
        tools = [self._from_json("tools", tool) for tool in (value if isinstance(value, list) else [value])]
        for tool in tools:
            named = tool.get("function", tool) if isinstance(tool, Mapping) else None
            if not isinstance(named, Mapping) or not isinstance(named.get("name", named.get("type")), str):
                raise self.error(
                    "tools",
                    f"must be objects with the tool's name, got {short_repr(tool)}; correct it, or leave it out",
                )
        return tools

    def _from_json(self, path: str, value: Any) -> Any:
        """Returns what a string holds as JSON, also JSON within JSON; other values as they are."""
        try:
            while isinstance(value, str):
                value = json.loads(value)
        except ValueError:
            raise self.error(path, f"must be JSON, got {short_repr(value)}; correct it") from None
        return value

    # ---- Lists with an entry for each response

    def answers(self, field: str) -> list[Message]:
        """Returns a list of at least one response; its text may be empty, since a model may end its turn at once."""
        answers = []
        for i, answer in enumerate(self._filled_list(field, self._list(field, "a list of strings"))):
            path = f"{field}[{i}]"
            if isinstance(answer, str):
                self._remark_turns(field, answer)
                answers.append({"role": "assistant", "content": self._encodable(path, answer)})
                continue
            if not isinstance(answer, list | dict):
                raise self._type_error(path, answer, "a string")
            messages = messages_from(path, answer, self.error) or []
            if [message["role"] for message in messages] != ["assistant"]:
                raise self.error(path, "must be a text, or one message of the assistant")
            self._check_learnt(path, messages[0])
            answers += messages
        return answers

    def scores(self, field: str, count: int) -> tuple[float, ...]:
        """Returns ``count`` finite numbers."""
        value = self._one_each(field, self._list(field, "a list of numbers"), count)
        for i, score in enumerate(value):
            if isinstance(score, bool) or not isinstance(score, int | float):
                raise self._type_error(f"{field}[{i}]", score, "a number")
            if not _is_finite(score):
                raise self.error(
                    f"{field}[{i}]", f"must be a finite number, got {short_repr(score)}; correct it or drop the line"
                )
        return tuple(map(float, value))

    def labels(self, field: str, count: int) -> tuple[bool, ...]:
        """Returns ``count`` booleans; see :meth:`label`."""
        value = self._one_each(field, self._list(field, "a list of true or false"), count)
        return tuple(self._label(f"{field}[{i}]", label) for i, label in enumerate(value))

    # ---- Single values

    def label(self, field: str) -> bool:
        """Returns a boolean, given as true or false, 1 or 0, or the text of either."""
        return self._label(field, self.require(field, object, "true or false"))

    def number(self, field: str) -> float:
        """Returns a finite number, given as a number or its text."""
        value = self.require(field, object, "a number")
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            raise self._type_error(field, value, "a number") from None
        if not math.isfinite(number):
            raise self.error(field, f"must be a finite number, got {value}; correct it or drop the line")
        return number

    # ---- Token ids

    def ids(self, field: str, vocab_size: int | None) -> array:
        """Returns at least one token id, each below ``vocab_size`` (None: any that fits a C int)."""
        return self._token_ids(field, self.require(field, list, "a list of token ids"), vocab_size)

    def id_lists(self, field: str, vocab_size: int | None) -> tuple[array, ...]:
        """Returns at least one list of token ids, each as from :meth:`ids`."""
        value = self._filled_list(field, self.require(field, list, "a list of lists of token ids"))
        return tuple(self._token_ids(f"{field}[{i}]", ids, vocab_size) for i, ids in enumerate(value))

    # ---- Checks

    def _type_error(self, path: str, value: Any, expected: str) -> BadRow:
        return self.error(path, f"must be {expected}, got {short_repr(value)} ({type(value).__name__})")

    def _list(self, field: str, expected: str) -> list:
        value = self.require(field, (list, str), expected)
        if isinstance(value, str):  # tables such as .csv hold lists as JSON
            try:
                value = json.loads(value)
            except ValueError:
                raise self._type_error(field, value, expected) from None
        if not isinstance(value, list):
            raise self._type_error(field, value, expected)
        return value

    def _filled_list(self, path: str, value: list) -> list:
        if not value:
            raise self.error(path, "is empty; fill it or drop the line")
        return value

    def _one_each(self, path: str, value: list, count: int) -> list:
        if len(value) != count:
            raise self.error(path, f"has {len(value)} entries for {count} responses; provide one per response")
        return value

    def _label(self, path: str, value: Any) -> bool:
        if not isinstance(value, list | dict) and (label := _LABELS.get(str(value).strip().lower())) is not None:
            return label
        raise self._type_error(path, value, "true or false")

    def _text(self, field: str, text: str) -> str:
        self._remark_turns(field, text)
        return self._filled(field, text)

    def _remark_turns(self, field: str, text: str) -> None:
        if has_turns_within(text):
            self.remarks.append(
                f"'{field}' has turns of a transcript ('Human:', 'Assistant:'), and is taken as one text"
            )

    def _check_learnt(self, path: str, response: Message) -> None:
        for key in _TRAINED:
            given = str(response.pop(key, True)).lower()
            if given in ("false", "0", "0.0", "no"):
                raise self.error(f"{path}.{key}", f"is {given}: the response is not to be learnt from; drop the line")
            if key == "weight" and given not in ("true", "1", "1.0"):
                raise self.error(f"{path}.{key}", f"is {given}, and all responses weigh 1 here; drop the line")

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

    def _prompt_messages(self, path: str, messages: Sequence[Message]) -> list[Message]:
        before = None
        for i, message in enumerate(messages):
            self._encodable(f"{path}[{i}].content", message.get("content", ""))
            if message["role"] == "user" or (message["role"] == "assistant" and message.keys() == {"role", "content"}):
                self._filled(f"{path}[{i}].content", message.get("content", ""))
            if message["role"] not in _NEXT[before]:
                after = f"after '{before}'" if before else "first"
                raise self.error(
                    f"{path}[{i}].role", f"is out of order ('{message['role']}' comes {after}); drop the line"
                )
            before = message["role"]
        last, path = messages[-1], f"{path}[{len(messages) - 1}]"
        if last["role"] not in ("user", "tool"):
            raise self.error(f"{path}.role", f"must be 'user' in the prompt's last message, got '{last['role']}'")
        return list(messages)

    def _token_ids(self, path: str, value: Any, vocab_size: int | None) -> array:
        if not isinstance(value, list):
            raise self._type_error(path, value, "a list of token ids")
        limit = vocab_size or _INT_LIMIT
        for i, token in enumerate(self._filled_list(path, value)):
            if isinstance(token, bool) or not isinstance(token, int):
                raise self._type_error(f"{path}[{i}]", token, "a token id")
            if not 0 <= token < limit:
                problem = f"must be a token id from 0 to {limit - 1}, got {token}; encode with this model's tokenizer"
                raise WrongFormat(self.error(f"{path}[{i}]", problem))
        return array("i", value)


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer that no float can hold
        return False
