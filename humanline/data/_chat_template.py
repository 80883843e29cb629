"""Chat templates: untrusted programs that turn a chat into text, run in a sandbox as ``transformers`` runs them."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from humanline.errors import ConfigError, DataError

Chat = Sequence[Mapping[str, Any]]
"""Messages, each ``{"role": ..., "content": ...}``, with other fields that the template may read."""

PROBE: Chat = [{"role": "user", "content": "Name?"}]
"""The chat that every template must accept. Others it may reject: Gemma 2's accepts no system message."""
PLAIN = "Humanline"
THOUGHTFUL = f"<think>\nA person.\n</think>\n\n{PLAIN}"
"""Answers to it. Templates of models that think may have a place for thoughts in a generation prompt."""

NAMES_OF_THOUGHT = ("reasoning_content", "thinking", "reasoning")
"""The fields that ``transformers`` treats as one: the first that a message has counts."""
THOUGHTS = (*NAMES_OF_THOUGHT, "thoughts", "thought")
CALLS = ("tool_calls",)
SOURCES = ("context", "documents", "attachments", "functions", "citations")
"""Fields of a message that change what the model sees, if the template reads them."""

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
    ) -> None:
        self.file = file
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
                tools=tools,
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
            ConfigError: if the template leaves out a part of the chat.
        """
        prompt = self.render(messages, add_generation_prompt=True, tools=tools)
        if tools and self._is_prompt_of(messages, prompt):
            raise self._leaves_out("tools")
        self._check_contents(messages, prompt, tools)
        if any(len(message) > 2 for message in messages):
            self._check_prompt_fields(messages, prompt, tools)
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
        content = message.get("content") or ""
        if content not in text and (lost := _lost(content, self._opening(prompt) + text)):
            raise self._leaves_out(f"the response's {lost!r}")
        for field in (*CALLS, *THOUGHTS, *SOURCES) if len(message) > 2 else ():
            if value := message.get(field):
                without = _without(message, field) | {"content": content}
                if whole == self.render([*messages, without], tools=tools) or (
                    isinstance(value, str) and _lost(value, self._opening(prompt) + text)
                ):
                    raise self._leaves_out(f"'{field}' of the response")
        return text

    def _opening(self, prompt: str) -> str:
        """Returns what a prompt has after its last special token; it may open the answer's thought."""
        return prompt[max((found.end() for found in self._special.finditer(prompt)), default=0) :]

    def _check_contents(self, messages: Chat, prompt: str, tools: Any) -> None:
        for i, message in enumerate(messages):
            content = message.get("content")
            if message["role"] != "assistant" and isinstance(content, str) and content.strip() not in prompt:
                # The template has altered it, or left it out. Then another content makes no difference.
                other = [*messages[:i], {**message, "content": PLAIN}, *messages[i + 1 :]]
                if self._is_prompt_of(other, prompt, tools):
                    raise self._leaves_out(f"the message of the {message['role']}")

    def _check_prompt_fields(self, messages: Chat, prompt: str, tools: Any) -> None:
        for field in CALLS:
            if any(message.get(field) for message in messages):
                without = [
                    {"content": "", **{k: v for k, v in m.items() if k != field and v is not None}} for m in messages
                ]
                if self._is_prompt_of(without, prompt, tools):
                    raise self._leaves_out(f"'{field}'")
        for field in (*THOUGHTS, *SOURCES):  # a template that knows them may leave out those of earlier turns
            read = NAMES_OF_THOUGHT if field in NAMES_OF_THOUGHT else (field,)
            if self._fields.isdisjoint(read) and any(message.get(field) for message in messages):
                raise self._leaves_out(f"'{field}'")

    def _is_prompt_of(self, messages: Chat, prompt: str, tools: Any = None) -> bool:
        try:
            return prompt == self.render(messages, add_generation_prompt=True, tools=tools)
        except DataError:  # the template needs what these messages lack
            return False

    def _leaves_out(self, what: str) -> ConfigError:
        return ConfigError(
            f"tokenizer.chat_template: {self.file} leaves out {what}, so the model would not see it; set "
            "tokenizer.chat_template to a Jinja file that writes it, or remove it from the data"
        )

    def _probe(self) -> tuple[str, str, str]:
        """Returns the sample, the end of turn and what follows it; rejects templates whose output cannot be split."""
        try:
            prompt = self.render(PROBE, add_generation_prompt=True)
            for sample in (PLAIN, THOUGHTFUL):
                whole = self.render([*PROBE, {"role": "assistant", "content": sample}])
                if whole.startswith(prompt):
                    break
            else:
                raise self.refusal("renders a prompt differently once it is answered")
        except DataError as error:
            raise self.refusal(f"fails on the simplest chat ({squeeze(error.__cause__ or error)})") from error
        header, content, rest = whole[len(prompt) :].partition(PLAIN)
        if not content:
            raise self.refusal("omits or alters the assistant's content")
        if self._special.search(header) or (header.strip() and prompt == self.render(PROBE)):
            raise self.refusal(f"puts {header.strip()!r} before an answer but not into a generation prompt")
        end = self._special.search(rest)
        if end is None:
            raise self.refusal("ends the assistant's turn without a special token")
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


def _without(message: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Returns a message without a field, and without the same thought under another name."""
    same = NAMES_OF_THOUGHT if field in NAMES_OF_THOUGHT else ()
    return {
        name: value
        for name, value in message.items()
        if name != field and not (name in same and value == message[field])
    }


def fields_named(template: nodes.Template) -> Set[str]:
    """Returns the names that a template reads of its messages, and the other names and strings in such places."""
    names = {attribute.attr for attribute in template.find_all(nodes.Getattr)}
    return names | {constant.value for constant in template.find_all(nodes.Const) if isinstance(constant.value, str)}


def _lost(content: str, text: str) -> str:
    """Returns the start of what a rendered text lacks of a content, whatever its white space; empty if nothing."""
    here = "".join(text.split())
    if "".join(content.split()) in here:
        return ""
    lines = [line for line in content.splitlines() if "".join(line.split()) not in here]
    return " ".join((lines or content.splitlines())[0].split())[:60]


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
