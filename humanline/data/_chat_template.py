"""Chat templates: untrusted programs that turn a chat into text, run in a sandbox as ``transformers`` runs them."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from humanline.errors import ConfigError, DataError

Chat = Sequence[Mapping[str, Any]]
"""Messages, each ``{"role": ..., "content": ...}``."""

# Chats that every template is tested on. It may reject all but the first (Gemma 2 accepts no system message).
PROBE_RESPONSE = "Humanline"
PROBES: tuple[Chat, ...] = (
    [{"role": "user", "content": "Name?"}],
    [{"role": "system", "content": "Answer."}, {"role": "user", "content": "Name?"}],
    [
        {"role": "user", "content": "Greet."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Name?"},
    ],
)


class ChatTemplate:
    """A Jinja chat template whose output can be split where generation starts.

    The text of a prompt followed by the text of its response is the text of the whole chat. The response ends with one
    special token, the end of turn. White space after that token is dropped, since no model generates it.

    Args:
        source (str): the template.
        file (Path): the template's file, for messages.
        named_tokens (Mapping[str, str]): values of ``bos_token`` and the like in the template.
        special_tokens (Sequence[str]): the tokenizer's special tokens; one of them is the end of turn.

    Attributes:
        end_of_turn (str): the token that closes an assistant's turn.

    Raises:
        ConfigError: if ``source`` is not a template, or its output for small chats cannot be split as above.
    """

    def __init__(self, source: str, file: Path, named_tokens: Mapping[str, str], special_tokens: Sequence[str]) -> None:
        self.file = file
        self._named_tokens = named_tokens
        try:
            self._template = environment().from_string(source)
        except jinja2.TemplateError as error:
            raise self.refusal(f"is not valid Jinja ({squeeze(error)})") from error
        self.end_of_turn = self._probe(special_tokens)

    def prompt(self, messages: Chat) -> str:
        """Returns the text of ``messages``, up to where the assistant's answer starts.

        Raises:
            DataError: if the template rejects the chat.
        """
        return self.render(messages, add_generation_prompt=True)

    def response(self, messages: Chat, content: str) -> str:
        """Returns the text of ``content`` as the answer to ``messages``, from its start to the end of turn.

        Raises:
            DataError: if the template rejects the chat, or renders the prompt differently once it is answered.
        """
        prompt, whole = self.prompt(messages), self._answered(messages, content)
        response = whole[len(prompt) :].rstrip()
        if not whole.startswith(prompt) or not response.endswith(self.end_of_turn):
            raise DataError(
                f"messages: {self.file} does not render this chat as its prompt, the response and {self.end_of_turn}; "
                "drop the example, or set tokenizer.chat_template to a template that does"
            )
        return response

    def render(self, messages: Chat, add_generation_prompt: bool = False) -> str:
        """Returns the template's text for ``messages``.

        Raises:
            DataError: if the template rejects the chat.
        """
        try:
            return self._template.render(
                # transformers omits fields that are None, and templates rely on it.
                messages=[{key: value for key, value in message.items() if value is not None} for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._named_tokens,
            )
        except Exception as error:  # a template can fail in any way
            raise DataError(f"messages: {self.file} rejects the chat: {squeeze(error)}") from error

    def refusal(self, what: str) -> ConfigError:
        """Returns the error for an unusable template; ``what`` continues a sentence that starts with its file."""
        return ConfigError(
            f"tokenizer.chat_template: {self.file} {what}; set tokenizer.chat_template to a Jinja file that renders "
            "a chat as its prompt, the response and an end-of-turn token"
        )

    def _answered(self, messages: Chat, content: str) -> str:
        return self.render([*messages, {"role": "assistant", "content": content}])

    def _probe(self, special_tokens: Sequence[str]) -> str:
        """Renders small chats, rejects templates whose output cannot be split, and returns the end of turn."""
        longest_first = sorted(special_tokens, key=len, reverse=True)
        special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        ends = []
        for messages in PROBES:
            try:
                prompt, whole = self.prompt(messages), self._answered(messages, PROBE_RESPONSE)
            except DataError as error:
                if messages is PROBES[0]:
                    raise self.refusal(f"fails on the simplest chat ({squeeze(error.__cause__ or error)})") from error
                continue
            if not whole.startswith(prompt):
                raise self.refusal("renders a prompt differently once it is answered")
            header, content, rest = whole[len(prompt) :].partition(PROBE_RESPONSE)
            if not content:
                raise self.refusal("omits or alters the assistant's content")
            if special.search(header) or (header.strip() and prompt == self.render(messages)):
                raise self.refusal(f"puts {header.strip()!r} before an answer but not into a generation prompt")
            end = special.search(rest)
            if end is None:
                raise self.refusal("ends the assistant's turn without a special token")
            if tail := rest[end.end() :].strip():
                raise self.refusal(f"puts {tail!r} after {end[0]}, the end of turn")
            ends.append(end[0])
        if len(set(ends)) > 1:
            raise self.refusal(f"ends the assistant's turn with {ends[0]} in one chat and another token in another")
        return ends[0]


class GenerationBlock(Extension):
    """The tag ``{% generation %}``, which marks the assistant's text for ``transformers``; here it has no effect."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def environment() -> jinja2.Environment:
    """Returns a sandbox with the settings, filters and functions that chat templates need."""
    extensions = [GenerationBlock, loopcontrols]
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.filters["tojson"] = to_json
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = datetime.now().strftime  # the date is fixed, so no prompt changes at midnight
    return sandbox


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter ``tojson``, without the HTML escapes of Jinja's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    """Lets a template reject a chat."""
    raise jinja2.TemplateError(message)


def squeeze(error: BaseException) -> str:
    """Returns the message of ``error`` in one line."""
    return " ".join(str(error).split()) or type(error).__name__
