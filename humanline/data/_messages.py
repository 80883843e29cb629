"""Conversations as people write them, in one form: messages with the roles and fields that chat templates know."""

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping
from reprlib import repr as short_repr
from typing import Any

from humanline.errors import DataError

__all__ = ["Message", "has_turns_within", "is_printed_texts", "messages_from", "text_of"]

Message = dict[str, Any]
"""One turn: role and content, and whatever else the source has for the chat template, such as ``tool_calls``."""

Error = Callable[..., DataError]
"""Makes an error from a path, such as "chosen[1].content", what is wrong there, and this in words for all such rows."""

_NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter", "instruction"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatbot", "ai", "chatgpt", "bard", "bing"),
    "tool": ("tool", "ipython", "function", "observation", "tool_response", "function_response"),
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names}
_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
_LOOKS_PRINTED = re.compile(r"""\s*(?:array\()?[\[(]*\s*(?:\{\s*['"]\w+['"]\s*:|\w+\((?:role|content)=)""")
_TRANSCRIPT = re.compile(r"\s*Human:.*?\nAssistant:", re.DOTALL)
_TURNS_WITHIN = re.compile(r"\n\nHuman:.*?\n\nAssistant:", re.DOTALL)
_PRINTED_ROLE = re.compile(r"""\b(?:role|from)['"]?\s*[:=]\s*['"](\w+)['"]""")
_PRINTED_CONTENT = re.compile(r"""\b(?:content|value)['"]?\s*[:=]""")
_SAID = frozenset(("content", "value", "tool_calls"))
_CONVERSATIONS = ("messages", "conversations", "conversation")
_OTHER_MEDIA = ("image", "images", "audio", "video", "function_call")


def messages_from(path: str, value: Any, error: Error) -> list[Message] | None:
    """Returns the messages that a field holds; None if it is text without turns.

    A field may hold a list of messages, a single message, either printed into a string, or a transcript of Anthropic HH
    ("\\n\\nHuman: ...\\n\\nAssistant: ...") or HelpSteer2 ("...\\n<extra_id_1>Assistant\\n...").

    Args:
        path (str): the field's name.
        value (Any): its content.
        error (Error): makes the error to raise.

    Raises:
        DataError: if a message cannot be used.
    """
    if isinstance(value, str):
        if (turns := _transcript(path, value, error)) is not None:
            return turns
        if (printed := _printed(path, value, error)) is None:
            return None
        value = printed
    if isinstance(value, Mapping):
        return [_message(path, value, error)]
    return [_message(f"{path}[{i}]", message, error) for i, message in enumerate(value)]


def text_of(messages: Iterable[Message]) -> str:
    """Returns the contents of messages, one after the other."""
    return "\n".join(message.get("content") or "" for message in messages)


def _printed(path: str, text: str, error: Error) -> list[Any] | None:
    """Returns the messages that were printed into a string, as JSON or by Python; None if there are none."""
    if not _LOOKS_PRINTED.match(text):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, Mapping):
            inner = next((found[key] for key in _CONVERSATIONS if isinstance(found.get(key), list)), None)
            found = [found] if inner is None else inner
        is_chat = all(isinstance(each, Mapping) and not _SAID.isdisjoint(each) for each in found)
        roles = [each.get("role", each.get("from")) for each in found] if is_chat else []
        return list(found) if any(str(role).strip().lower() in _ROLES for role in roles) else None  # some other JSON
    is_list = text.strip()[:1] in "[(" or text.strip()[-1:] in "])}"
    roles = _PRINTED_ROLE.findall(text) if is_list and _PRINTED_CONTENT.search(text) else []
    if any(role.lower() in _ROLES for role in roles):
        raise error(path, "is a printed list of messages that cannot be read; store the messages as a list")
    return None


def has_turns_within(text: str) -> bool:
    """Returns whether a text has turns as of a transcript, although it does not start with one."""
    return "Human:" in text and _TURNS_WITHIN.search(text) is not None


def is_printed_texts(text: str) -> bool:
    """Returns whether a text is a printed list of texts, as some tables hold the turns of a user."""
    try:
        found = ast.literal_eval(text.strip()) if text.strip()[:1] == "[" and text.strip()[-1:] == "]" else None
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return isinstance(found, list) and found != [] and all(isinstance(each, str) for each in found)


def _transcript(path: str, text: str, error: Error) -> list[Message] | None:
    """Parses a transcript of Anthropic HH or HelpSteer2, without a last turn that has no text: the one to answer."""
    if "Human:" in text and _TRANSCRIPT.match(text := text.replace("\r\n", "\n")):
        if "\n\nAssistant:" not in text:
            raise error(path, "is a transcript whose turns have no empty line between them; store messages")
        _, *parts = _HH_TURN.split(text)
    elif "<extra_id_1>" in text:
        first, *parts = _HELPSTEER_TURN.split(text)
        parts = ["User", first, *parts] if first.strip() else parts
    else:
        return None
    pairs = zip(parts[::2], parts[1::2], strict=True)
    turns = [{"role": _ROLES[name.lower()], "content": said.strip()} for name, said in pairs]
    return turns[:-1] if turns and turns[-1] == {"role": "assistant", "content": ""} else turns


def _message(path: str, value: Any, error: Error) -> Message:
    if not isinstance(value, Mapping):
        ids = "; for token ids use humanline.data.encoded_groups" if isinstance(value, int) else ""
        raise error(path, f"must be a message with role and content, got {_shown(value)}{ids}")
    texts = ("content", "value")
    given = {key: each for key, each in value.items() if each not in (None, [], {}) and (each != "" or key in texts)}
    role, content = given.pop("role", None), given.pop("content", None)
    if role is None:  # ShareGPT
        role, value = given.pop("from", None), given.pop("value", content)
        if content not in (None, value):
            raise error(path, "has both 'content' and 'value', which differ; keep one of them")
        content = value
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise error(
            f"{path}.role",
            f"must be one of {', '.join(_NAMES)}, got {short_repr(role)}",
            f"has the role {short_repr(role)}",
        )
    for key in _OTHER_MEDIA:
        if given.get(key):
            raise error(f"{path}.{key}", "has no place in a text chat template; drop the line")
    if isinstance(content, list):
        content = "".join(_part(f"{path}.content[{i}]", part, error) for i, part in enumerate(content))
    if "tool_calls" in given:
        given["tool_calls"] = _calls(f"{path}.tool_calls", given["tool_calls"], error)
        if content is None:
            return {"role": known, **given}
    if not isinstance(content, str):
        raise error(f"{path}.content", f"must be a string, got {_shown(content)}")
    return {"role": known, "content": content, **given}


def _calls(path: str, calls: Any, error: Error) -> list[Any]:
    """Returns a message's calls, a list of objects or their JSON."""
    try:
        calls = json.loads(calls) if isinstance(calls, str) else calls
        calls = [json.loads(call) if isinstance(call, str) else call for call in calls]
    except (ValueError, TypeError):
        calls = [None]
    if not all(isinstance(call, Mapping) for call in calls):
        raise error(path, "must be a list of objects; correct it")
    return calls


def _part(path: str, part: Any, error: Error) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    got = part.get("type") if isinstance(part, Mapping) else _shown(part)
    raise error(path, f"must be text, got {got}", f"has a part that is no text ({got})")


def _shown(value: Any) -> str:
    return f"{short_repr(value)} ({type(value).__name__})"
