"""Conversations as people write them, in one form: messages with the roles and fields that chat templates know."""

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping
from reprlib import repr as short_repr
from typing import Any

from humanline.errors import DataError

__all__ = ["Message", "messages_from", "text_of"]

Message = dict[str, Any]
"""One turn: role and content, and whatever else the source has for the chat template, such as ``tool_calls``."""

Error = Callable[[str, str], DataError]
"""Makes an error from a path, such as "chosen[1].content", and what is wrong there."""

_NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter", "instruction"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatbot", "ai", "chatgpt", "bard", "bing"),
    "tool": ("tool", "ipython", "function", "observation", "tool_response", "function_response"),
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names}
_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
_PRINTED_LIST = re.compile(r"(?:array\()?\[\s*\{.*\}\s*\](?:, dtype=object\))?", re.DOTALL)
_ROLE_KEY = re.compile(r"""['"](?:role|from)['"]\s*:""")
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
        if (turns := _transcript(value)) is not None:
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
    inside = text.strip()
    is_list = _PRINTED_LIST.fullmatch(inside) is not None
    if not (is_list or (inside.startswith("{") and inside.endswith("}"))) or not _ROLE_KEY.search(inside):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(inside)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, list):
            return found
        if isinstance(found, dict) and str(found.get("role", found.get("from"))).lower() in _ROLES:
            return [found]
    if not is_list:  # some other JSON
        return None
    raise error(path, "is a printed list of messages that cannot be read; store the messages as a list")


def _transcript(text: str) -> list[Message] | None:
    """Parses a transcript of Anthropic HH or HelpSteer2, without a last turn that has no text: the one to answer."""
    if text.lstrip().startswith("Human:") and "\n\nAssistant:" in text:
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
    given = {key: each for key, each in value.items() if each is not None and each != [] and each != {}}
    role, content = given.pop("role", None), given.pop("content", None)
    if role is None:  # ShareGPT
        role, content = given.pop("from", None), given.pop("value", content)
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise error(f"{path}.role", f"must be one of {', '.join(_NAMES)}, got {short_repr(role)}")
    for key in _OTHER_MEDIA:
        if key in given:
            raise error(f"{path}.{key}", "has no place in a text chat template; drop the line")
    if isinstance(content, list):
        content = "".join(_part(f"{path}.content[{i}]", part, error) for i, part in enumerate(content))
    if content is None and "tool_calls" in given:
        return {"role": known, **given}
    if not isinstance(content, str):
        raise error(f"{path}.content", f"must be a string, got {_shown(content)}")
    return {"role": known, "content": content, **given}


def _part(path: str, part: Any, error: Error) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise error(path, f"must be text, got {part.get('type') if isinstance(part, Mapping) else _shown(part)}")


def _shown(value: Any) -> str:
    return f"{short_repr(value)} ({type(value).__name__})"
