"""Reads rows of text into examples, and finds what would be lost or taken for something else."""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from humanline.data._files import Row
from humanline.data._messages import Message, text_of
from humanline.data._readers import Example, instruction, squeezed
from humanline.data._record import BadRow, Record, WrongFormat
from humanline.data._schemas import ANSWER_PARTS, CONTEXT, WEIGHTS, Schema
from humanline.data._tally import Tally
from humanline.errors import ConfigError

__all__ = ["prompt_field", "read_examples", "read_prompt"]

PROMPT_FIELDS = ("prompt", "instruction", "question", "problem", "query", "messages", "conversations", "conversation")

# Of the chat templates that are most common: text with one of them has been through a template.
_MARKERS: tuple[str, ...] = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"),
    *("<end_of_turn>", "[INST]", "[/INST]", "<<SYS>>", "<|user|>", "<|assistant|>", "<\uff5cUser\uff5c>"),
    *("<extra_id_0>", "<extra_id_1>", "<|begin_of_text|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>", "<|eot|>"),
    *("<|header_start|>", "<|START_OF_TURN_TOKEN|>", "<|start_of_role|>", "<|start|>", "<|message|>", "<|prompter|>"),
    *("<|im_sep|>", "<|im_system|>", "<|im_user|>", "<|turn>", "[SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]"),
)
_CUE = re.compile(
    r"(?:(?:^|\n)(?:### (?:Response|Assistant):?|Assistant:)|### (?:Response|Assistant):|ASSISTANT:)\s*\Z"
)
_OPENING = re.compile(r"\s*### (?:Response|Assistant):?[ \t]*\n|\s*### (?:Response|Assistant):")
_END = re.compile(r"(?<=\S)(?:</s>|<eos>)\s*\Z")
_OF_NUMBERS = ("input", "choices", "options")
"""Columns whose content may be a number."""


def read_examples(
    rows: Iterable[Row],
    schema: Schema,
    column_map: Mapping[str, str | None],
    system_prompt: str | None,
    markers: Sequence[str],
    tally: Tally,
) -> Iterator[Example | BadRow]:
    """Reads rows of a schema.

    Args:
        rows (Iterable[Row]): the rows and their places.
        schema (Schema): reads them.
        column_map (Mapping[str, str | None]): maps a field to its column.
        system_prompt (str | None): the system message of conversations without one.
        markers (Sequence[str]): strings that the chat template writes; text with one of them is templated already.
        tally (Tally): counts what is said of rows that can be used.

    Returns:
        Iterator[Example | BadRow]: an example for each row or, where rows of one prompt belong together, for each
        prompt; the error of a row that cannot be used.

    Raises:
        WrongFormat: if a column would be ignored that changes what the model sees.
    """
    markers = tuple(dict.fromkeys((*markers, *_MARKERS)))

    def read() -> Iterator[Example | BadRow]:
        for where, row in rows:
            try:
                yield row if isinstance(row, BadRow) else example(Record(where, row, column_map))
            except BadRow as error:
                yield error

    def example(record: Record) -> Example:
        found = schema.read(record)
        prompt = _with_system(record, found.prompt, system_prompt)
        _refuse_ignored(record, prompt, CONTEXT.difference(schema.columns.split()))
        _refuse_ignored(record, [*prompt, *found.responses], ANSWER_PARTS)
        _refuse_weights(record)
        _refuse_templated(record, prompt, found.responses, markers)
        if any(_has_printed_arguments(message) for message in (*prompt, *found.responses) if len(message) > 2):
            record.remarks.append("a call's arguments are a string, which most chat templates put into quotes")
        tally.remark(record)
        return Example(record.where, prompt, found.responses, found.scores, found.labels, found.tools or record.tools())

    return _by_prompt(read()) if schema.by_prompt else read()


def prompt_field(row: Mapping[str, Any], column_map: Mapping[str, str | None]) -> str:
    """Returns the field that holds the prompt in a row of a prompt file; ``prompt`` wins over all others, and what
    ``column_map`` says of it over all columns.

    Raises:
        ConfigError: if several columns could be the prompt.
    """
    if column_map.get("prompt") is not None:
        return "prompt"
    record = Record("", row, column_map)
    found = [field for field in PROMPT_FIELDS if record.get(field) is not None] or ["prompt"]
    if found[0] != "prompt" and len(found) > 1 and len({_asked(record, field) for field in found}) > 1:
        raise ConfigError(
            f"column_map: any of the columns {', '.join(found)} could be the prompt; set column_map: {{prompt: ...}}"
        )
    return found[0]


def _asked(record: Record, field: str) -> str:
    """Returns the user's last text in a field; the field's name if there is none."""
    try:
        return record.prompt(field, answered=True)[-1]["content"].strip()
    except BadRow:
        return field


def read_prompt(record: Record, field: str) -> list[Message]:
    """Returns the messages to answer of a row of a prompt file, with its own system message.

    If the conversation ends with an answer, that is left out.

    Raises:
        BadRow: if the prompt is empty, of a wrong type, or has been through a chat template.
        WrongFormat: if a column would be ignored that changes what the model sees.
    """
    messages = instruction(record) if field == "instruction" else record.prompt(field, answered=True)
    messages = _with_system(record, messages, None)
    _refuse_ignored(record, messages, CONTEXT.difference([field]))
    _refuse_templated(record, messages, [], _MARKERS)
    return messages


def _with_system(record: Record, messages: list[Message], default: str | None) -> list[Message]:
    """Returns a prompt with its system message: its own, else that of the record's column, else the default."""
    own, column = messages[0]["role"] == "system", record.system()
    if own and column is not None and column.strip() != messages[0]["content"].strip():
        raise record.error("system", "differs from the system message of the prompt; keep one of them")
    text = default if column is None else column
    return messages if own or not text else [{"role": "system", "content": text}, *messages]


def _refuse_ignored(record: Record, messages: list[Message], columns: frozenset[str]) -> None:
    if not record.column_map and columns.isdisjoint(record.row):  # to be fast
        return
    for name in sorted(columns):
        column = record.column_map.get(name, name)
        if any(column == other for field, other in record.column_map.items() if field != name):
            continue  # it is read as another field
        value = record.get(name)
        if isinstance(value, bool) or value != value:  # NaN is a table's empty cell
            continue
        if isinstance(value, int | float) and name not in _OF_NUMBERS:  # no text, such as a count
            record.remarks.append(f"column '{column}' is not read, since it is a number")
        elif value is not None and (lost := _lost(value, messages)):
            part, has = ("response", "messages have") if name in ANSWER_PARTS else ("prompt", "prompt has")
            raise WrongFormat(
                f"{record.where}: column '{column}' would be ignored, and the {has} not its content ({lost!r}); "
                f"put it into the {part}, or leave it out on purpose with column_map: {{{name}: null}}"
            )


def _refuse_weights(record: Record) -> None:
    for name in WEIGHTS if record.column_map or not WEIGHTS.isdisjoint(record.row) else ():
        if (value := record.get(name)) is not None and value == value and value not in (1, "1", "1.0"):
            column = record.column_map.get(name) or name
            raise WrongFormat(
                f"{record.where}: column '{column}' has weights ({value!r}), and all examples weigh 1 here; leave it "
                f"out on purpose with column_map: {{{name}: null}}"
            )


def _lost(value: Any, prompt: list[Message]) -> str:
    """Returns the start of a text in a column that no message has; empty if there is none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(int(value) if isinstance(value, float) and value.is_integer() else value)
    if isinstance(value, str):
        if value.strip() in ("[]", "{}", "null"):
            return ""
        said = text_of(prompt)
        return "" if value.strip() in said or squeezed(value) in squeezed(said) else value.strip()[:40]
    if isinstance(value, Mapping):
        value = [each for name, each in value.items() if name not in ("role", "from")]
    if isinstance(value, list):
        return next((lost for each in value if (lost := _lost(each, prompt))), "")
    return "" if value is None or isinstance(value, bool) else repr(value)[:40]  # an image is some object


def _refuse_templated(
    record: Record, prompt: Sequence[Message], responses: Sequence[Message], markers: tuple[str, ...]
) -> None:
    firsts, pattern = _pattern(markers)
    for message in (*prompt, *responses):
        text = message.get("content") or ""
        if any(map(text.__contains__, firsts)) and (found := pattern.search(text)):
            raise _templated(record, found[0])
    last = (prompt[-1].get("content") or "")[-40:]
    if (":" in last or "#" in last) and (cue := _CUE.search(last)):
        raise _templated(record, cue[0].strip())
    for response in responses:
        text = response.get("content") or ""
        ends = ">" in text[-10:] and "<s>" not in text
        if (cue := _OPENING.match(text)) or (ends and (cue := _END.search(text[-10:]))):
            raise _templated(record, cue[0].strip())


def _has_printed_arguments(message: Message) -> bool:
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    return any(isinstance(call, Mapping) and isinstance(call.get("arguments"), str) for call in calls)


@functools.cache
def _pattern(markers: tuple[str, ...]) -> tuple[str, re.Pattern[str]]:
    """Returns the first characters of markers, since few texts have one, and what finds a marker."""
    return "".join({marker[0] for marker in markers}), re.compile("|".join(map(re.escape, markers)))


def _templated(record: Record, marker: str) -> BadRow:
    problem = f"the text has '{marker}' of a chat template, which would be applied twice; provide plain messages"
    return BadRow(record.where, problem, f"text with '{marker}' of a chat template")


def _by_prompt(examples: Iterable[Example | BadRow]) -> Iterator[Example | BadRow]:
    """Joins the scored responses to the same prompt into one example, at the place of the first."""
    joined: dict[str, Example] = {}
    for example in examples:
        if isinstance(example, BadRow):
            yield example
            continue
        key = repr((example.prompt, example.tools))
        if key in joined:
            first = joined[key]
            first.responses.extend(example.responses)
            scores = (*(first.scores or ()), *(example.scores or ()))
            joined[key] = Example(first.where, first.prompt, first.responses, scores, None, first.tools)
        else:
            joined[key] = example
    yield from joined.values()
