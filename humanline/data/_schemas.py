"""Public schemas of preference data: which columns a source must have to be read as which.

A new schema is an entry of ``SCHEMAS`` and, if none fits, a function that reads a row. Field names stand for columns
that ``column_map`` may rename. ``system`` (or ``system_prompt`` or the like) and ``tools`` are read with every schema.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from humanline.data._messages import Message
from humanline.data._record import SYSTEM, Record
from humanline.errors import ConfigError

__all__ = [
    "ANSWER_PARTS",
    "CONTEXT",
    "FIELDS",
    "LABELS",
    "PAIRS",
    "RESPONSES",
    "SCHEMAS",
    "SCORES",
    "Example",
    "Schema",
    "find_schema",
    "instruction",
]

PAIRS, LABELS, SCORES, RESPONSES = "pairs", "labelled responses", "scored responses", "responses"


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the assistant's answers to it, before they are encoded.

    Attributes:
        where (str): the row's place in its source.
        prompt (list[Message]): the messages to answer.
        responses (list[Message]): the assistant's messages; in a pair the chosen one comes first.
        scores (tuple[float, ...] | None): one per response, higher is better.
        labels (tuple[bool, ...] | None): one per response, True if desirable.
        tools (list[Any] | None): the tools that the model may call.
    """

    where: str
    prompt: list[Message]
    responses: list[Message]
    scores: tuple[float, ...] | None = None
    labels: tuple[bool, ...] | None = None
    tools: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class Schema:
    """A layout of columns.

    Attributes:
        name (str): the name for ``format`` and for the log.
        kind (str): what a row holds.
        columns (str): the columns that must exist, separated by spaces.
        read (Callable[[Record], Example]): reads a row.
        by_prompt (bool): whether the rows of a prompt form one group.
        when (Callable[[Mapping[str, Any]], bool]): decides by the first row, where columns are not enough.
    """

    name: str
    kind: str
    columns: str
    read: Callable[[Record], Example]
    by_prompt: bool = False
    when: Callable[[Mapping[str, Any]], bool] = lambda row: True


# ---- Readers


def _pair(chosen: str = "chosen", rejected: str = "rejected", prompt: str = "prompt") -> Callable[[Record], Example]:
    """Reads a response that is better and one that is worse. Each may be a whole conversation."""

    def read(record: Record) -> Example:
        return _preferred(record, prompt, chosen, rejected, first_is_better=True)

    return read


def _choice(first: str, second: str, prompt: str, first_is_better: Callable[[Record], bool | None]) -> Any:
    """Reads two responses, and which of them is better (None: neither)."""

    def read(record: Record) -> Example:
        better = first_is_better(record)
        if better is None:
            raise record.tie("neither response is better")
        return _preferred(record, prompt, first, second, better)

    return read


def _preferred(record: Record, prompt: str, first: str, second: str, first_is_better: bool) -> Example:
    (before, a), (before_second, b) = record.turn(first), record.turn(second)
    if before != before_second:
        raise record.error(second, f"has another prompt than '{first}'; a pair needs one prompt")
    if a == b:
        raise record.error(second, f"equals '{first}', so neither is better; drop the line")
    return Example(record.where, _prompt(record, prompt, before), [a, b] if first_is_better else [b, a])


def _arena(record: Record) -> Example:
    """Reads two conversations and the winner. After different first answers, they have no prompt in common."""
    (before, _), (before_second, _) = record.turn("conversation_a"), record.turn("conversation_b")
    if before != before_second:
        raise record.tie("the last responses answer different conversations")
    return _choice("conversation_a", "conversation_b", "prompt", _winner)(record)


def _labelled(response: str, label: str = "label") -> Callable[[Record], Example]:
    """Reads a response with a label."""

    def read(record: Record) -> Example:
        before, answer = record.turn(response)
        return Example(record.where, _prompt(record, "prompt", before), [answer], labels=(record.label(label),))

    return read


def _all_scored(responses: str, scores: str) -> Callable[[Record], Example]:
    """Reads all responses to a prompt, with a score for each."""

    def read(record: Record) -> Example:
        answers = record.answers(responses)
        return Example(record.where, record.prompt(), answers, scores=record.scores(scores, len(answers)))

    return read


def _completions(record: Record) -> Example:
    """Reads UltraFeedback's completions: objects with the response and its ``overall_score``."""
    parts = _parts(record, "completions", "completion")
    answers = [_answer(part, "response") for part in parts]
    key = "overall_score" if all("overall_score" in part.row for part in parts) else "fine-grained_score"
    scores = tuple(part.number(key) for part in parts)
    return Example(record.where, record.prompt("instruction"), answers, scores=scores)


def _parts(record: Record, field: str, name: str) -> list[Record]:
    """Returns the objects of a list as rows, whose places have the name."""
    rows = record.require(field, list, "a list of objects")
    if not rows:
        raise record.error(field, "is empty; drop the line")
    if not all(isinstance(row, Mapping) for row in rows):
        raise record.error(field, "must be a list of objects, got other values in it; correct them")
    return [Record(f"{record.where}, {name} {i}", row, {}) for i, row in enumerate(rows)]


def _ranked(record: Record) -> Example:
    """Reads Nectar's answers: objects with the answer and its rank, 1 for the best."""
    parts = _parts(record, "answers", "answer")
    answers = [_answer(part, "answer") for part in parts]
    return Example(record.where, record.prompt(), answers, scores=tuple(-part.number("rank") for part in parts))


def _one_scored(response: str, score: str) -> Callable[[Record], Example]:
    """Reads one of several rows of a prompt: a response with its score."""

    def read(record: Record) -> Example:
        return Example(record.where, record.prompt(), [_answer(record, response)], scores=(record.number(score),))

    return read


def _unscored(prompt: str) -> Callable[[Record], Example]:
    """Reads a response that nothing is known about."""
    return lambda record: Example(record.where, _prompt(record, prompt, None), [_answer(record, "output")])


def _answer(record: Record, field: str) -> Message:
    before, message = record.turn(field)
    if before is not None:
        raise record.error(field, "must be a response alone, got a conversation")
    return message


def _prompt(record: Record, field: str, before: list[Message] | None) -> list[Message]:
    """Returns the messages before a response if there are any, else the prompt's field."""
    if before is None:
        return instruction(record) if field == "instruction" else record.prompt(field)
    if isinstance(record.get(field), list) and (given := record.prompt(field)) != before[: len(given)]:
        raise record.error(field, "differs from the messages before the response; provide the prompt once")
    return before


def instruction(record: Record) -> list[Message]:
    """Returns the prompt of Alpaca's ``instruction`` and ``input``, if there is one."""
    messages, more = record.prompt("instruction"), record.get("input")
    if isinstance(more, str) and more.strip():
        messages[-1] = messages[-1] | {"content": f"{messages[-1]['content']}\n\n{more}"}
    return messages


def _is_first(field: str, first: float, second: float) -> Callable[[Record], bool | None]:
    """Whether a number names the first response or the second; anything else is a tie."""

    def decide(record: Record) -> bool | None:
        return {first: True, second: False}.get(record.number(field))

    return decide


def _sign(field: str, tie: float = 0.0) -> Callable[[Record], bool | None]:
    """The first response is better below ``tie``, the second above it."""

    def decide(record: Record) -> bool | None:
        number = record.number(field)
        return None if number == tie else number < tie

    return decide


def _higher(first: str, second: str) -> Callable[[Record], bool | None]:
    """The response with the higher score is better."""

    def decide(record: Record) -> bool | None:
        scores = record.number(first), record.number(second)
        return None if scores[0] == scores[1] else scores[0] > scores[1]

    return decide


def _winner(record: Record) -> bool | None:
    winner = record.require("winner", str, "model_a, model_b or a tie")
    return {"model_a": True, "model_b": False}.get(winner)


def _of_type(kind: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda row: row.get("type") == kind


def _without(*columns: str) -> Callable[[Mapping[str, Any]], bool]:
    """A column of the name that the field has in general wins over others that could be the prompt."""
    return lambda row: not any(column in row for column in columns)


def _is_transcript(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("chosen"), str) and row["chosen"].lstrip().startswith("Human:")


# ---- The table

SCHEMAS = (
    Schema("implicit_preference", PAIRS, "chosen rejected", _pair(), when=lambda row: not _is_transcript(row)),
    Schema("preference", PAIRS, "prompt chosen rejected", _pair()),
    Schema("anthropic_hh", PAIRS, "chosen rejected", _pair(), when=_is_transcript),
    Schema("ultrafeedback_binarized", PAIRS, "prompt chosen rejected score_chosen score_rejected", _pair()),
    Schema("sharegpt", PAIRS, "conversations chosen rejected", _pair(prompt="conversations")),
    Schema("ultrainteract", PAIRS, "trajectory chosen rejected", _pair(prompt="trajectory")),
    Schema("orca", PAIRS, "question chosen rejected", _pair(prompt="question"), when=_without("prompt")),
    Schema(
        *("input_preference", PAIRS, "input chosen rejected"),
        _pair(prompt="input"),
        when=_without("prompt", "instruction"),
    ),
    Schema(
        *("instruction_preference", PAIRS, "instruction chosen rejected"),
        _pair(prompt="instruction"),
        when=_without("prompt"),
    ),
    Schema(
        *("argilla", PAIRS, "instruction chosen_response rejected_response"),
        _pair("chosen_response", "rejected_response", "instruction"),
    ),
    Schema(
        *("pku", PAIRS, "prompt response_0 response_1 better_response_id"),
        _choice("response_0", "response_1", "prompt", _is_first("better_response_id", 0, 1)),
    ),
    Schema(
        *("helpsteer3", PAIRS, "context response1 response2 overall_preference"),
        _choice("response1", "response2", "context", _sign("overall_preference")),
    ),
    Schema(
        *("helpsteer2_preference", PAIRS, "prompt response_1 response_2 preference_strength"),
        _choice("response_1", "response_2", "prompt", _sign("preference_strength")),
    ),
    Schema(
        *("shp", PAIRS, "history human_ref_A human_ref_B labels"),
        _choice("human_ref_A", "human_ref_B", "history", _is_first("labels", 1, 0)),
    ),
    Schema("chatbot_arena", PAIRS, "conversation_a conversation_b winner", _arena),
    Schema(
        *("unified_feedback", PAIRS, "conv_A conv_B conv_A_rating conv_B_rating"),
        _choice("conv_A", "conv_B", "prompt", _higher("conv_A_rating", "conv_B_rating")),
    ),
    Schema("stack_exchange", PAIRS, "question response_j response_k", _pair("response_j", "response_k", "question")),
    Schema(
        *("alpaca_eval_annotations", PAIRS, "instruction output_1 output_2 preference"),
        _choice("output_1", "output_2", "instruction", _sign("preference", 1.5)),
    ),
    Schema(
        *("halos_pairwise", PAIRS, "type prompt output_A output_B label"),
        _choice("output_A", "output_B", "prompt", _is_first("label", 1, 0)),
    ),
    Schema("kto", LABELS, "prompt completion label", _labelled("completion")),
    Schema("labelled_sharegpt", LABELS, "conversations kto_tag", _labelled("conversations", "kto_tag")),
    Schema(
        *("labelled_conversation", LABELS, "messages label"),
        _labelled("messages"),
        when=_without("completion", "output", "chosen"),
    ),
    Schema(
        *("halos_binary", LABELS, "type prompt output label"),
        _labelled("output"),
        when=_of_type("binary_feedback"),
    ),
    Schema(
        *("halos_scalar", SCORES, "type prompt output reward"),
        _one_scored("output", "reward"),
        by_prompt=True,
        when=_of_type("scalar_feedback"),
    ),
    Schema(
        *("ultrafeedback_armorm", SCORES, "prompt all_generated_responses all_rm_scores"),
        _all_scored("all_generated_responses", "all_rm_scores"),
    ),
    Schema("scored_responses", SCORES, "prompt responses scores", _all_scored("responses", "scores")),
    Schema("scored_completions", SCORES, "prompt completions scores", _all_scored("completions", "scores")),
    Schema("ultrafeedback", SCORES, "instruction completions", _completions),
    Schema("nectar", SCORES, "prompt answers", _ranked),
    Schema(
        *("helpsteer2", SCORES, "prompt response helpfulness"), _one_scored("response", "helpfulness"), by_prompt=True
    ),
    Schema("instruction_output", RESPONSES, "instruction output", _unscored("instruction")),
    Schema("alpaca_eval_outputs", RESPONSES, "instruction output generator", _unscored("instruction")),
    Schema("halos_samples", RESPONSES, "type prompt output", _unscored("prompt"), when=_of_type("sample")),
)

CONTEXT = frozenset(
    (
        "input context history chat_history conversation_history documents document article passage background "
        "knowledge premise choices options functions initial_reason_steps image images image_url audio video videos"
    ).split()
)
"""Columns that would change what the model sees, if their content is not in the prompt."""
ANSWER_PARTS = frozenset(("reasoning_content", "thinking", "tool_calls"))
"""Columns that may hold a part of a response."""

FIELDS = {name for schema in SCHEMAS for name in schema.columns.split()} | {*SYSTEM, "tools", *CONTEXT, *ANSWER_PARTS}
"""Fields that ``column_map`` can name."""


def find_schema(
    rows: Sequence[Mapping[str, Any]], kind: str, column_map: Mapping[str, Any], format: str | None
) -> Schema:
    """Recognises the schema of a source from its first rows.

    Args:
        rows (Sequence[Mapping[str, Any]]): the first rows, at least one.
        kind (str): among several schemas, one of this kind is meant.
        column_map (Mapping[str, Any]): maps a field to its column.
        format (str | None): the schema's name; None recognises it.

    Raises:
        ConfigError: if no schema matches, or several, or the name is unknown.
    """
    renamed = {column: name for name, column in column_map.items()}
    columns = {renamed.get(name, name): None for row in rows for name, value in row.items() if value is not None}
    for name, column in column_map.items():
        if column is None:
            columns.pop(name, None)
    first = {name: rows[0].get(column_map.get(name, name)) for name in columns}
    if format is not None:
        named = {schema.name: schema for schema in SCHEMAS}
        if format not in named:
            raise ConfigError(f"format: expected one of {', '.join(named)}, or null, got {format!r}")
        return named[format]
    matching = [s for s in SCHEMAS if columns.keys() >= set(s.columns.split()) and s.when(first)]
    matching = [s for s in matching if s.kind != RESPONSES] or matching  # a prompt file's columns beside new responses
    if first.get("type") is not None:  # HALOs' own samples also have AlpacaEval's columns
        matching = [s for s in matching if s.name.startswith("halos_")] or matching
    closest = [s for s in matching if not any(set(s.columns.split()) < set(o.columns.split()) for o in matching)]
    closest = [s for s in closest if s.kind == kind] or closest
    if len(closest) == 1:
        return closest[0]
    if closest:
        names = ", ".join(f"{s.name} ({', '.join(s.columns.split())})" for s in closest)
        raise ConfigError(f"format: the columns fit several schemas: {names}; set format to the name of one")
    usual = {PAIRS: "preference", LABELS: "kto", SCORES: "ultrafeedback_armorm"}[kind]
    example = next(schema for schema in SCHEMAS if schema.name == usual)
    ids = "; for token ids use humanline.data.encoded_groups" if "responses" in columns else ""
    raise ConfigError(
        f"column_map: the columns {', '.join(map(str, columns)) or '(none)'} fit no schema, such as {usual} "
        f"({', '.join(example.columns.split())}); say which column is which, or rename them (docs/data.md){ids}"
    )
