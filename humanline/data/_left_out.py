"""Finds what a chat template leaves out of a chat, so that no model is trained without it unnoticed.

A template is a program, so only its text can tell. What stands in that text word for word is there. For the rest there
is another rendering: where a template leaves something out, something else in its place makes no difference.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import nodes

from humanline.errors import ConfigError, DataError

Message = Mapping[str, Any]

NAMES_OF_THOUGHT = ("reasoning_content", "thinking", "reasoning")
"""The fields that ``transformers`` treats as one: the first that a message has counts."""
THOUGHTS = (
    *(*NAMES_OF_THOUGHT, "thoughts", "thought", "analysis"),
    *("thinking_blocks", "reasoning_details", "tool_plan"),
)
SOURCES = (
    *("context", "documents", "attachments", "functions", "citations"),
    *("tools", "tool_results", "tool_responses", "refusal"),
)
"""Fields of a message that change what the model sees, if the template reads them."""

_ALTERED = re.compile(r"[<\[◁][^<>\[\]◁▷\s]*think[^<>\[\]◁▷\s]*[>\]▷]|/(?:no_?)?think|/system_override", re.IGNORECASE)
"""Tags of thoughts, around which templates change the white space, and words that switch thoughts."""
_OTHER = "Humanline"


class LeftOut(ConfigError):
    """A chat template leaves out a part of a chat. It is the fault of the setting if it does so to most chats of a
    source, else of those chats.

    Args:
        file (Path): the template's file.
        what (str): what it leaves out.
        reason (str): the same in words that do not depend on the chat.
    """

    def __init__(self, file: Path, what: str, reason: str) -> None:
        super().__init__(
            f"tokenizer.chat_template: {file} leaves out {what}, so the model would not see it; set "
            "tokenizer.chat_template to a Jinja file that writes it, or remove it from the data"
        )
        self.reason = f"the chat template leaves out {reason}"


@dataclass(frozen=True)
class Rendered:
    """A chat, and a template's text for it.

    Attributes:
        file (Path): the template's file.
        render (Callable[..., str]): renders messages.
        messages (Sequence[Message]): the chat.
        tools (Any): the tools that the model may call.
        text (str): the text.
        is_prompt (bool): whether it ends where an answer starts.
    """

    file: Path
    render: Callable[..., str]
    messages: Sequence[Message]
    tools: Any
    text: str
    is_prompt: bool

    def with_others(self, others: Mapping[int, Message]) -> str | None:
        """Returns the text with other messages in some places; None if the template rejects them."""
        messages = [others.get(i, message) for i, message in enumerate(self.messages)]
        try:
            return self.render(messages, add_generation_prompt=self.is_prompt, tools=self.tools)
        except DataError:
            return None

    def ignores(self, i: int, other: Message) -> bool:
        """Returns whether another message in place of the i-th makes no difference."""
        return self.with_others({i: other}) == self.text

    def leaves_out(self, what: str, reason: str | None = None) -> LeftOut:
        """Returns the error."""
        return LeftOut(self.file, what, reason or what)


def check_prompt(chat: Rendered, named: Set[str]) -> None:
    """Checks that the text of a prompt has its tools, contents, calls and fields. Thoughts of earlier turns may be left
    out by a template that names their field.

    Args:
        chat (Rendered): the prompt.
        named (Set[str]): from :func:`fields_named`.

    Raises:
        LeftOut: if something is missing.
    """
    if chat.tools and replace(chat, tools=None).with_others({}) == chat.text:
        raise chat.leaves_out("tools")
    if not _has_contents(chat):
        for i, message in enumerate(chat.messages):
            _check_content(chat, i, message)
    for i, message in enumerate(chat.messages):
        if len(message) > 2:
            _check_calls(chat, i, "")
            for field in _fields(chat, message):
                names = NAMES_OF_THOUGHT if field in NAMES_OF_THOUGHT else (field,)
                may_leave_out = field in THOUGHTS and not named.isdisjoint(names)
                if not may_leave_out and chat.ignores(i, _without(message, field)):
                    raise chat.leaves_out(f"'{field}'")


def check_response(chat: Rendered, written: str) -> None:
    """Checks that the text of a response has its content, calls and fields.

    Args:
        chat (Rendered): the prompt and the response.
        written (str): the response's text, and what the prompt writes of it.

    Raises:
        LeftOut: if something is missing.
    """
    last, message = len(chat.messages) - 1, chat.messages[-1]
    content = message.get("content") or ""
    if content not in written:
        tags = (repr(tag) for tag in _ALTERED.findall(content) if tag not in written)
        if lost := _lost(content, written) or next(tags, ""):
            raise chat.leaves_out(f"the response's {lost}", "a part of the response")
    if len(message) > 2:
        _check_calls(chat, last, " of the response")
        for field in _fields(chat, message):
            value = message[field]
            if chat.ignores(last, _without(message, field)) or (isinstance(value, str) and _lost(value, written)):
                raise chat.leaves_out(f"'{field}' of the response")


def fields_named(template: nodes.Template) -> Set[str]:
    """Returns the names that a template reads of its messages, and the other names and strings in such places."""
    names = {attribute.attr for attribute in template.find_all(nodes.Getattr)}
    return names | {constant.value for constant in template.find_all(nodes.Const) if isinstance(constant.value, str)}


# ---- Contents


def _has_contents(chat: Rendered) -> bool:
    """Returns whether the contents stand in the text, one after the other. This is fast, and true of most chats."""
    at = 0
    for message in chat.messages:
        content = message.get("content")
        if isinstance(content, str):
            for form in _forms(message["role"], content):
                if (found := chat.text.find(form, at)) >= 0:
                    at = found + len(form)
                    break
            else:
                return False
    return True


def _forms(role: str, content: str) -> Iterator[str]:
    """Yields how a template may write a content: as it is, without a thought, or as JSON."""
    yield content.strip()
    if role == "assistant":
        yield _said(role, content)
    yield json.dumps(content.strip(), ensure_ascii=False)[1:-1]


def _said(role: str, content: str) -> str:
    """Returns a content without the assistant's thought, which templates leave out of earlier turns."""
    return _ALTERED.split(content)[-1].strip() if role == "assistant" else content.strip()


def _check_content(chat: Rendered, i: int, message: Message) -> None:
    role, content = message["role"], message.get("content")
    if not isinstance(content, str) or not (said := _said(role, content)):
        return
    if chat.ignores(i, {**message, "content": _OTHER}):
        beside = " beside its calls" if message.get("tool_calls") else ""
        raise chat.leaves_out(f"the message of the {role}{beside}")
    if any(form in chat.text for form in _forms(role, content)) or not any(word in chat.text for word in said.split()):
        return  # a message of which no word is there is a switch, which the template has obeyed
    if lost := _lost(said, chat.text):
        raise chat.leaves_out(f"{lost} in the message of the {role}", f"a part of a message of the {role}")


def _lost(content: str, text: str) -> str:
    """Returns the start of what a text lacks of a content, quoted, or whose white space it changes; empty if nothing.

    White space may differ around a content and around its thoughts.
    """
    at = 0
    for part in map(str.strip, _ALTERED.split(content)):
        if (found := text.find(part, at)) < 0:
            here = "".join(text[at:].split())
            line = next((line for line in part.splitlines() if "".join(line.split()) not in here), None)
            shown = " ".join((part if line is None else line).split())[:60]
            return f"white space in {shown!r}" if line is None else repr(shown)
        at = found + len(part)
    return ""


# ---- Fields


def _check_calls(chat: Rendered, i: int, where: str) -> None:
    """Checks that a message's calls are written: other arguments would be."""
    message = chat.messages[i]
    calls = message.get("tool_calls")
    if not calls:
        return
    calls = calls if isinstance(calls, list) else [calls]
    others = {j: _other_call(call, f"{_OTHER}_{j}_") for j, call in enumerate(calls)}
    text = chat.with_others({i: {**message, "tool_calls": list(others.values())}}) or ""
    lost = [
        j
        for j, other in others.items()
        if f"{_OTHER}_{j}_" not in text
        and chat.ignores(i, {**message, "tool_calls": [*calls[:j], other, *calls[j + 1 :]]})
    ]
    if lost:
        which = f"number {lost[0] + 1} of " if len(lost) < len(calls) else ""
        raise chat.leaves_out(f"{which}'tool_calls'{where}", f"'tool_calls'{where}")


def _other_call(call: Any, mark: str) -> Any:
    """Returns a call with other arguments; one without arguments gets another name."""
    if not isinstance(call, Mapping):
        return mark
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _other_call(call["function"], mark)}
    arguments = call.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        return {**call, "arguments": json.dumps({mark: mark})}
    return {**call, "arguments": {mark: mark}} if arguments else {**call, "name": mark}


def _fields(chat: Rendered, message: Message) -> Iterator[str]:
    """Yields the fields of a message that change what the model sees, and that only they have."""
    for field in (*THOUGHTS, *SOURCES):
        if (value := message.get(field)) and not (field == "tools" and value == chat.tools):
            said = [message.get(name) or "" for name in ("content", *NAMES_OF_THOUGHT)]
            texts = list(_texts(value)) if isinstance(value, list) else []
            if not texts or not all(any(text.strip() in each for each in said) for text in texts):
                yield field


def _texts(value: Any) -> Iterator[str]:
    """Yields the texts in the blocks that APIs return thoughts in."""
    for block in value if isinstance(value, list) else []:
        if isinstance(block, Mapping):
            yield from (block[name] for name in ("text", "thinking", "summary") if isinstance(block.get(name), str))


def _without(message: Message, field: str) -> Message:
    """Returns a message without a field, and without the same thought under another name."""
    names = NAMES_OF_THOUGHT if field in NAMES_OF_THOUGHT else ()
    kept = {
        name: value
        for name, value in message.items()
        if name != field and not (name in names and value == message[field])
    }
    return kept | {"content": message.get("content") or ""}
