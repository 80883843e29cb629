"""Chat templates: untrusted programs that turn a chat into text, run in a sandbox as ``transformers`` runs them."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from humanline.data._left_out import NAMES_OF_THOUGHT, Rendered, check_prompt, check_response, fields_named
from humanline.errors import ConfigError, DataError

Chat = Sequence[Mapping[str, Any]]
"""Messages, each ``{"role": ..., "content": ...}``, with other fields that the template may read."""

PROBE: Chat = [{"role": "user", "content": "Name?"}]
"""The chat that every template must accept. Others it may reject: Gemma 2's accepts no system message."""
PLAIN = "Humanline"
THOUGHTFUL = f"<think>\nA person.\n</think>\n\n{PLAIN}"
"""Answers to it. Templates of models that think may have a place for thoughts in a generation prompt."""

_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


class ChatTemplate:
    """A Jinja chat template whose output can be split where generation starts.

    The text of a prompt followed by the text of its response is the text of the whole chat. The response ends with one
    special token, the end of turn. What the template writes after that token (white space, or the end of the sequence)
    is dropped, since no model generates it.

    Args:
        source (str): the template.
        file (Path): the template's file, for messages.
        variables (Mapping[str, Any]): further variables of the template: ``bos_token`` and the like, and those that the
            user sets.
        special_tokens (Sequence[str]): the tokenizer's special tokens; one of them is the end of turn.
        strftime_now (Callable[[str], str]): formats the date of the run.
        tools (Any): what a template for chats with tools is tried with, and renders where a chat has none.

    Attributes:
        end_of_turn (str): the token that closes an assistant's turn.
        source (str): the template.
        variables (Mapping[str, Any]): its variables.
        reads_date (bool): whether the template reads the date of the run. Llama 3.2's does not where ``date_string`` is
            set.
        markers (tuple[str, ...]): strings that the template writes around messages, and people do not.
        sample (str): an answer to ``PROBE`` that can be split: ``PLAIN``, or ``THOUGHTFUL`` if only thoughts fit.

    Raises:
        ConfigError: if ``source`` is not a template, or its output for the simplest chat cannot be split as above.
    """

    def __init__(
        self,
        source: str,
        file: Path,
        variables: Mapping[str, Any],
        special_tokens: Sequence[str],
        strftime_now: Callable[[str], str],
        tools: Any = None,
    ) -> None:
        self.file = file
        self._tools = tools
        self.source = source
        self.variables = {"documents": None, **variables}
        asked: set[str] = set()

        def today(form: str) -> str:
            asked.add(form)
            return strftime_now(form)

        environment = template_environment(today)
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except jinja2.TemplateError as error:
            raise self.refusal(f"is not valid Jinja ({squeeze(error)})") from error
        self._fields, self._reads = fields_named(tree), meta.find_undeclared_variables(tree)
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.sample, self.end_of_turn, self._tail = self._probe()
        self.markers = self._markers()
        reads = any(name.name == "strftime_now" for name in tree.find_all(nodes.Name))
        self.reads_date = reads and (bool(asked) or "date_string" not in variables)

    def check_reads(self, names: Iterable[str]) -> None:
        """
        Raises:
            ConfigError: if the template reads no variable of such a name.
        """
        for name in names:
            if name not in self._reads:
                near = get_close_matches(name, self._reads, n=1)
                remedy = f"did you mean {near[0]}? Correct it or remove it" if near else "remove it"
                raise ConfigError(f"tokenizer.chat_template_kwargs: {self.file} does not read '{name}'; {remedy}")

    def render(self, messages: Chat, *, add_generation_prompt: bool = False, tools: Any = None) -> str:
        """Returns the template's text for ``messages``.

        Raises:
            DataError: if the template rejects the chat.
        """
        try:
            return self._template.render(
                messages=[
                    _as_transformers(message) if len(message) > 2 or None in message.values() else message
                    for message in messages
                ],
                add_generation_prompt=add_generation_prompt,
                tools=self._tools if tools is None else tools,
                **self.variables,
            )
        except Exception as error:  # a template can fail in any way
            raise DataError(f"messages: {self.file} rejects the chat: {squeeze(error)}") from error

    def split(self, messages: Chat, responses: Sequence[str | Mapping[str, Any]], tools: Any = None) -> list[str]:
        """Returns the text of a prompt, up to where the answer starts, and of each response, to its end of turn.

        Args:
            messages (Chat): the prompt.
            responses (Sequence[str | Mapping[str, Any]]): answers to it: texts, or messages of the assistant.
            tools (Any): the tools that the model may call.

        Raises:
            DataError: if the template rejects the chat, or renders the prompt differently once it is answered.
            LeftOut: if the template leaves out a part of the chat.
        """
        prompt = self.render(messages, add_generation_prompt=True, tools=tools)
        check_prompt(Rendered(self.file, self.render, messages, tools, prompt, is_prompt=True), self._fields)
        return [prompt, *(self._response(messages, prompt, response, tools) for response in responses)]

    def refusal(self, what: str) -> ConfigError:
        """Returns the error for an unusable template; ``what`` continues a sentence that starts with its file."""
        return ConfigError(
            f"tokenizer.chat_template: {self.file} {what}; set tokenizer.chat_template to a Jinja file that renders "
            f"a chat as its prompt, the response and an end-of-turn token{self._or_kwargs()}"
        )

    def _or_kwargs(self) -> str:
        reads = "enable_thinking" in self.source
        return " or tokenizer.chat_template_kwargs (the template reads enable_thinking)" if reads else ""

    def _response(self, messages: Chat, prompt: str, response: str | Mapping[str, Any], tools: Any) -> str:
        message = {"role": "assistant", "content": response} if isinstance(response, str) else response
        whole = self.render([*messages, message], tools=tools)
        text = whole[len(prompt) :].rstrip().removesuffix(self._tail).rstrip()
        if not whole.startswith(prompt) or not text.endswith(self.end_of_turn):
            raise DataError(
                f"messages: {self.file} does not render this chat as its prompt, the response and {self.end_of_turn}; "
                f"drop the example, or set tokenizer.chat_template{self._or_kwargs()}"
            )
        if len(message) > 2 or (message.get("content") or "") not in text:
            chat = Rendered(self.file, self.render, [*messages, message], tools, whole, is_prompt=False)
            check_response(chat, self._opening(prompt) + text)
        return text

    def _opening(self, prompt: str) -> str:
        """Returns what a prompt has after its last special token; it may open the answer's thought."""
        return prompt[max((found.end() for found in self._special.finditer(prompt)), default=0) :]

    def _probe(self) -> tuple[str, str, str]:
        """Returns the sample, the end of turn and what follows it; rejects templates whose output cannot be split."""
        try:
            prompt = self.render(PROBE, add_generation_prompt=True)
            for sample in (PLAIN, THOUGHTFUL):
                whole = self.render([*PROBE, {"role": "assistant", "content": sample}])
                if whole.startswith(prompt):
                    break
            else:
                forgets = "<think>" in self._opening(prompt) and "A person." not in whole
                thought = "opens a thought, and leaves out of an answer what stands before </think>"
                raise self.refusal(thought if forgets else "renders a prompt differently once it is answered")
        except DataError as error:
            raise self.refusal(f"fails on the simplest chat ({squeeze(error.__cause__ or error)})") from error
        header, content, rest = whole[len(prompt) :].partition(PLAIN)
        if not content:
            raise self.refusal("omits or alters the assistant's content")
        if self._special.search(header) or (header.strip() and prompt == self.render(PROBE)):
            raise self.refusal(f"puts {header.strip()!r} before an answer but not into a generation prompt")
        end = self._special.search(rest)
        if end is None:
            written = f" ({rest.strip()!r} is none in tokenizer.json)" if rest.strip() else ""
            raise self.refusal(f"ends the assistant's turn without a special token{written}")
        if prompt.rstrip().endswith(end[0]) and not self._ends_turns(sample, end[0]):
            raise self.refusal(f"puts {end[0]} after every chat, so that no token ends an answer")
        tail = rest[end.end() :].strip()
        if tail and (tail != self.variables.get("eos_token") or tail == end[0]):
            raise self.refusal(f"puts {tail!r} after {end[0]}, the end of turn")
        return sample, end[0], tail

    def _ends_turns(self, answer: str, end: str) -> bool:
        """Returns whether the end of turn follows an answer also if another message does."""
        try:
            chat = self.render([*PROBE, {"role": "assistant", "content": answer}, *PROBE])
        except DataError:
            return True
        return chat.partition(PLAIN)[2].lstrip().startswith(end)

    def _markers(self) -> tuple[str, ...]:
        turn = [*PROBE, {"role": "assistant", "content": PLAIN}]
        first = self.render(turn)
        try:
            chat = self.render([*turn, *turn])
        except DataError:
            chat = first
        # A template's own system message is ordinary text, so tags that are no special tokens count only behind it.
        tags = _TAG.findall(self._special.sub(" ", chat.partition(PROBE[0]["content"])[2]))
        found = dict.fromkeys([*self._special.findall(first), *tags])
        return tuple(marker for marker in found if "think" not in marker.lower())  # a text may have thoughts


def _as_transformers(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message without fields that are None, and with its thought under the names that templates read."""
    given = {name: value for name, value in message.items() if value is not None}
    thought = next((given[name] for name in NAMES_OF_THOUGHT if name in given), None)
    return given if thought is None else {"thinking": thought, **given, "reasoning_content": thought}


class GenerationBlock(Extension):
    """The tag ``{% generation %}``, which marks the assistant's text for ``transformers``; here it has no effect."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def template_environment(strftime_now: Callable[[str], str]) -> jinja2.Environment:
    """Returns a sandbox with the settings, filters and functions that chat templates need."""
    extensions = [GenerationBlock, loopcontrols]
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.filters["tojson"] = to_json
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = strftime_now
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
